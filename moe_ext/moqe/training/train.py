"""`--train`: experts and text to a trained router."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from moe_common.runs.checkpoints import CHECKPOINT, is_complete, newest_complete, remove_incomplete
from moe_common.runs.whole_files import write_json
from moe_ext.moqe.experts.expert import resolve_expert
from moe_ext.moqe.experts.identity import ExpertIdentity, check_same_experts
from moe_ext.moqe.mixture.expert_set import ExpertSet, load_experts
from moe_ext.moqe.mixture.model import MoQEModel
from moe_ext.moqe.mixture.router import Router
from moe_ext.moqe.options import TrainOptions
from moe_ext.moqe.training.documents import Documents, read_documents
from moe_ext.moqe.training.losses import fit_static_weights, single_losses
from moe_ext.moqe.training.router_training import RUN, RouterTraining, collator, reading_order, train_router
from moe_ext.moqe.training.rows import Row, fingerprint, shuffled, to_rows
from moe_ext.moqe.training.state_cache import StateCache, batches_of_states

logger = logging.getLogger(__name__)

RESULT, CHECKPOINTS, CACHE = "moqe", "checkpoints", "outputs"
# What a run may be continued with although it differs: none of it changes a number.
FREE_OPTIONS = (
    "save_dir",
    "expert_paths",
    "checkpoint_path",
    "from_scratch",
    "save_steps",
    "logging_steps",
    "cache_dir",
    "cache_gb",
)


def train(options: TrainOptions) -> Path:
    """Train a router, or go on where the same command was broken off.

    Returns:
        The folder of the mixture.

    Raises:
        ValueError, FileNotFoundError: experts, text or a checkpoint that cannot work; nothing is written then.
    """
    folder = Path(options.save_dir)
    identities = [ExpertIdentity.of(resolve_expert(path)) for path in options.expert_paths]
    _check_folder(folder, identities, options)
    checkpoint = _named_checkpoint(options, identities)
    held = {
        name: read_documents(sources, "train", text_column=options.text_column)
        for name, sources in (("curriculum", options.curriculum), ("data", options.data_dir))
        if sources
    }
    held_out = read_documents(options.data_dir, "validation", text_column=options.text_column)
    experts = load_experts(options.expert_paths, dtype=options.dtype, gguf_backend=options.gguf_backend)
    small = training_rows(held["curriculum"], experts, options) if "curriculum" in held else []
    rows = small + training_rows(held["data"], experts, options)
    run = {
        "experts": [identity.to_dict() for identity in identities],
        "options": {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS},
        "rows": fingerprint(rows),
        "unreadable_samples": sum(documents.unreadable for documents in held.values()),
    }
    _check_run(folder, run, options)
    result = folder / RESULT
    if options.from_scratch:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        shutil.rmtree(result, ignore_errors=True)
    if result.exists():
        logger.info("%s is there already", result)
        return result
    write_json(folder / RUN, run)
    remove_incomplete(folder / CHECKPOINTS)
    checkpoint = checkpoint or newest_complete(folder / CHECKPOINTS)
    logger.info(
        "%d rows, %d tokens; the experts %s",
        len(rows),
        sum(len(row.tokens) for row in rows),
        "share their embedding" if experts.shares_embedding else "keep their own embeddings",
    )
    model = _train(experts, rows, len(small), options, folder, run, checkpoint)
    noted = {**run, "validation": _choose_default(model, held_out, options)}
    model.save_pretrained(result, noted)
    return result


def training_rows(documents: Documents, experts: ExpertSet, options: TrainOptions) -> list[Row]:
    """The rows of each source in turn. Calibration takes its documents from the beginning, so this takes the last."""
    return [
        row
        for source, texts in documents.texts.items()
        for row in to_rows(
            shuffled(texts)[::-1],
            source,
            experts.tokenizer,
            row_length=options.row_length,
            max_tokens=options.max_tokens,
            rows_per_document=options.rows_per_document,
        )
    ]


def losses_behind_prefix(cache: StateCache, prefix_length: int, *, batch_size: int) -> Tensor:
    """What every expert costs on every row [N, E] behind the prefix, in nats."""
    numbers = list(range(len(cache.rows)))
    pieces = []
    for batch, states in batches_of_states(cache, numbers, batch_size):
        labels = batch["labels"].clone()
        labels[:, : prefix_length - 1] = -100
        pieces.append(single_losses(cache.experts, states, labels).sum(1))
    return torch.cat(pieces)


def _train(
    experts: ExpertSet,
    rows: Sequence[Row],
    num_small: int,
    options: TrainOptions,
    folder: Path,
    run: dict[str, Any],
    checkpoint: Path | None,
) -> MoQEModel:
    cache = StateCache(Path(options.cache_dir or folder / CACHE), experts, rows, max_bytes=options.cache_gb * 1e9)
    cache.fill()
    torch.manual_seed(options.seed)
    router = Router(options.router_config(), input_size=experts.input_size, num_experts=len(experts))
    expert_losses_NE = None
    if options.mode == "sequence":
        expert_losses_NE = losses_behind_prefix(cache, options.prefix_length, batch_size=options.batch_size)
    order = reading_order(
        num_small,
        len(rows) - num_small,
        small_epochs=options.curriculum_epochs,
        epochs=options.epochs,
        seed=options.seed,
    )
    steps = train_router(
        RouterTraining(router, experts),
        order,
        collator(cache, expert_losses_NE),
        options,
        folder / CHECKPOINTS,
        run=run,
        checkpoint=checkpoint,
    )
    logger.info("%d optimiser steps of %d router weights", steps, sum(p.numel() for p in router.parameters()))
    mixed_up = Random(options.seed).sample(range(len(rows)), len(rows))
    static = fit_static_weights(experts, batches_of_states(cache, mixed_up, options.batch_size))
    return MoQEModel(experts, router, static_weights=static)


def _choose_default(model: MoQEModel, held_out: Documents, options: TrainOptions) -> dict[str, float]:
    """Set the best single expert on validation text; returns the losses of all ways there, in nats a token."""
    from moe_ext.moqe.training.evaluation import held_out_rows, measure

    rows = held_out_rows(held_out, model.expert_set.tokenizer, options, max_tokens=options.validation_tokens)
    measured = measure(model.expert_set, {"router": model}, rows, batch_size=options.batch_size)
    losses = {way: measured.mean_nats(way) for way in measured.nats}
    singles = [losses[name] for name in model.expert_set.names]
    model.default_expert = singles.index(min(singles))
    for way, loss in losses.items():
        logger.info("validation, nats a token: %s %.4f", way, loss)
    return losses


def _check_folder(folder: Path, identities: list[ExpertIdentity], options: TrainOptions) -> None:
    """Refuse a folder of something else before anything is loaded."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / RUN).exists()):
        raise ValueError(f"{folder} holds no run of this tool. Name another folder with --save_dir.")
    if (folder / RUN).exists() and not options.from_scratch:
        check_same_experts(_read_run(folder)["experts"], identities, folder)


