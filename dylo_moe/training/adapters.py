"""The two adapters that are compared: a mixture of LoRA experts with a router, and one LoRA of the same size."""

from dataclasses import dataclass, field
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dylo_moe.model import DyLoRA_MoE
from moe_common.runs.options import check_at_least


@dataclass(kw_only=True)
class MixtureConfig:
    """What `train.py` lets a user choose of the mixture; the rest are DyLoRA_MoE's defaults."""

    num_experts: int = field(default=4, metadata={"help": "LoRA experts of the mixture."})
    lora_r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: int = field(default=16, metadata={"help": "Each expert's update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input in training."})
    top_k: int | None = field(default=2, metadata={"help": "Experts kept for each token; 0 keeps all."})
    dense_training: bool = field(
        default=False, metadata={"help": "Weigh all experts while training; keep top_k in use only."}
    )
    router_scope: Literal["layer", "block", "model", "two_pass"] = field(
        default="block", metadata={"help": "Whose input a gate looks at."}
    )
    balance_coefficient: float = field(default=0.001, metadata={"help": "Weight of the load-balancing loss."})

    def __post_init__(self) -> None:
        check_at_least(self, num_experts=1, lora_r=1, balance_coefficient=0)
        if self.top_k is not None and not 0 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but must lie between 0 (all) and num_experts ({self.num_experts}). Lower "
                "top_k or add experts."
            )
        if self.dense_training and not self.top_k:
            raise ValueError("dense_training is set, but top_k keeps all experts anyway. Set top_k, or drop it.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, but must lie in [0, 1).")


def add_mixture(base: nn.Module, config: MixtureConfig, *, base_name: str | None = None) -> DyLoRA_MoE:
    """Put the experts and their router on a base model, in all its linear layers but the output.

    Args:
        base: a causal language model of transformers; changed in place.
        config: the user's choices.
        base_name: by which a saved mixture finds its base again; by default the base's own.
    """
    return DyLoRA_MoE(
        base,
        config.num_experts,
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
        balance_coefficient=config.balance_coefficient,
        top_k=config.top_k or config.num_experts,
        dense_training=config.dense_training or not config.top_k,
        router_scope=config.router_scope,
        target_modules="all-linear",
        base_name=base_name,
    )


def add_lora_of_size(base: nn.Module, num_parameters: int, config: MixtureConfig) -> PeftModel:
    """Put one LoRA on a base model, of the rank whose number of trained parameters comes closest.

    Args:
        base: a fresh base model; changed in place.
        num_parameters: trained parameters of the mixture it is compared with, router included.
        config: the mixture; the LoRA has its targets, its dropout and its alpha / r.
    """
    of_rank_one = sum(
        sum((module.in_features, module.out_features) if isinstance(module, nn.Linear) else module.weight.shape)
        for module in base.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not base.get_output_embeddings()
    )
    rank = max(1, round(num_parameters / of_rank_one))
    return get_peft_model(
        base,
        LoraConfig(
            r=rank,
            lora_alpha=rank * config.lora_alpha / config.lora_r,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def num_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
