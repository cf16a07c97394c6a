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
"""Fixing the weights of a mixture: with one weight for each expert, the mixture is a single LoRA adapter.

    sum_e w_e s_e B_e A_e = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1; A_2; ...]

The sum is exact by concatenation; its rank is the sum of the ranks of the experts whose weight is not zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn

from .config import LoraConfig
from .moe_adapter_names import refuse_unusable_names
from .moe_losses import mean_weights


if TYPE_CHECKING:
    from .model import LoraModel


def freeze_routing(
    model: LoraModel, weights: Optional[Sequence[float]] = None, *, adapter_name: str = "frozen", **inputs: Any
) -> str:
    """Add a plain LoRA adapter that does what the mixture does with fixed weights.

    Args:
        model: the model; its experts must be active.
        weights: one weight for each expert, the same in every layer; columns as in the router. If left out, each
            layer gets the mean weight its router gives the real tokens of `inputs`.
        adapter_name: name of the new adapter. It is not activated: `set_adapter` runs it, `export_expert` writes it
            as a plain LoRA, and once it is active the model can be merged.
        inputs: a prompt or a batch of a task, e.g. `input_ids` and `attention_mask`.

    Returns:
        The adapter's name.

    Raises:
        ValueError: neither weights nor inputs (or both) are given, the name is taken or unusable, or all weights are
            zero.
    """
    if (weights is None) == (not inputs):
        raise ValueError("Pass either weights (one for each expert) or the inputs of a prompt, e.g. input_ids.")
    if isinstance(weights, str):
        raise ValueError(  # noqa: TRY004 as for the other wrong values
            "weights is a text. Pass one number for each expert, or a prompt by name: "
            "freeze_routing(**tokenizer(text, return_tensors='pt'))."
        )
    refuse_unusable_names([adapter_name])
    if adapter_name in model.peft_config:
        raise ValueError(f"There is already an adapter '{adapter_name}'. Choose another adapter_name.")
    router = model._router_of()
    if router is None and weights is None:
        raise ValueError("Without a router there are no weights to take from a prompt. Pass weights.")
    experts = router.expert_names if router is not None else model._active_experts()
    layers = model._layers_with(experts)
    if weights is not None:
        fixed = torch.as_tensor(weights, dtype=torch.float64)
        if fixed.shape != (len(experts),):
            raise ValueError(
                f"weights must hold one number for each of the experts {experts}, got {list(fixed.shape)}."
            )
        by_layer = dict.fromkeys(layers, fixed)
    else:
        by_layer = _mean_weights(model, layers, inputs)

    factors = {}
    for name, layer in layers.items():
        joined = _join(layer, experts, by_layer[name])
        if joined is not None:
            factors[name] = joined
    if not factors:
        raise ValueError(f"All weights of the experts {experts} are zero: nothing is left to freeze.")
    _add_adapter(model, adapter_name, factors)
    return adapter_name


@torch.no_grad()
def _mean_weights(model: LoraModel, layers: dict[str, nn.Module], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    decided = set()

    def note(layer: nn.Module, args: tuple) -> None:
        if layer.routing_port.is_decided:
            decided.add(layer.routing_port.layer_name)

    handles = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    was_training = model.training
    model.eval()
    try:
        model(**inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    means = {site: mean_weights(vector) for site, vector in model._routing_context().statistics.items()}
    if not means:
        raise ValueError("The router did not run on the inputs. Activate its experts, and enable the adapters.")
    unrouted = torch.zeros(len(model._router_of().expert_names))
    return {name: means[layer.routing_port.site] if name in decided else unrouted for name, layer in layers.items()}


@torch.no_grad()
def _join(layer: nn.Module, experts: list[str], weights: torch.Tensor):
    """The joined factors `(A, B, bias)` of a layer in its adapters' own shapes, or None if all weights are zero."""
    embedding = len(layer.lora_embedding_A) > 0
    held = layer.lora_embedding_A if embedding else layer.lora_A
    pairs = [(name, w) for name, w in zip(experts, weights.tolist()) if name in held and w != 0.0]
    if not pairs:
        return None
    if embedding:
        A = torch.cat([layer.lora_embedding_A[name] for name, _ in pairs], dim=0)
        return (
            A,
            torch.cat([layer.lora_embedding_B[name] * (w * layer.scaling[name]) for name, w in pairs], dim=1),
            None,
        )
    groups = getattr(layer.get_base_layer(), "groups", 1)
    A = [layer.lora_A[name].weight.unflatten(0, (groups, -1)) for name, _ in pairs]
    B = [layer.lora_B[name].weight * (w * layer.scaling[name]) for name, w in pairs]
    biases = [
        layer.lora_B[name].bias * (w * layer.scaling[name]) for name, w in pairs if layer.lora_B[name].bias is not None
    ]
    return torch.cat(A, dim=1).flatten(0, 1), torch.cat(B, dim=1), sum(biases) if biases else None


@torch.no_grad()
def _add_adapter(model: LoraModel, adapter_name: str, factors: dict[str, tuple]) -> None:
    ranks = {name: len(A) for name, (A, _, _) in factors.items()}
    most = max(ranks.values())
    # A pattern without ^ would also match the layers whose names end in this one.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    some_expert = next(config for config in model.peft_config.values() if type(config) is LoraConfig)
    model.peft_config[adapter_name] = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),  # alpha = rank: the scaling is in B already
        target_modules=list(factors),
        task_type=some_expert.task_type,
        fan_in_fan_out=some_expert.fan_in_fan_out,
        base_model_name_or_path=some_expert.base_model_name_or_path,
        lora_bias=any(bias is not None for _, _, bias in factors.values()),
        inference_mode=True,
    )
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.inject_adapter(model.model, adapter_name)
    for parameter, requires_grad in trains:
        parameter.requires_grad_(requires_grad)
    for name, (A, B, bias) in factors.items():
        layer = model.model.get_submodule(name)
        if len(layer.lora_embedding_A):
            layer.lora_embedding_A[adapter_name].data = A.clone()
            layer.lora_embedding_B[adapter_name].data = B.clone()
            continue
        layer.lora_A[adapter_name].weight.data = A.clone()
        layer.lora_B[adapter_name].weight.data = B.clone()
        if layer.lora_B[adapter_name].bias is not None:
            if bias is None:
                layer.lora_B[adapter_name].bias.zero_()
            else:
                layer.lora_B[adapter_name].bias.data = bias.clone()