def _named_checkpoint(options: TrainOptions, identities: list[ExpertIdentity]) -> Path | None:
    if options.checkpoint_path is None:
        return None
    path = Path(options.checkpoint_path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {path}. Check --checkpoint_path.")
    if not CHECKPOINT.fullmatch(path.name) or not is_complete(path) or not (path / RUN).exists():
        raise ValueError(
            f"{path} is no whole checkpoint of this tool. Give a folder SAVE_DIR/{CHECKPOINTS}/checkpoint-N."
        )
    check_same_experts(_read_run(path)["experts"], identities, path)
    return path


def _check_run(folder: Path, run: dict[str, Any], options: TrainOptions) -> None:
    """Refuse to go on with a run that was begun with other options or other text."""
    if options.from_scratch or not (folder / RUN).exists():
        return
    there = _read_run(folder)
    differs = [
        f"{name} {there['options'].get(name)} there and {value} here"
        for name, value in run["options"].items()
        if there["options"].get(name) != value
    ]
    if not differs and there["rows"] != run["rows"]:
        differs = ["the text that data_dir names"]
    if differs:
        raise ValueError(
            f"{folder} holds a run that was begun with other options: {'; '.join(differs)}. Name another folder with "
            "--save_dir, give the same options to go on, or begin anew with --from_scratch."
        )


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as wrong:
        raise ValueError(f"{folder / RUN} cannot be read: {wrong}. Name another --save_dir, or delete it.") from wrong
