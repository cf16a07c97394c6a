"""The ways that are compared. Each builds one runnable model over a base model that all of them share.

Every adapter sits on all linear layers of the decoder blocks and has random weights: what a trained one holds changes
no time. Dropout is zero. In a training step every adapter is trained.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, MoELoraConfig, XLoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.models import SEED, share
from benchmarks.passes import SeparatePasses
from benchmarks.textbook import with_expert_loops


class Run(Protocol):
    """What is timed."""

    def logits(self, input_ids: Tensor) -> Tensor: ...
    def loss(self, input_ids: Tensor) -> Tensor: ...
    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor: ...
    def parameters(self) -> list[nn.Parameter]: ...


class OneModel:
    """A model that does it all in its own forward.

    Args:
        model: a causal LM, PEFT's or transformers' own.
        uses_cache: whether `generate` keeps keys and values.
    """

    def __init__(self, model: nn.Module, *, uses_cache: bool = True) -> None:
        self.model = model
        self.uses_cache = uses_cache

    def logits(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits

    def loss(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss

    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        exactly = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        with_mask = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return self.model.generate(**with_mask, **exactly, do_sample=False, use_cache=self.uses_cache)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Way:
    """One of the ways.

    Args:
        name: short and unique, e.g. "routed-8-top2".
        label: for a table, e.g. "routed, top-2 of 8".
        make: builds it over a copy of the base; the flag is `autocast_adapter_dtype` of PEFT.
        limit: name of the plain LoRA that does the same matrix products.
        loop: name of the loop over experts that gives the same output.
        autocasts: whether it runs under autocast.
    """

    name: str
    label: str
    make: Callable[[PreTrainedModel, bool], Run]
    limit: str | None = None
    loop: str | None = None
    autocasts: bool = True

    def build(self, base: PreTrainedModel, *, training: bool) -> Run:
        """The way over `base`, whose parameters are shared, with the same random adapters on every call."""
        torch.manual_seed(SEED)
        run = self.make(share(base), training)
        run.model.train(training)
        return run


def base_alone() -> Way:
    return Way("base", "base model", lambda base, float32_adapters: OneModel(base))


def lora(rank: int) -> Way:
    def make(base: PreTrainedModel, float32_adapters: bool) -> Run:
        config = LoraConfig(**_lora_arguments(rank))
        return OneModel(get_peft_model(base, config, autocast_adapter_dtype=float32_adapters))

    return Way(f"lora-r{rank}", f"one LoRA of rank {rank}", make)


def routed(num_experts: int, top_k: int | None = None, *, rank: int, scope: str = "layer") -> Way:
    def make(base: PreTrainedModel, float32_adapters: bool) -> Run:
        config = MoELoraConfig(
            num_experts=num_experts,
            top_k=top_k,
            router_scope=scope,
            router_block=0 if scope == "model" else None,
            **_lora_arguments(rank),
        )
        return OneModel(get_peft_model(base, config, autocast_adapter_dtype=float32_adapters))

    kind, label = _kind(num_experts, top_k)
    named = "" if scope == "layer" else f"-{scope}"
    told = "" if scope == "layer" else f", scope {scope}"
    loop_name = f"loop-{kind}" if scope == "layer" else None
    return Way(f"routed-{kind}{named}", f"routed, {label}{told}", make, f"lora-r{num_experts * rank}", loop_name)


def loop(num_experts: int, top_k: int | None = None, *, rank: int) -> Way:
    def make(base: PreTrainedModel, float32_adapters: bool) -> Run:
        mixture = routed(num_experts, top_k, rank=rank).make(base, float32_adapters)
        return OneModel(with_expert_loops(mixture.model, top_k=top_k))

    kind, label = _kind(num_experts, top_k)
    return Way(f"loop-{kind}", f"loop over experts, {label}", make)


def passes(num_experts: int, *, rank: int) -> Way:
    def make(base: PreTrainedModel, float32_adapters: bool) -> Run:
        config = LoraConfig(**_lora_arguments(rank))
        return SeparatePasses(base, config, num_experts=num_experts, autocast_adapter_dtype=float32_adapters)

    return Way(f"passes-{num_experts}", f"{num_experts} separate passes", make)


def xlora(num_experts: int, *, rank: int, trains_adapters: bool = True) -> Way:
    """X-LoRA (Buehler & Buehler 2024, arXiv:2402.07148) as PEFT has it, with scalings for each layer.

    Like the others it trains its adapters here; PEFT's default trains the classifier alone.
    """

    def make(base: PreTrainedModel, float32_adapters: bool) -> Run:
        base.config.use_cache = False  # X-LoRA refuses a model that would cache
        with tempfile.TemporaryDirectory() as folder:
            config = XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=base.config.get_text_config().hidden_size,
                adapters=_saved_adapters(base, num_experts, rank, Path(folder)),
                layerwise_scalings=True,
                use_trainable_adapters=trains_adapters,
            )
            model = get_peft_model(base, config, autocast_adapter_dtype=float32_adapters)
        return OneModel(model, uses_cache=False)

    named, told = ("", "") if trains_adapters else ("-frozen", ", adapters frozen")
    return Way(f"xlora-{num_experts}{named}", f"X-LoRA, {num_experts} adapters{told}", make)


def arrow(num_experts: int, *, rank: int) -> Way:
    """Arrow (Ostapenko et al. 2024, arXiv:2405.11157) as PEFT has it, top-2. Its router is fixed; adapters train."""

    def make(base: PreTrainedModel, float32_adapters: bool) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            folders = list(_saved_adapters(base, num_experts, rank, Path(folder)).values())
            cast = {"autocast_adapter_dtype": float32_adapters}
            model = create_arrow_model(base, folders, ArrowConfig(top_k=min(2, num_experts)), **cast)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".task_" in name)
        return OneModel(model)

    # PEFT 0.21.2: under autocast its scores scatter values of one dtype into a tensor of another, which raises.
    return Way(f"arrow-{num_experts}", f"Arrow, top-2 of {num_experts}", make, autocasts=False)


def all_ways(rank: int) -> list[Way]:
    """The ways of the comparison, each next to those it is compared with, so that they run close in time."""
    ways = [base_alone(), lora(rank)]
    for num_experts in (2, 4, 8, 16):
        ways += [
            lora(num_experts * rank),
            routed(num_experts, rank=rank),
            routed(num_experts, 2, rank=rank),
            loop(num_experts, rank=rank),
            loop(num_experts, 2, rank=rank),
        ]
        if num_experts <= 8:
            ways.append(passes(num_experts, rank=rank))
        if num_experts in (4, 8):
            ways += [xlora(num_experts, rank=rank), arrow(num_experts, rank=rank)]
    return ways


def _kind(num_experts: int, top_k: int | None) -> tuple[str, str]:
    if top_k is None:
        return f"{num_experts}-dense", f"all of {num_experts}"
    return f"{num_experts}-top{top_k}", f"top-{top_k} of {num_experts}"


def _lora_arguments(rank: int) -> dict:
    targets = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return {"r": rank, "lora_alpha": rank, "init_lora_weights": False, **targets}


def _saved_adapters(base: PreTrainedModel, num_experts: int, rank: int, folder: Path) -> dict[str, str]:
    """Random adapters for the base model, saved as PEFT wants to load them; name -> folder."""
    saved = {}
    for expert in range(num_experts):
        name = str(expert)  # X-LoRA loads adapters under their number, whatever their name, and looks for the name
        get_peft_model(share(base), LoraConfig(**_lora_arguments(rank)), adapter_name=name).save_pretrained(folder)
        saved[name] = str(folder / name)
    return saved
