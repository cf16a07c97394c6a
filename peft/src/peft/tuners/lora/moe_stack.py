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

import functools
import operator
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn


STACK_CACHE_KEY = "moe_expert_stack"

_version_of = operator.attrgetter("_version")


class ExpertStack(NamedTuple):
    """The factors of several adapters, in their order.

    `rows` are the A factors `[rank, in_features]` and, if the layer's gate was asked for, the gate's weight last (no
    rows for embeddings, which look up each adapter instead); `columns` are the B factors `[out_features, rank]`. Each
    holds one tensor, stacked along the rank, or the parts to be stacked. `bias` is `[num_experts, out_features]` or
    None. `scalings` (alpha / rank of each adapter) are to be multiplied onto the weights; None if columns and bias
    hold them already. `dtype` is that of the A factors together.
    """

    ranks: list[int]
    rows: list[Tensor]
    columns: list[Tensor]
    bias: Optional[Tensor]
    scalings: Optional[list[float]]
    dtype: torch.dtype

    def expert_rows(self) -> list[Tensor]:
        """The A factor of each expert, without the gate."""
        return list(_split(self.rows, self.ranks, dim=0)[: len(self.ranks)])

    def expert_columns(self) -> list[Tensor]:
        """The B factor of each expert."""
        return list(_split(self.columns, self.ranks, dim=1))


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
    gate_trains = gate is not None and (_is_differentiated(gate) or gate.is_inference())
    held = layer._caches.get(STACK_CACHE_KEY)
    if held is None or not held.still_holds(layer, names, None if gate_trains else gate):
        parts = _parts(layer, names)
        # In-place steps through `.data` leave no trace on the version counter, so training always drops the copy.
        layer._caches.pop(STACK_CACHE_KEY, None)
        tensors = [*parts.rows, *parts.columns] if parts.bias is None else [*parts.rows, *parts.columns, parts.bias]
        if any(tensor.is_inference() or _is_differentiated(tensor) for tensor in tensors):
            return _with_gate(parts, gate)
        held = _HeldStack(layer, names, None if gate_trains else gate, parts)
        layer._caches[STACK_CACHE_KEY] = held
    return _with_gate(held.stack, gate) if gate_trains else held.stack


def drop_expert_stacks(model: nn.Module) -> None:
    """Forget the stacks that layers keep, after or before weights are written through `.data`."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "_caches"):
            module._caches.pop(STACK_CACHE_KEY, None)


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


class _HeldStack:
    """A stack together with what tells whether it still holds: parameters, their storage and their version.

    The aliases keep the storages alive, so that an address cannot be given to other values meanwhile. What cannot be
    seen is an in-place write through `.data` between two calls without gradients: write to the parameter itself,
    under `torch.no_grad()`.
    """

    def __init__(self, layer: nn.Module, names: list[str], gate: Optional[Tensor], parts: ExpertStack) -> None:
        self.names, self.gate = list(names), gate
        self.scaling = dict(layer.scaling)
        # Dictionaries, keys and what was found there: the adapters' modules, and their parameters.
        modules, parameters = [], []
        if len(layer.lora_embedding_A):
            parameters += [(layer.lora_embedding_B._parameters, name) for name in names]
        else:
            modules += [(factor._modules, name) for factor in (layer.lora_A, layer.lora_B) for name in names]
            for holder, name in modules:
                parameters += [(holder[name]._parameters, key) for key in ("weight", "bias")]
        places = [(holder, key) for holder, key in [*modules, *parameters] if holder.get(key) is not None]
        self.holders, self.keys = zip(*places)
        self.found = [holder[key] for holder, key in places]
        self.tensors = [value for value in self.found if isinstance(value, Tensor)] + ([] if gate is None else [gate])
        self.versions = [tensor._version for tensor in self.tensors]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.aliases = [tensor.detach() for tensor in self.tensors]
        with torch.no_grad():
            rows = [torch.cat(parts.rows)] if parts.rows else []
            if gate is not None:
                rows = [torch.cat([*rows, gate.to(parts.dtype)])]
            # Laid out as [ranks, out_features], where each expert's share is contiguous.
            columns = torch.cat([part.t() * scaling for part, scaling in zip(parts.columns, parts.scalings)]).t()
            bias = parts.bias
            if bias is not None:
                bias = torch.stack([row * scaling for row, scaling in zip(bias, parts.scalings)])
            self.stack = parts._replace(rows=rows, columns=[columns], bias=bias, scalings=None)

    def still_holds(self, layer: nn.Module, names: list[str], gate: Optional[Tensor]) -> bool:
        if names != self.names or gate is not self.gate or layer.scaling != self.scaling:
            return False
        if not all(map(operator.is_, map(dict.get, self.holders, self.keys), self.found)):
            return False
        if list(map(_version_of, self.tensors)) != self.versions:
            return False
        if list(map(Tensor.data_ptr, self.tensors)) != self.addresses:
            return False
        if torch.is_grad_enabled():
            trains = any(tensor.requires_grad for tensor in self.tensors)
            return not trains and not self.stack.columns[0].is_inference()
        return True

    def __deepcopy__(self, memo):
        return None  # a copied layer has parameters of its own


def _parts(layer: nn.Module, names: list[str]) -> ExpertStack:
    refuse_unstackable(layer, names)
    ranks, scalings = [layer.r[name] for name in names], [layer.scaling[name] for name in names]
    if len(layer.lora_embedding_A):
        columns = [layer.lora_embedding_B[name] for name in names]
        return ExpertStack(ranks, [], columns, None, scalings, _common_dtype(columns))
    rows = [layer.lora_A[name].weight for name in names]
    columns = [layer.lora_B[name].weight for name in names]
    for name, row in zip(names, rows):
        if row.is_meta or row.numel() == 0:
            raise ValueError(
                f"The weights of adapter '{name}' are not on a device: offloaded, or partitioned by DeepSpeed ZeRO-3. "
                "Keep the adapters on a device (a device_map without offloading, ZeRO-2 or FSDP2)."
            )
    biases, bias = [layer.lora_B[name].bias for name in names], None
    if any(bias is not None for bias in biases):
        present = next(bias for bias in biases if bias is not None)
        bias = torch.stack([torch.zeros_like(present) if bias is None else bias for bias in biases])
    return ExpertStack(ranks, rows, columns, bias, scalings, _common_dtype(rows))


def _split(parts: list[Tensor], ranks: list[int], *, dim: int) -> list[Tensor]:
    first = parts[0]
    if first.shape[dim] == ranks[0]:
        return parts
    gate_rows = first.shape[dim] - sum(ranks)
    return list(first.split([*ranks, gate_rows] if gate_rows else ranks, dim=dim))


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def _with_gate(stack: ExpertStack, gate: Optional[Tensor]) -> ExpertStack:
    return stack if gate is None else stack._replace(rows=[*stack.rows, gate])


def _is_differentiated(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()
