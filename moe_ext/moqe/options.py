"""The options of the commands."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from moe_common.runs.options import check_above, check_at_least
from moe_common.text.documents import Part
from moe_ext.moqe.experts.expert import Dtype, GgufBackend
from moe_ext.moqe.mixture.router import Mode, RouterConfig

SCHEME_HELP = "Schemes of the experts: int2 ... int8, int2@SOURCE, nf4, bnb8, q8_0, q4_1, f16, full; by commas."
EXPERT_HELP = "folders, GGUF files, base, smollm2-135m, smollm2-135m.gguf, hub ids."


@dataclass(kw_only=True)
class TextOptions:
    """What text is read, and how it is cut."""

    data_dir: str = field(
        metadata={
            "help": "Text: folders or files (.parquet, .jsonl, text), prose, code, math, hub datasets, by commas."
        }
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    row_length: int = field(default=256, metadata={"help": "Most tokens of a row; longer documents are cut."})
    rows_per_document: int = field(default=4, metadata={"help": "Most rows of a document."})
    batch_size: int = field(default=8, metadata={"help": "Rows at once."})

    def __post_init__(self) -> None:
        check_at_least(self, row_length=4, rows_per_document=1, batch_size=1)


@dataclass(kw_only=True)
class ComputeOptions:
    """How experts are computed."""

    dtype: Dtype = field(
        default="auto",
        metadata={"help": "Precision of what is not packed; auto is float32 on a CPU, bfloat16 on a GPU."},
    )
    gguf_backend: GgufBackend = field(default="transformers", metadata={"help": "Who computes GGUF files."})


@dataclass(kw_only=True)
class TrainingOptions(TextOptions, ComputeOptions, RouterConfig):
    """How a router is trained."""

    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of an optimiser step."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak rate; behind a warm-up it falls by a cosine."})
    epochs: float = field(default=1.0, metadata={"help": "Passes over the rows."})
    curriculum: str | None = field(
        default=None, metadata={"help": "Smaller set of text, as data_dir, that training starts with."}
    )
    curriculum_epochs: float = field(default=1.0, metadata={"help": "Passes over the curriculum."})
    max_tokens: int | None = field(default=200_000, metadata={"help": "Most training tokens of each source."})
    validation_tokens: int = field(default=10_000, metadata={"help": "Most validation tokens of each source."})
    warmup_fraction: float = field(default=0.1, metadata={"help": "Part of the optimiser steps with a rising rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay of the router."})
    optimizer: Literal["adamw", "adamw_8bit"] = field(
        default="adamw", metadata={"help": "Optimiser; adamw_8bit is that of bitsandbytes."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute the router to save memory."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the experts' cached outputs; by default in save_dir."}
    )
    cache_gb: float = field(
        default=4.0,
        metadata={"help": "GiB of disk for the experts' cached outputs, at most; what is over is recomputed."},
    )
    save_steps: int = field(default=50, metadata={"help": "Optimiser steps between two checkpoints."})
    logging_steps: int = field(default=10, metadata={"help": "Optimiser steps between two lines of the log."})
    seed: int = field(default=0, metadata={"help": "Seed of the router's weights, of the order and of the noise."})

    def __post_init__(self) -> None:
        TextOptions.__post_init__(self)
        RouterConfig.__post_init__(self)
        check_at_least(self, gradient_accumulation_steps=1, max_tokens=1, validation_tokens=1, cache_gb=0)
        check_at_least(self, save_steps=1, logging_steps=1, weight_decay=0, curriculum_epochs=0, seed=0)
        check_above(self, learning_rate=0, epochs=0)
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction is {self.warmup_fraction}, but must lie between 0 and 1.")

    def router_config(self) -> RouterConfig:
        """The part that describes the router."""
        return RouterConfig(**{part.name: getattr(self, part.name) for part in fields(RouterConfig)})


@dataclass(kw_only=True)
class TrainOptions(TrainingOptions):
    """Of `--train`."""

    expert_paths: list[str] = field(metadata={"help": f"Two at least: {EXPERT_HELP}"})
    save_dir: str = field(metadata={"help": "Folder for checkpoints, cached outputs and the mixture."})
    checkpoint_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from; by default the newest in save_dir."}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Begin anew, whatever save_dir holds."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.expert_paths) < 2:
            raise ValueError(
                f"expert_paths names {len(self.expert_paths)} expert, but a mixture needs at least two. Make more of "
                "them with: quantize"
            )
        if self.checkpoint_path and self.from_scratch:
            raise ValueError("checkpoint_path and from_scratch are both given. Leave one of them out.")
        self.router_config().check_experts(len(self.expert_paths))


@dataclass(kw_only=True)
class EvalOptions(TextOptions, ComputeOptions):
    """Of `--eval`."""

    checkpoint_path: list[str] = field(
        metadata={"help": "Folders of trained mixtures of the same experts: a save_dir of --train."}
    )
    expert_paths: list[str] | None = field(default=None, metadata={"help": "The experts, where they have moved."})
    reference: str | None = field(default=None, metadata={"help": "The model in full precision, to compare with."})
    split: Part = field(default="test", metadata={"help": "Split of the text."})
    max_tokens: int | None = field(default=30_000, metadata={"help": "Most tokens of each source."})
    resamples: int = field(default=2000, metadata={"help": "Resamples of the bootstrap over documents."})
    speed_rounds: int = field(default=3, metadata={"help": "Rounds in which each way is timed, in turns."})
    output: str | None = field(default=None, metadata={"help": "Markdown file of the table; JSON goes beside it."})

    def __post_init__(self) -> None:
        TextOptions.__post_init__(self)
        check_at_least(self, max_tokens=1, resamples=1, speed_rounds=0)
        if self.output and Path(self.output).suffix == ".json":
            raise ValueError(f"output is {self.output}, but must name a Markdown file; the JSON goes beside it.")


@dataclass(kw_only=True)
class RoundingOptions:
    """How a model's weights are rounded."""

    model: str = field(default="base", metadata={"help": "Model to quantise: base, smollm2-135m, a folder, a hub id."})
    group_size: int = field(default=64, metadata={"help": "Weights that share a scale, in schemes of int."})
    calibration_blocks: int = field(default=96, metadata={"help": "Blocks of calibration text for int2@SOURCE."})
    calibration_length: int = field(default=256, metadata={"help": "Tokens of a block."})

    def __post_init__(self) -> None:
        check_at_least(self, group_size=1, calibration_blocks=1, calibration_length=2)


