"""The steps as commands: their options, and what each reads and writes."""

import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_common.models.base_model import default_device
from moe_common.models.lm_eval_tasks import find_tasks, run_tasks
from moe_common.runs.checkpoints import weights_of
from moe_common.runs.downloads import file_sha256
from moe_common.runs.options import check_above, check_at_least, split_names
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import check_free, check_writable
from moe_common.text.documents import Part
from moe_common.text.reading import read_blocks
from moe_ext.gptq import BLOCK_SIZE, DAMP
from moe_ext.moe_models import MODEL_HELP, SMALL_MOE, context_of, load_moe
from moe_ext.router_ft.allocation import Sensitivity, allocate
from moe_ext.router_ft.alpha import Estimate, alpha_table, read_alpha_csv, write_alpha_csv
from moe_ext.router_ft.calibration import CalibrationConfig, block_length, text_blocks
from moe_ext.router_ft.checkpoint import RECORD, save_checkpoint, save_with_routers
from moe_ext.router_ft.evaluate import losses_by_source, summary
from moe_ext.router_ft.finetune import FinetuneConfig, finetune_routers
from moe_ext.router_ft.formats import bits_per_weight
from moe_ext.router_ft.load import export_pt, load
from moe_ext.router_ft.matrices import find_matrices
from moe_ext.router_ft.objectives import NEED_TEACHER
from moe_ext.router_ft.plan import read_plan
from moe_ext.router_ft.quantize import Method, quantize_model

logger = logging.getLogger(__name__)

BATCH_SIZE = 8  # of what is measured
DEFAULT_FORMATS = "BF16,MXFP8,MXFP4,INT4,INT3"


def calibration_blocks(config: CalibrationConfig, model: PreTrainedModel, tokenizer) -> torch.Tensor:
    """Blocks [N, L] of the training split of the config's text."""
    return text_blocks(
        config.sources,
        "train",
        tokenizer,
        num_blocks=config.nsamples,
        block_size=block_length(config, context_of(model)),
        seed=config.seed,
    )


@dataclass(kw_only=True)
class AlphaOptions:
    model: str = field(default=SMALL_MOE, metadata={"help": MODEL_HELP})
    output: str = field(default="alpha.csv", metadata={"help": "File of the table."})
    estimate: Estimate = field(default="mid", metadata={"help": "Start of the tail of the eigenvalues."})


def run_alpha(options: AlphaOptions) -> str:
    """Write the alpha table of a model; one that is there is written again, and nothing else is overwritten."""
    check_writable(options.output)
    if Path(options.output).exists():
        read_alpha_csv(options.output)
    model, _ = load_moe(options.model)
    matrices = find_matrices(model)
    rows = alpha_table(model, tqdm(matrices, desc="matrices", unit=""), estimate=options.estimate)
    write_alpha_csv(rows, options.output)
    return f"alpha of {len(rows)} matrices: {options.output}"


