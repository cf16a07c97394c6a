"""`--train`: experts and text to a trained router."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from moe_common.runs.checkpoints import CHECKPOINT, is_complete
from moe_common.runs.run_folder import RUN, RunFolder
from moe_common.runs.whole_files import read_json, remove
from moe_ext.moqe.experts.expert import resolve_expert
from moe_ext.moqe.experts.identity import ExpertIdentity, check_same_experts
from moe_ext.moqe.mixture.expert_set import ExpertSet, load_experts
from moe_ext.moqe.mixture.model import MoQEModel
from moe_ext.moqe.mixture.router import Router
from moe_ext.moqe.options import TrainOptions
from moe_ext.moqe.training.documents import Documents, read_documents
from moe_ext.moqe.training.losses import fit_static_weights, single_losses
from moe_ext.moqe.training.router_training import RouterTraining, collator, reading_order, train_router
from moe_ext.moqe.training.rows import Row, fingerprint, shuffled, to_rows
from moe_ext.moqe.training.state_cache import StateCache, batches_of_states

logger = logging.getLogger(__name__)

RESULT, CHECKPOINTS, CACHE = "moqe", "checkpoints", "outputs"
# What a run may be continued with although it differs: none of it changes a number.
FREE_OPTIONS = (
    "experts",  # compared by their weights, wherever they lie
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
    """Train a router, or go on where the same command was interrupted.

    Returns:
        The folder of the mixture.

    Raises:
        ValueError, FileNotFoundError: experts, text or a checkpoint that cannot work; nothing is written then.
    """
    identities = [ExpertIdentity.of(resolve_expert(path)) for path in options.expert_paths]
    run = RunFolder(
        options.save_dir,
        "moqe --train",
        asdict(options),
        free=FREE_OPTIONS,
        option="--save_dir, or begin again with --from_scratch",
        starts_again=options.from_scratch,
    )
    folder = run.folder
    if run.is_begun and not options.from_scratch:
        check_same_experts(_noted_experts(folder), identities, folder)
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
    run.know(
        experts=[identity.to_dict() for identity in identities],
        unreadable_samples=sum(documents.unreadable for documents in held.values()),
        **{"the text that data_dir names": fingerprint(rows)},
    )
    result = folder / RESULT
    if result.exists() and not options.from_scratch:
        logger.info("%s is there already", result)
        return result
    with run:
        if options.from_scratch:
            remove(folder / CHECKPOINTS)
            remove(result)
        model = _train(experts, rows, len(small), options, run, checkpoint)
        noted = {**run.settings, "validation": _choose_default(model, held_out, options)}
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
    run: RunFolder,
    checkpoint: Path | None,
) -> MoQEModel:
    folder = run.folder
    logger.info(
        "%d rows, %d tokens; the experts %s",
        len(rows),
        sum(len(row.tokens) for row in rows),
        "share their embedding" if experts.shares_embedding else "keep their own embeddings",
    )
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
        run={"command": run.command, "settings": run.settings},
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
    check_same_experts(_noted_experts(path), identities, path)
    return path


def _noted_experts(folder: Path) -> list[dict[str, Any]]:
    noted = read_json(folder / RUN)
    try:
        return noted["settings"]["experts"]
    except (KeyError, TypeError) as edited:
        raise ValueError(f"{folder / RUN} does not say which experts the router is for. Remove {folder}.") from edited
