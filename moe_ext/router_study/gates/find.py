"""The gates of a model, whatever kind of mixture it is."""

from collections.abc import Sequence

from torch import nn

from moe_ext.router_study.gates.base import Gates
from moe_ext.router_study.gates.fused import FusedGates
from moe_ext.router_study.gates.lora import LoraGates, router_of


def find_gates(model: nn.Module, layers: Sequence[int] | None = None) -> Gates:
    """The gates of a mixture of transformers or of a routed LoRA mixture.

    Args:
        model: a transformers model, or a PEFT model with a router.
        layers: study these gates alone, by number from 0; None takes all.

    Raises:
        ValueError: no router was found, or there is no such layer.
    """
    router = router_of(model)
    if router is not None:
        return LoraGates(model, router, layers)
    return FusedGates(model, layers)