@dataclass(kw_only=True)
class AllocateOptions:
    model: str = field(default=SMALL_MOE, metadata={"help": MODEL_HELP})
    alpha_csv: str = field(metadata={"help": "Table that the step alpha wrote."})
    output: str = field(default="plan.json", metadata={"help": "File of the plan."})
    budget_bits: float | None = field(
        default=None,
        metadata={"help": "Bits per weight that the plan may cost, scales included, in place of mxfp4_ratio."},
    )
    mxfp4_ratio: float | None = field(
        default=None, metadata={"help": "Part of the weights in MXFP4, the rest in MXFP8, in place of budget_bits."}
    )
    formats: str = field(default=DEFAULT_FORMATS, metadata={"help": "Formats that a budget may be spent on."})
    sensitivity: Sensitivity = field(
        default="lower_alpha", metadata={"help": "Order in which matrices get more bits; see docs/router_ft.md."}
    )
    dense_format: str = field(
        default="BF16",
        metadata={
            "help": "Format of attention, shared experts and dense MLPs; 'allocated' lets them compete with experts."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sensitivity random."})

    def __post_init__(self):
        if (self.budget_bits is None) == (self.mxfp4_ratio is None):
            raise ValueError("Give either budget_bits or mxfp4_ratio: what may the plan cost?")
        check_above(self, budget_bits=0)
        if self.mxfp4_ratio is not None and not 0 <= self.mxfp4_ratio <= 1:
            raise ValueError(f"mxfp4_ratio is {self.mxfp4_ratio}, but must lie between 0 and 1.")

    @property
    def budget(self) -> tuple[float, list[str]]:
        """Bits a weight, and the formats they may be spent on."""
        if self.budget_bits is not None:
            return self.budget_bits, split_names(self.formats)
        small, large = (bits_per_weight(name, 32) for name in ("MXFP4", "MXFP8"))
        return large - self.mxfp4_ratio * (large - small), ["MXFP8", "MXFP4"]


def run_allocate(options: AllocateOptions) -> str:
    """Write a plan."""
    settings = {**asdict(options), "alpha_sha256": _sha256(options.alpha_csv)}
    run = RunFolder.beside(options.output, "router_ft allocate", settings, option="--output")
    if run.is_done:
        return run.done
    alphas = read_alpha_csv(options.alpha_csv)
    model, _ = load_moe(options.model)
    budget_bits, formats = options.budget
    plan = allocate(
        model,
        find_matrices(model),
        alphas,
        budget_bits=budget_bits,
        formats=formats,
        sensitivity=options.sensitivity,
        dense_format=None if options.dense_format == "allocated" else options.dense_format,
        seed=options.seed,
    )
    plan = replace(plan, made_by={**asdict(options), **plan.made_by})
    with run:
        run.write_result(plan.to_dict())
    counts = ", ".join(f"{count} {name}" for name, count in sorted(plan.counts().items()))
    return (
        f"{counts}\n{plan.bits_per_weight:.4f} bits a quantised weight, scales included; "
        f"{plan.bits_per_weight_with_bf16:.4f} with the matrices in BF16: {options.output}"
    )


@dataclass(kw_only=True)
class QuantizeOptions(CalibrationConfig):
    model: str = field(default=SMALL_MOE, metadata={"help": MODEL_HELP})
    config: str = field(metadata={"help": "The plan, a file that the step allocate wrote."})
    save: str = field(metadata={"help": "Folder of the checkpoint."})
    method: Method = field(default="gptq", metadata={"help": "Quantisation by gptq, or round for round-to-nearest."})
    block_size: int = field(default=BLOCK_SIZE, metadata={"help": "Columns of a GPTQ block."})
    damp: float = field(default=DAMP, metadata={"help": "Damping of the Hessian, as a part of its mean diagonal."})
    device: str = field(default_factory=default_device, metadata={"help": "Device to compute on."})

    def __post_init__(self):
        super().__post_init__()
        check_above(self, damp=0, block_size=0)


def run_quantize(options: QuantizeOptions) -> str:
    """Write a quantised checkpoint."""
    settings = {**asdict(options), "plan_sha256": _sha256(options.config)}
    run = RunFolder.beside(options.save, "router_ft quantize", settings, free=("device",), option="--save")
    if run.is_done:
        return run.done
    plan = read_plan(options.config)
    model, tokenizer = load_moe(options.model)
    plan.check_model(find_matrices(model))
    blocks_NL = calibration_blocks(options, model, tokenizer) if options.method == "gptq" else None
    with run:
        quantized = quantize_model(
            model.to(options.device),
            plan,
            blocks_NL,
            method=options.method,
            block_size=options.block_size,
            damp=options.damp,
        )
        record = {"quantize": {"options": asdict(options), **quantized.to_dict()}}
        with run.whole_result() as folder:
            save_checkpoint(folder, model, tokenizer, plan, quantized.packed, record)
    tokens = quantized.tokens_per_expert().values()
    reached = f"; calibration tokens an expert: {min(tokens)} to {max(tokens)}" if tokens else ""
    return f"{plan.bits_per_weight:.4f} bits a quantised weight{reached}: {options.save}"


@dataclass(kw_only=True)
class FinetuneOptions(CalibrationConfig, FinetuneConfig):
    model: str = field(default=SMALL_MOE, metadata={"help": f"The full-precision model. {MODEL_HELP}"})
    checkpoint: str = field(metadata={"help": "Folder that the step quantize wrote."})
    save: str = field(metadata={"help": "Folder of the checkpoint with finetuned routers."})
    device: str = field(default_factory=default_device, metadata={"help": "Device to compute on."})

    def __post_init__(self):
        CalibrationConfig.__post_init__(self)
        FinetuneConfig.__post_init__(self)


def run_finetune(options: FinetuneOptions) -> str:
    """Write a checkpoint whose routers are finetuned; all else is that of the one it came from."""
    source = Path(options.checkpoint)
    if not source.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {source}. Write one with: quantize")
    settings = {**asdict(options), "weights": weights_of(source)}
    run = RunFolder.beside(options.save, "router_ft finetune", settings, free=("device",), option="--save")
    if run.is_done:
        return run.done
    loaded = load(options.checkpoint)
    blocks_NL = calibration_blocks(options, loaded.model, loaded.tokenizer)
    teacher = load_moe(options.model)[0].to(options.device) if options.objective in NEED_TEACHER else None
    with run:
        report = finetune_routers(
            loaded.model.to(options.device),
            blocks_NL,
            options,
            teacher=teacher,
            seed=options.seed,
            checkpoint=run.folder / "checkpoints",
        )
        record = {**loaded.record, "finetune": {"options": asdict(options), **asdict(report)}}
        with run.whole_result() as folder:
            save_with_routers(folder, source, loaded.model, loaded.plan, record)
    return (
        f"{report.trained} router weights in {report.steps} steps; {options.objective} on text that was not trained "
        f"on {report.loss_before:.5f} -> {report.loss_after:.5f}: {options.save}"
    )


@dataclass(kw_only=True)
class EvaluateOptions:
    checkpoint: str = field(
        metadata={"help": f"A checkpoint of this tool, or a model in full precision: {MODEL_HELP}"}
    )
    output: str = field(default="evaluation.json", metadata={"help": "File of the results."})
    dataset: str = field(default="prose,code,math", metadata={"help": "Held-out text, comma separated."})
    split: Part = field(default="test", metadata={"help": "Split of the text."})
    seqlen: int | None = field(default=None, metadata={"help": "Tokens in a block; by default as in calibration."})
    max_blocks: int | None = field(
        default=None, metadata={"help": "Blocks of each source to measure on, the first ones; by default all."}
    )
    tasks: str = field(default="", metadata={"help": "Tasks of lm-eval, comma separated."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with task files of your own."})
    limit: int | None = field(default=None, metadata={"help": "Documents of each task; by default all."})
    device: str = field(default_factory=default_device, metadata={"help": "Device to compute on."})

    def __post_init__(self):
        check_at_least(self, max_blocks=1, limit=1)


def run_evaluate(options: EvaluateOptions) -> str:
    """Write perplexities and task results."""
    tasks = split_names(options.tasks)
    manager = find_tasks(tasks, include_path=options.include_path) if tasks else None
    settings = {**asdict(options), "weights": weights_of(options.checkpoint)}
    run = RunFolder.beside(
        options.output, "router_ft evaluate", settings, free=("device", "output"), option="--output"
    )
    if run.is_done:
        return run.done
    if is_checkpoint(options.checkpoint):
        loaded = load(options.checkpoint)
        model, tokenizer = loaded.model, loaded.tokenizer
        if tokenizer is None:
            raise ValueError(f"{options.checkpoint} holds no tokenizer. Give the checkpoint folder it was made from.")
    else:
        model, tokenizer = load_moe(options.checkpoint)
    length = block_length(CalibrationConfig(seqlen=options.seqlen), context_of(model))
    held_out = {
        source: read_blocks(source, options.split, tokenizer, block_size=length, max_blocks=options.max_blocks)
        for source in split_names(options.dataset)
    }
    results: dict[str, Any] = summary(losses_by_source(model.to(options.device), held_out))
    if manager is not None:
        results["tasks"] = run_tasks(model, tokenizer, tasks, manager, limit=options.limit, batch_size=BATCH_SIZE)
    with run:
        run.write_result(results)
    perplexities = ", ".join(f"{source} {value:.3f}" for source, value in results["perplexity"].items())
    scores = "".join(
        f"\n{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items() if math.isfinite(value))
        for task, numbers in results.get("tasks", {}).items()
    )
    return f"perplexity {perplexities}{scores}: {options.output}"


def _sha256(path: str) -> str | None:
    return file_sha256(Path(path)) if Path(path).is_file() else None  # whoever reads it says that it is not there


def is_checkpoint(path: str) -> bool:
    """Whether a path is a checkpoint of this tool, rather than a model."""
    return Path(path).is_file() or (Path(path) / RECORD).is_file()


@dataclass(kw_only=True)
class ExportOptions:
    checkpoint: str = field(metadata={"help": "A checkpoint folder of this tool."})
    save: str = field(metadata={"help": "File to write."})
    format: str = field(
        default="pt", metadata={"help": "Format; pt: model_state_dict, config, plan, router_finetuning."}
    )

    def __post_init__(self):
        if self.format != "pt":
            raise ValueError(f"format is '{self.format}', but only 'pt' is exported; a folder is the other layout.")


def run_export(options: ExportOptions) -> str:
    """Write the older `.pt` layout of a checkpoint."""
    check_writable(options.save)
    check_free(Path(options.save))
    export_pt(load(options.checkpoint), options.save)
    return f"exported: {options.save}"
