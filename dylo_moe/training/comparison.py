"""A mixture against one LoRA of the same size, on several domains: train both, measure, draw, and say where it lies.

    results = run(MixtureConfig(), DataConfig(), TrainingConfig(), RunConfig(output_dir="runs/first"))

What is on disk is not made again: a run that was interrupted continues where it was when started with the same
settings.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import set_seed

from dylo_moe.model_card import describe_lora
from dylo_moe.training import data_report
from dylo_moe.training.adapters import MixtureConfig, add_lora_of_size, add_mixture, num_trained
from dylo_moe.training.comparison_report import LORA, MIXTURE, PICTURE, RESULTS, describe_adapter
from dylo_moe.training.data import DataConfig, PreparedData, prepare, reads_conversations
from dylo_moe.training.expert_usage import draw_usage, usage_by_block
from dylo_moe.training.throughput import tokens_per_second
from dylo_moe.training.trainer import CHECKPOINTS, TrainingConfig, forget_training, is_trained, train_adapter
from moe_common.models.base_model import Quantization, load_base_model
from moe_common.models.perplexity import measure_blocks
from moe_common.runs.checkpoints import checkpoints, is_complete
from moe_common.runs.drawing import load_pyplot, only_a_picture
from moe_common.runs.processes import num_processes, process_rank
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import read_json, remove, write_json
from moe_common.text.batches import TurnTakingSampler, collate
from moe_common.text.documents import load_documents
from moe_common.text.instructions import render_question
from moe_common.text.packing import keeps_documents_apart

logger = logging.getLogger(__name__)

COMMAND = "train.py"
# Settings that change nothing in what a run computes, so that it may be continued with others.
FREE_SETTINGS = ("output_dir", "resume_from_checkpoint", "data_prep_only", "report_to", "eval_batch_size")


@dataclass(kw_only=True)
class RunConfig:
    """What the run is about and where it goes."""

    model_name: str = field(
        default="base", metadata={"help": "Base model: base (committed), smollm2-135m, a folder or a hub id."}
    )
    quant: Quantization = field(default="none", metadata={"help": "Bits in which bitsandbytes holds the frozen base."})
    output_dir: str = field(default="runs/mixture", metadata={"help": "Folder of the adapters and the results."})
    compare: bool = field(default=True, metadata={"help": "Also train one LoRA of as many parameters."})
    resume_from_checkpoint: bool | None = field(
        default=None,
        metadata={
            "help": "Continue the run in output_dir, or refuse; false: begin anew. By default: if there is one."
        },
    )
    data_prep_only: bool = field(
        default=False, metadata={"help": "Print what the datasets hold; train and write nothing."}
    )


def run(mixture: MixtureConfig, data: DataConfig, training: TrainingConfig, config: RunConfig) -> dict:
    """Train, measure and draw.

    Under `accelerate launch` all processes train together; the first one alone writes, measures and draws.

    Returns:
        What `results.json` holds; in the other processes an empty dict.

    Raises:
        ValueError: an option or the data cannot be used, the output folder holds a run with other settings, or
            `resume_from_checkpoint` finds nothing to continue. Nothing has been written then.
        FileNotFoundError: a file, a folder or a model is not there.
        ModuleNotFoundError: a package is not installed.
    """
    load_pyplot()  # a picture is drawn in the end
    output = Path(config.output_dir)
    settings = {
        "mixture": asdict(mixture),
        "data": asdict(data),
        "training": asdict(training),
        "run": asdict(config),
    }
    begins_again = config.resume_from_checkpoint is False
    folder = RunFolder(output, COMMAND, settings, free=FREE_SETTINGS, writes=is_first_process())
    _refuse_to_continue_nothing(output, config)
    if (output / RESULTS).exists() and not begins_again:
        logger.info("the run in %s is finished already", output)
        return read_json(output / RESULTS) if is_first_process() else {}
    base, tokenizer = _load_base(config, training)
    apart = _documents_kept_apart(base, data)
    logger.info("reading %s", ", ".join(data.domains))
    parts = [_read_for_training(name, data, training, tokenizer, apart) for name in data.domains]
    held_out = {
        name: prepare(name, "test", tokenizer, data, seed=training.seed, apart=apart, max_rows=data.eval_blocks).rows
        for name in data.domains
    }
    rows, sampler = _in_one(parts, data, training)
    validation = _read_validation(parts, data, training, tokenizer, apart)
    with folder:
        if is_first_process() and begins_again:
            remove(output / RESULTS)
            for name in (MIXTURE, LORA):
                forget_training(output / name)
        sizes = _train_all(base, mixture, rows, sampler, validation, training, config)
        if not is_first_process():
            return {}
        return _measure_all(sizes, settings, held_out, tokenizer, data, training, config)


def _train_all(
    base,
    mixture: MixtureConfig,
    rows: Dataset,
    sampler: TurnTakingSampler | None,
    validation: Dataset | None,
    training: TrainingConfig,
    config: RunConfig,
) -> dict[str, int]:
    """Train the mixture, and the LoRA where one is wanted; returns the number of parameters of each."""
    output, resume = Path(config.output_dir), config.resume_from_checkpoint is not False

    def train(model, name: str, described: str) -> int:
        """Train an adapter unless it is trained already; returns the number of its parameters."""
        size, folder = num_trained(model), output / name
        if is_trained(folder) and resume:
            logger.info("the %s in %s is trained already", described, folder)
        else:
            logger.info("training %s (%s parameters)", described, f"{size:,}")
            train_adapter(
                model,
                rows,
                training,
                folder,
                sampler=sampler,
                validation=validation,
                resume=resume,
                base_name=config.model_name,
            )
        return size

    set_seed(training.seed)
    model = add_mixture(base, mixture, base_name=config.model_name)
    sizes = {MIXTURE: train(model, MIXTURE, f"mixture of {mixture.num_experts} experts")}
    if config.compare:
        base, _ = _load_base(config, training)
        set_seed(training.seed)
        lora = add_lora_of_size(base, sizes[MIXTURE], mixture)
        if is_first_process():
            describe_lora(lora, output / LORA, base_name=config.model_name)
        sizes[LORA] = train(lora, LORA, f"one LoRA of rank {lora.peft_config['default'].r}")
    return sizes


def _measure_all(
    sizes: dict[str, int],
    settings: dict,
    held_out: dict[str, Dataset],
    tokenizer,
    data: DataConfig,
    training: TrainingConfig,
    config: RunConfig,
) -> dict:
    """Measure what was saved, and write it down; the picture last, without which the results stand."""
    logger.info("measuring what was saved, on held-out text")
    output = Path(config.output_dir)
    saved = {name: _load_saved(output / name, config) for name in sizes}
    model = saved[MIXTURE]
    results = {
        "settings": settings,
        "trained_parameters": sizes,
        "perplexity": _perplexities(saved, held_out, training),
        "tokens_per_second": _speeds(model, next(iter(held_out.values()))),
    }
    usage = {name: usage_by_block(model, blocks) for name, blocks in held_out.items()}
    results["usage"] = {name: usage_LE.tolist() for name, usage_LE in usage.items()}
    results["continuations"] = _continuations(model, tokenizer, data)
    for name in sizes:
        describe_adapter(output / name, results, name)
    write_json(output / RESULTS, results)
    with only_a_picture(output / PICTURE):
        draw_usage(usage, model.mixture_config.expert_names, output / PICTURE)
    return read_json(output / RESULTS)


def report_data(data: DataConfig, training: TrainingConfig, config: RunConfig) -> str:
    """What the datasets hold, as a table; nothing is trained and nothing written."""
    base, tokenizer = load_base_model(config.model_name)
    apart = _documents_kept_apart(base, data)
    return data_report.as_text(data_report.count_data(data, tokenizer, seed=training.seed, apart=apart), data)


def is_first_process() -> bool:
    """Whether this process is the one that writes, of those that torchrun or accelerate started together."""
    return process_rank() == 0


def _load_base(config: RunConfig, training: TrainingConfig):
    base, tokenizer = load_base_model(config.model_name, quant=config.quant)
    if config.quant != "none":
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return base, tokenizer


def _load_saved(folder: Path, config: RunConfig) -> PeftModel:
    base, _ = load_base_model(config.model_name, quant=config.quant)
    model = PeftModel.from_pretrained(base, folder)
    if config.quant == "none" and torch.cuda.is_available():
        model = model.to("cuda")
    return model


def _refuse_to_continue_nothing(output: Path, config: RunConfig) -> None:
    if not config.resume_from_checkpoint:
        return
    folders = (output / MIXTURE, output / LORA)
    if not any(is_trained(folder) or any(map(is_complete, checkpoints(folder / CHECKPOINTS))) for folder in folders):
        raise ValueError(
            f"resume_from_checkpoint is set, but {output} holds no whole checkpoint of a run to continue. Check "
            "--output_dir, or start without --resume_from_checkpoint."
        )


def _documents_kept_apart(base, data: DataConfig) -> bool:
    if not data.separate_documents:
        return False
    apart = keeps_documents_apart(base)
    if not apart:
        logger.warning(
            "%s cannot keep the documents of one row apart; tokens see across their borders", type(base).__name__
        )
    return apart


def _read_for_training(name: str, data: DataConfig, training: TrainingConfig, tokenizer, apart: bool) -> PreparedData:
    """With a number of steps, the datasets give the same number of rows each, and no more than the steps need."""
    needed = None
    if training.num_steps is not None:
        needed = -(-training.num_steps * _rows_of_a_step(training) // len(data.domains))
    return prepare(name, "train", tokenizer, data, seed=training.seed, apart=apart, max_rows=needed)


def _rows_of_a_step(training: TrainingConfig) -> int:
    return training.train_batch_size * training.gradient_accumulation_steps * num_processes()


def _in_one(
    parts: list[PreparedData], data: DataConfig, training: TrainingConfig
) -> tuple[Dataset, TurnTakingSampler | None]:
    """The rows of all datasets, and the order in which they are read where a plain shuffle will not do."""
    rows = concatenate_datasets([part.rows for part in parts])
    kinds = [int("position_ids" in part.rows.column_names) for part in parts for _ in range(len(part.rows))]
    if len(set(kinds)) == 1 and not data.interleaved_sampling:
        return rows.shuffle(seed=training.seed), None
    sources = [source for source, part in enumerate(parts) for _ in range(len(part.rows))]
    sampler = TurnTakingSampler(
        kinds,
        sources,
        batch_size=_rows_of_a_step(training),
        interleaved=data.interleaved_sampling,
        seed=training.seed,
    )
    return rows, sampler


def _read_validation(
    parts: list[PreparedData], data: DataConfig, training: TrainingConfig, tokenizer, apart: bool
) -> Dataset | None:
    """What early stopping watches. Its batches follow one another in order, so all rows must be of one kind."""
    if training.early_stopping_patience is None:
        return None
    apart = apart and not any(part.instruction for part in parts)
    return concatenate_datasets(
        [
            prepare(
                name, "validation", tokenizer, data, seed=training.seed, apart=apart, max_rows=data.eval_blocks
            ).rows
            for name in data.domains
        ]
    )


def _perplexities(
    saved: dict[str, PeftModel], held_out: dict[str, Dataset], training: TrainingConfig
) -> dict[str, dict[str, float]]:
    measured: dict[str, dict[str, float]] = {"base": {}, **{name: {} for name in saved}}
    for domain, blocks in held_out.items():
        with saved[MIXTURE].disable_adapter():
            base = measure_blocks(saved[MIXTURE], blocks, batch_size=training.eval_batch_size)
        measured["base"][domain] = base.perplexity
        for name, model in saved.items():
            found = measure_blocks(model, blocks, batch_size=training.eval_batch_size)
            measured[name][domain] = found.perplexity
    return measured


def _speeds(model, blocks: Dataset) -> dict[str, float]:
    batch = collate(list(blocks.select(range(min(8, len(blocks))))))
    return tokens_per_second(model, model.mixture_config.expert_names, batch["input_ids"].to(model.device))


def _continuations(model, tokenizer, data: DataConfig) -> dict[str, tuple[str, str]]:
    continued = {}
    for domain in data.domains:
        documents = load_documents(domain, "test", text_column=data.text_column)
        if reads_conversations(domain, documents.column_names, data):
            beginning, limit = render_question(documents[0], tokenizer, domain), data.max_seq_length
        else:
            beginning, limit = " ".join(documents[0]["text"].split(" ")[:16]), 48
        prompt = tokenizer(beginning, return_tensors="pt", add_special_tokens=False)["input_ids"]
        prompt = prompt[:, :limit].to(model.device)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=40,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        continuation = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
        continued[domain] = (tokenizer.decode(prompt[0]), continuation)
    return continued