@dataclass(kw_only=True)
class QuantizeOptions(RoundingOptions):
    """Of `quantize`."""

    schemes: str = field(metadata={"help": SCHEME_HELP})
    output: str = field(metadata={"help": "Folder for the experts, each in its own folder or file."})
    dtype: Dtype = field(default="auto", metadata={"help": "That the calibrated model is computed in."})


@dataclass(kw_only=True)
class RunOptions(TrainingOptions, RoundingOptions):
    """Of `run`."""

    sets: list[str] = field(
        metadata={"help": "Sets of experts, each the schemes of `quantize` and paths of experts, by commas."}
    )
    output: str = field(metadata={"help": "Folder for experts, mixtures and tables."})
    modes: list[str] = field(
        default_factory=lambda: list(get_args(Mode)), metadata={"help": "Routers to train for each set."}
    )
    sequence_epochs: float = field(
        default=10.0, metadata={"help": "Passes in mode sequence, where a pass costs next to nothing."}
    )
    reference: str | None = field(default=None, metadata={"help": "Full precision in the tables; by default model."})
    test_tokens: int | None = field(default=30_000, metadata={"help": "Most test tokens of each source."})
    resamples: int = field(default=2000, metadata={"help": "Resamples of the bootstrap over documents."})
    speed_rounds: int = field(default=3, metadata={"help": "Rounds in which each way is timed, in turns."})

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        RoundingOptions.__post_init__(self)
        check_at_least(self, test_tokens=1, resamples=1, speed_rounds=0)
        if unknown := sorted(set(self.modes) - set(get_args(Mode))):
            raise ValueError(f"modes names '{unknown[0]}', but must be of {', '.join(get_args(Mode))}.")


@dataclass(kw_only=True)
class MemoryOptions:
    """Of `memory`."""

    expert: str = field(metadata={"help": "A folder, a GGUF file, base, smollm2-135m, a hub id."})
    dtype: Dtype = field(default="auto", metadata={"help": "Precision of what is not packed."})
    gguf_backend: GgufBackend = field(default="transformers", metadata={"help": "Who computes a GGUF file."})
