"""The options of the three commands."""

from dataclasses import dataclass, field
from typing import Literal

from moe_common.models.base_model import Quantization
from moe_common.runs.options import check_at_least
from moe_ext.multi_token.decoding.generation import Mode
from moe_ext.multi_token.model.heads import HeadKind
from moe_ext.multi_token.model.mixture import MultiTokenConfig


@dataclass(kw_only=True)
class TrainOptions:
    """Of `train`."""

    data: str = field(
        metadata={
            "help": 'JSONL of {"question": ..., "response": ...}, text files, prose, code, math, hub data; by commas.'
        }
    )
    out: str = field(metadata={"help": "Folder for s1, s2 and ppo_final."})
    model: str = field(default="base", metadata={"help": "Backbone: base, smollm2-135m, a folder, a hub id."})
    heads: int = field(default=3, metadata={"help": "Token heads."})
    k_max: int = field(default=2, metadata={"help": "Heads on at a position, on average, at the end of stage 2."})
    stage1_epochs: float = field(default=2.0, metadata={"help": "Passes over the rows in stage 1."})
    stage2_epochs: float = field(default=2.0, metadata={"help": "Passes over the rows in stage 2."})
    ppo_steps: int = field(default=0, metadata={"help": "Steps of stage 3; 0 leaves it out."})
    batch: int = field(default=3, metadata={"help": "Rows of a step on each device."})
    lr: float = field(default=2e-4, metadata={"help": "Peak learning rate of stages 1 and 2."})
    ppo_lr: float = field(default=1e-5, metadata={"help": "Learning rate of stage 3."})
    quant: Quantization = field(default="none", metadata={"help": "Bits of the frozen backbone's linear layers."})
    self_distill: bool = field(
        default=False, metadata={"help": "Train on the backbone's own greedy continuations of the data."}
    )
    length: int = field(default=256, metadata={"help": "Tokens of a row; longer pairs are cut."})
    prompt_length: int = field(
        default=64,
        metadata={"help": "Tokens of a row that are given in self_distill and stage 3, at most; the rest is written."},
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "Rows to train on, chosen at random; by default all."}
    )
    head_width: int = field(default=4, metadata={"help": "Inner layer of a head, in multiples of the hidden size."})
    draft_vocabulary: int | None = field(
        default=None, metadata={"help": "Tokens that heads choose among, the most frequent; by default all."}
    )
    max_copy: int = field(default=16, metadata={"help": "Tokens that can be copied from the text in one draft."})
    teacher_forcing_end: float = field(
        default=0.0,
        metadata={"help": "Teacher forcing at the end of stage 2: 0 suits fast, 1 lossless."},
    )
    kind: HeadKind = field(
        default="sequential", metadata={"help": "Heads that read drafted tokens, or Medusa's that do not."}
    )
    prefix_attention: bool = field(
        default=True, metadata={"help": "A layer of attention over the text in front of sequential heads."}
    )
    w_bce: float = field(default=1.0, metadata={"help": "Weight of the router's binary cross-entropy."})
    w_lb: float = field(default=0.2, metadata={"help": "Weight of its load balance."})
    w_ent: float = field(default=0.01, metadata={"help": "Weight of its entropy."})
    w_budget: float = field(default=0.05, metadata={"help": "Weight of what its gates exceed the budget by."})
    save_steps: int = field(default=5000, metadata={"help": "Steps between two checkpoints."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between two lines of the log."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 autocast."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, choice and order of rows."})

    def __post_init__(self) -> None:
        check_at_least(
            self, ppo_steps=0, batch=1, length=8, prompt_length=2, max_rows=1, save_steps=1, logging_steps=1
        )
        for name in ("lr", "ppo_lr", "stage1_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive.")
        if self.stage2_epochs < 0:
            raise ValueError(f"stage2_epochs is {self.stage2_epochs}, but must not be negative.")
        if self.ppo_steps > 0 and self.stage2_epochs == 0:
            raise ValueError(
                f"ppo_steps is {self.ppo_steps} and stage2_epochs is 0, but PPO starts from the router of stage 2. "
                "Give stage2_epochs, or leave ppo_steps out."
            )
        if (self.self_distill or self.ppo_steps > 0) and self.prompt_length >= self.length:
            raise ValueError(
                f"prompt_length is {self.prompt_length}, but must be below length ({self.length}): what lies between "
                "is written, by the backbone in self_distill and as the answer in stage 3."
            )
        self.model_config()

    def model_config(self) -> MultiTokenConfig:
        """What is built beside the backbone."""
        return MultiTokenConfig(
            num_heads=self.heads,
            k_max=self.k_max,
            head_width=self.head_width,
            draft_vocabulary=self.draft_vocabulary,
            max_copy=self.max_copy,
            teacher_forcing_end=self.teacher_forcing_end,
            kind=self.kind,
            prefix_attention=self.prefix_attention,
            w_bce=self.w_bce,
            w_lb=self.w_lb,
            w_ent=self.w_ent,
            w_budget=self.w_budget,
        )


@dataclass(kw_only=True)
class InferOptions:
    """Of `infer`."""

    ckpt: str = field(metadata={"help": "Folder that training wrote, as out/s2."})
    prompt: str = field(metadata={"help": "Text to continue."})
    max_tokens: int = field(default=100, metadata={"help": "Most new tokens."})
    quant: Quantization = field(default="none", metadata={"help": "Bits of the frozen backbone's linear layers."})
    mode: Mode = field(
        default="lossless", metadata={"help": "Decoding; lossless: the backbone's own output; fast: drafts unread."}
    )
    copy: bool = field(default=True, metadata={"help": "In lossless mode also draft by copying from the text."})
    model: str | None = field(default=None, metadata={"help": "Another name or place of the same backbone."})
    as_question: bool | None = field(
        default=None,
        metadata={"help": "Put the prompt as a question; by default where the training data were questions."},
    )
    stop: list[str] = field(default_factory=list, metadata={"help": "Texts that end the output."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of sampling; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})

    def __post_init__(self) -> None:
        check_at_least(self, max_tokens=1, temperature=0)
        if not self.prompt:
            raise ValueError("prompt is empty. Give at least one character to continue.")


@dataclass(kw_only=True)
class BenchOptions:
    """Of `bench`."""

    ckpt: str = field(metadata={"help": "Folder that training wrote, as out/s2."})
    against: str | None = field(
        default=None, metadata={"help": "Second checkpoint with independent heads, to be measured beside it."}
    )
    data: str | None = field(
        default=None, metadata={"help": "Held-out text; by default what was held out of training."}
    )
    split: Literal["test", "validation", "all"] = field(default="test", metadata={"help": "Part of it."})
    prompts: int = field(default=24, metadata={"help": "Prompts, the sources taking turns."})
    prompt_length: int = field(default=64, metadata={"help": "Most tokens of a prompt."})
    max_tokens: int = field(default=128, metadata={"help": "Most new tokens of each."})
    rounds: int = field(
        default=2, metadata={"help": "Rounds in which each way continues each prompt; the median counts."}
    )
    quant: Quantization = field(default="none", metadata={"help": "Bits of the frozen backbone's linear layers."})
    model: str | None = field(default=None, metadata={"help": "Another name or place of the same backbone."})
    out: str | None = field(default=None, metadata={"help": "JSON file for the figures; by default beside ckpt."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default as torch chooses."})

    def __post_init__(self) -> None:
        check_at_least(self, prompts=1, prompt_length=2, max_tokens=2, rounds=1, threads=1)
