"""`train`: text to rows, stage after stage, each result in its own folder."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from datasets import Dataset
from pyarrow.parquet import read_table

from moe_common.models.base_identity import BaseIdentity
from moe_common.models.base_model import load_base_model, resolve_model_name
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import whole_file
from moe_ext.multi_token.model.mixture import MultiTokenMoE, Stage
from moe_ext.multi_token.model.placement import place
from moe_ext.multi_token.model.storage import Meta, onto, read_config, read_meta, save
from moe_ext.multi_token.model.vocabulary import most_frequent
from moe_ext.multi_token.options import TrainOptions
from moe_ext.multi_token.training.data import Source, read_source, to_prompts, to_rows, to_tasks
from moe_ext.multi_token.training.ppo import PPOSettings, train_ppo
from moe_ext.multi_token.training.self_distill import continue_prompts
from moe_ext.multi_token.training.stages import StageSettings, train_stage

logger = logging.getLogger(__name__)

CONTINUATIONS = "continuations"
PART = 1024  # prompts that are continued, and kept, together
COUNTED_ROWS = 500  # in which it is counted how often copies stand
# What a run may be continued with although it differs: none of it changes a number; `ppo_steps` adds a stage.
FREE_OPTIONS = ("out", "save_steps", "logging_steps", "ppo_steps")


def train(options: TrainOptions) -> Path:
    """Train all stages that are asked for; what a folder holds already is not trained again.

    Returns:
        The folder of the last stage.

    Raises:
        ValueError: data or options that cannot work, or a folder of another run.
        FileNotFoundError: data or a model that is not there.
    """
    run = RunFolder(options.out, "multi_token train", asdict(options), free=FREE_OPTIONS, option="--out")
    source = read_source(options.data)
    resolve_model_name(options.model)
    run.know(**{"the text of data": _sha256(source)})
    torch.manual_seed(options.seed)
    backbone, tokenizer = load_base_model(options.model, quant=options.quant)
    model = place(MultiTokenMoE(backbone, options.model_config()))
    identity = BaseIdentity.of(backbone, options.model)
    # What can be refused is refused before anything is written.
    rows = None if options.self_distill else _some(to_rows(source, tokenizer, length=options.length), options)
    with run:
        return _train_stages(run.folder, options, source, model, tokenizer, identity, rows)


def _train_stages(
    out: Path,
    options: TrainOptions,
    source: Source,
    model: MultiTokenMoE,
    tokenizer,
    identity: BaseIdentity,
    rows: Dataset | None,
) -> Path:
    """Train the stages that are not there yet; gives the folder of the last."""
    if rows is None:
        rows = _continuations(options, source, model, tokenizer, out / CONTINUATIONS)
    logger.info("%d rows, %d tokens", len(rows), sum(map(len, rows["input_ids"])))
    if options.draft_vocabulary is not None:
        model.draft_only(most_frequent(rows["labels"], model.off_id, options.draft_vocabulary))
    model.count_copies([rows[place] for place in range(min(len(rows), COUNTED_ROWS))])
    stages: list[tuple[str, Stage, float]] = [("s1", "heads", options.stage1_epochs)]
    if options.stage2_epochs > 0:
        stages.append(("s2", "router", options.stage2_epochs))
    for name, stage, epochs in stages:
        folder = out / name
        if folder.exists():
            logger.info("%s is there already", folder)
            done = onto(model.backbone, folder, config=read_config(folder), meta=read_meta(folder), name=options.model)
            model.load_state_dict(done.state_dict())
            continue
        settings = StageSettings(
            stage=stage,
            epochs=epochs,
            batch=options.batch,
            lr=options.lr,
            save_steps=options.save_steps,
            logging_steps=options.logging_steps,
            bf16=options.bf16,
            seed=options.seed,
        )
        train_stage(model, rows, settings, out / "checkpoints" / name)
        _keep(model, tokenizer, identity, options, source, folder)
    if options.ppo_steps > 0:
        folder = out / "ppo_final"
        if folder.exists():
            logger.info("%s is there already", folder)
            return folder
        settings = PPOSettings(
            steps=options.ppo_steps,
            lr=options.ppo_lr,
            longest=options.length - options.prompt_length,
            save_steps=options.save_steps,
            logging_steps=options.logging_steps,
            seed=options.seed,
        )
        tasks = to_tasks(source, tokenizer, prompt_length=options.prompt_length, longest=settings.longest)
        train_ppo(model, tasks, settings, out / "checkpoints" / "ppo")
        _keep(model, tokenizer, identity, options, source, folder)
    return folder


def _keep(
    model: MultiTokenMoE,
    tokenizer,
    identity: BaseIdentity,
    options: TrainOptions,
    source: Source,
    folder: Path,
) -> None:
    noted = {**asdict(options), "pairs": bool(source.pairs)}
    save(model, tokenizer, Meta(stage=folder.name, backbone=identity, options=noted), folder)
    logger.info("%s is written", folder)


def _continuations(options: TrainOptions, source: Source, model: MultiTokenMoE, tokenizer, folder: Path) -> Dataset:
    """The backbone's own text; each part is written once and kept, so that an interrupted run goes on behind it."""
    prompts = to_prompts(source, tokenizer, length=options.prompt_length, whole_texts=False)
    chosen = list(_some(Dataset.from_dict({"tokens": prompts}), options)["tokens"])
    parts = {folder / f"{start:07d}.parquet": chosen[start : start + PART] for start in range(0, len(chosen), PART)}
    backbone = model.backbone
    if options.bf16 and options.quant == "none" and not all(map(Path.exists, parts)):
        # Twice as fast; a token here and there is another, which a target for training may be.
        backbone, _ = load_base_model(options.model, dtype=torch.bfloat16)
        backbone.to(model.backbone_device)
    new_tokens = options.length - options.prompt_length
    for kept, some in parts.items():
        if not kept.exists():
            logger.info("continuing %d prompts into %s", len(some), kept)
            rows = continue_prompts(backbone, tokenizer, some, num_tokens=new_tokens)
            with whole_file(kept) as partial:
                rows.to_parquet(partial)
    return Dataset.from_list([row for kept in parts for row in read_table(kept).to_pylist()])


def _some(rows: Dataset, options: TrainOptions) -> Dataset:
    if options.max_rows is None or options.max_rows >= len(rows):
        return rows
    return rows.select(sorted(Random(options.seed).sample(range(len(rows)), options.max_rows)))


def _sha256(source: Source) -> str:
    text = json.dumps([[asdict(pair) for pair in source.pairs], source.texts]).encode()
    return hashlib.sha256(text).hexdigest()
