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
"""The factors of a layer's experts side by side: as parts while one of them trains, otherwise stacked once and kept."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn


STACK_CACHE_KEY = "moe_expert_stack"


class ExpertStack(NamedTuple):
    """The factors of several adapters, in their order.

    `rows` are the A factors `[rank, in_features]` and, if the layer's gate was asked for, the gate's weight last (no
    rows for embeddings, which look up each adapter instead); `columns` are the B factors `[out_features, rank]`. Each
    holds one tensor, stacked along the rank, or the parts to be stacked. `bias` is `[num_experts, out_features]` or
    None.
    """

    rows: list[Tensor]
    columns: list[Tensor]
    bias: Optional[Tensor]


def expert_stack(layer: nn.Module, names: list[str], gate: Optional[Tensor] = None) -> ExpertStack:
    """The factors of the adapters, as parts while one of them trains, otherwise stacked and kept until one changes.

    Args:
        layer: a LoRA layer that holds these adapters.
        gate: the weight `[num_experts, in_features]` of the layer's gate, to be multiplied along with A.

    Raises:
        ValueError: an adapter is not plain LoRA.
    """
    if torch.compiler.is_compiling():
        return _with_gate(_parts(layer, names), gate)
    gate_kept = gate is not None and not _is_differentiated(gate) and not gate.is_inference()
    kept_gate = gate if gate_kept else None
    held = layer._caches.get(STACK_CACHE_KEY)
    if held is None or not held.still_holds(names, kept_gate):
        parts = _parts(layer, names)
        # In-place steps through `.data` leave no trace on the version counter, so training always drops the copy.
        layer._caches.pop(STACK_CACHE_KEY, None)
        tensors = [*parts.rows, *parts.columns] if parts.bias is None else [*parts.rows, *parts.columns, parts.bias]
        if any(tensor.is_inference() or _is_differentiated(tensor) for tensor in tensors):
            return _with_gate(parts, gate)
        held = _HeldStack(_factors(layer, names), names, kept_gate, parts)
        layer._caches[STACK_CACHE_KEY] = held
    return held.stack if gate_kept else _with_gate(held.stack, gate)


def refuse_unstackable(layer: nn.Module, names: list[str]) -> None:
    """Raise a `ValueError` if an adapter of a LoRA layer is not plain LoRA; say what to do instead."""
    for name in names:
        if name in layer.lora_variant or layer.use_dora.get(name, False):
            variant = layer.lora_variant.get(name)
            variant = "DoRA" if variant is None else type(variant).__name__
            raise ValueError(
                f"Adapter '{name}' uses the LoRA variant {variant}, which is not linear in its update and cannot be "
                "weighted per token. Use plain LoRA (or rsLoRA) for adapters that are routed."
            )
        if name in layer.lora_A and not isinstance(layer.lora_A[name], nn.Module):
            kind = type(layer).__name__
            raise ValueError(f"Layers of type {kind} do not support routing_weights; use plain LoRA adapters.")
    if getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None:
        raise ValueError(
            "routing_weights does not support tensor-parallel layers. Load the base model without tp_plan."
        )


def by_expert(parts: list[Tensor], ranks: list[int], *, dim: int) -> list[Tensor]:
    """Rows (`dim` 0) or columns (`dim` 1) of a stack, one tensor for each expert."""
    return list(parts[0].split(ranks, dim=dim)) if len(parts) < len(ranks) else list(parts)


def drop_expert_stacks(model: nn.Module) -> None:
    """Forget the stacks that layers keep, after or before weights are written through `.data`."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "_caches"):
            module._caches.pop(STACK_CACHE_KEY, None)


class _Factor:
    """A parameter, where the layer holds it, and what tells whether it is still the same.

    The alias keeps the storage alive, so that its address cannot be given to other values meanwhile. What cannot be
    seen is an in-place write through `.data` between two calls without gradients: write to the parameter itself,
    under `torch.no_grad()`.
    """

    __slots__ = ("address", "alias", "holder", "key", "module", "name", "siblings", "tensor", "version")

    def __init__(self, container: nn.Module, name: str, key: str) -> None:
        in_module = isinstance(container, nn.ModuleDict)
        self.siblings, self.name = (container._modules if in_module else container._parameters), name
        self.module = self.siblings[name]
        self.holder, self.key = (self.module._parameters, key) if in_module else (container._parameters, name)
        self.tensor = self.holder[self.key]
        self.alias = self.tensor.detach()
        self.address = self.tensor.data_ptr()
        self.version = self.tensor._version

    def is_unchanged(self) -> bool:
        tensor = self.tensor
        return (
            self.siblings.get(self.name) is self.module
            and self.holder.get(self.key) is tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
        )


class _HeldStack:
    """A stack together with the factors it was made of."""

    def __init__(self, factors: list[_Factor], names: list[str], gate: Optional[Tensor], parts: ExpertStack) -> None:
        self.names = list(names)
        self.factors = factors
        self.gate = gate
        self.gate_alias = None if gate is None else gate.detach()
        self.gate_version = None if gate is None else gate._version
        with torch.no_grad():
            rows = [torch.cat(parts.rows)] if parts.rows else []
            if gate is not None:
                rows = [torch.cat([*rows, gate.to(rows[0].dtype)])]
            self.stack = parts._replace(rows=rows, columns=[torch.cat(parts.columns, dim=1)])

    def still_holds(self, names: list[str], gate: Optional[Tensor]) -> bool:
        if names != self.names or gate is not self.gate:
            return False
        if torch.is_grad_enabled():
            if self.stack.columns[0].is_inference() or any(f.tensor.requires_grad for f in self.factors):
                return False
        if gate is not None:
            if gate._version != self.gate_version or gate.data_ptr() != self.gate_alias.data_ptr():
                return False
        return all(factor.is_unchanged() for factor in self.factors)

    def __deepcopy__(self, memo):
        return None  # a copied layer has parameters of its own


def _factors(layer: nn.Module, names: list[str]) -> list[_Factor]:
    if len(layer.lora_embedding_A):
        return [_Factor(layer.lora_embedding_B, name, name) for name in names]
    keys = [(layer.lora_A, "weight"), (layer.lora_B, "weight"), (layer.lora_B, "bias")]
    return [
        _Factor(container, name, key)
        for container, key in keys
        for name in names
        if container[name]._parameters.get(key) is not None
    ]


def _parts(layer: nn.Module, names: list[str]) -> ExpertStack:
    refuse_unstackable(layer, names)
    if len(layer.lora_embedding_A):
        return ExpertStack([], [layer.lora_embedding_B[name] for name in names], None)
    rows = [layer.lora_A[name].weight for name in names]
    columns = [layer.lora_B[name].weight for name in names]
    biases = [layer.lora_B[name].bias for name in names]
    if all(bias is None for bias in biases):
        return ExpertStack(rows, columns, None)
    present = next(bias for bias in biases if bias is not None)
    stacked = torch.stack([torch.zeros_like(present) if bias is None else bias for bias in biases])
    return ExpertStack(rows, columns, stacked)


def _with_gate(stack: ExpertStack, gate: Optional[Tensor]) -> ExpertStack:
    return stack if gate is None else stack._replace(rows=[*stack.rows, gate])


def _is_differentiated(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()
