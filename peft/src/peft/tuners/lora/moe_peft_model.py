# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What `PeftModel` asks of routing: when it generates, when it saves, and whether its adapters can be routed at all."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from .moe_mixin import GenerationWeights, RoutedLoraMixin


INPUT_NAMES = ("inputs", "input_ids", "inputs_embeds", "input_features")


def routing_weights_for_generate(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Check `routing_weights` passed to `generate` and let them follow beams and returned sequences.

    Raises:
        ValueError: per-token weights, or a batch other than that of the inputs.
    """
    weights = kwargs.get("routing_weights")
    if weights is None:
        return kwargs
    check_supports_routing(model)
    if isinstance(weights, torch.Tensor) and weights.dim() == 3:
        raise ValueError(
            f"generate got per-token routing_weights of shape {tuple(weights.shape)}, but the tokens it generates "
            "would have none. Pass [num_experts] or [batch, num_experts], or attach a router."
        )
    inputs = args[0] if args else next((kwargs[k] for k in INPUT_NAMES if kwargs.get(k) is not None), None)
    if isinstance(weights, torch.Tensor) and weights.dim() == 2 and isinstance(inputs, torch.Tensor):
        if len(weights) != len(inputs):
            raise ValueError(
                f"routing_weights has {len(weights)} rows but the batch has {len(inputs)} sequences; pass one row for "
                "each sequence (they are repeated over beams)."
            )
    return {**kwargs, "routing_weights": GenerationWeights(weights)}


def check_supports_routing(model: nn.Module) -> None:
    """Raise a `ValueError` if the adapters of a `PeftModel` cannot take `routing_weights`."""
    if not isinstance(getattr(model, "base_model", None), RoutedLoraMixin):
        kind = getattr(model, "peft_type", None) or type(model).__name__
        raise ValueError(  # noqa: TRY004 as the other arguments that a PEFT method does not support
            f"routing_weights needs a PeftModel with LoRA adapters, but this model's adapters are of type {kind}. "
            "Remove the argument or use LoRA."
        )


def without_experts_of_mixtures(peft_config: dict[str, Any]) -> list[str]:
    """The adapters that `save_pretrained` writes: a mixture holds its experts, so they get no folders of their own."""
    owned = {name for config in peft_config.values() for name in getattr(config, "expert_names", ())}
    return [name for name in peft_config if name not in owned]


def save_router_of_adapters(
    model: nn.Module, save_directory: str, state_dict: Optional[dict[str, torch.Tensor]]
) -> None:
    """Write a router that was attached to adapters next to them; a mixture holds its router in its own file."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, RoutedLoraMixin) or tuner._router_of() is None:
        return
    if not any(hasattr(config, "expert_names") for config in model.peft_config.values()):
        tuner.save_router(save_directory, state_dict)
