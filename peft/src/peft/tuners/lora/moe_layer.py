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
"""The routed forward of a LoRA layer: all active adapters at once, weighted per token.

    y = W0 x + sum_e w_e(token) * s_e * B_e A_e dropout(x)

The adapters ("experts") are stacked along the rank dimension, so that the sum costs two matrix products however many
experts there are, and no tensor of size tokens x experts x out_features exists:

    delta = ((x @ A_cat^T) * per_rank(w * s)) @ B_cat^T

LoRA: Hu et al. 2021, https://huggingface.co/papers/2106.09685. One implementation serves every LoRA layer type, float
or quantized, because it only calls the frozen base layer and adds the update out of place.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn

from .moe_sparse import pays, sparse_update


if TYPE_CHECKING:
    from .layer import LoraLayer
    from .moe_context import RoutingPort


STACK_CACHE_KEY = "moe_expert_stack"


class RoutedLayerMixin:
    """Gives every subclass of `LoraLayer` the argument `routing_weights`, whatever its own `forward` looks like."""

    # Where the layer asks for the weights of its tokens when the caller passes none; set by `LoraModel`.
    routing_port: Optional[RoutingPort] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = _accept_routing_weights(cls.forward)


def _accept_routing_weights(forward):
    @functools.wraps(forward)
    def forward_or_routed(self, x, *args, routing_weights: Optional[torch.Tensor] = None, **kwargs):
        kept = None
        if routing_weights is None and self.routing_port is not None:
            routing_weights = self.routing_port.weights_for(self, x)
            kept = self.routing_port.kept_experts
        if routing_weights is None:
            return forward(self, x, *args, **kwargs)
        return routed_forward(self, x, *args, routing_weights=routing_weights, kept=kept, **kwargs)

    return forward_or_routed


def routed_forward(
    layer: LoraLayer,
    x: torch.Tensor,
    *args: Any,
    routing_weights: torch.Tensor,
    kept: Optional[int] = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Output of the base layer plus the update of all active adapters, each weighted per token.

    Args:
        layer: any LoRA layer.
        x: the layer's input, e.g. `[batch, seq, in_features]`.
        args, kwargs: passed on to the base layer.
        routing_weights: weight of each adapter, `[num_experts]`, `[batch, num_experts]` or
            `[batch, seq, num_experts]`; the columns follow `layer.active_adapters`. Adapters that this layer lacks are
            skipped, the others keep their weight. A row of zeros leaves that token to the base layer.
        kept: how many entries of a row are not zero at most, if that is known; lets many experts run sparsely.

    Returns:
        The layer's output in the dtype that the base layer returns.

    Raises:
        ValueError: the weights do not fit the input or the active adapters, or the layer cannot be routed.
    """
    refuse_unroutable(layer, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("adapter_names", "alora_offsets")}
    if layer.disable_adapters:
        return layer.base_layer(x, *args, **kwargs)

    names = list(layer.active_adapters)
    if routing_weights.shape[-1] != len(names):
        raise ValueError(
            f"routing_weights has {routing_weights.shape[-1]} columns but {len(names)} adapters are active ({names}); "
            "pass one column for each active adapter, in that order."
        )

    result = layer.base_layer(x, *args, **kwargs)
    adapters = layer.lora_embedding_A if len(layer.lora_embedding_A) else layer.lora_A
    held = [name for name in names if name in adapters]
    if not held:
        return result

    columns = None if held == names else [names.index(name) for name in held]
    if adapters is layer.lora_embedding_A:
        delta = _embedding_delta(layer, x, routing_weights, held, columns)
    elif isinstance(layer.lora_A[held[0]], nn.modules.conv._ConvNd):
        delta = _conv_delta(layer, x, routing_weights, held, columns)
    else:
        delta = _linear_delta(layer, x, routing_weights, held, columns, kept)
    return (result + delta).to(result.dtype)


def refuse_unroutable(layer: LoraLayer, **kwargs: Any) -> None:
    """Raise a `ValueError` if the layer, in the state it is in, has no routed forward; say what to do instead."""
    kind = type(layer).__name__
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "routing_weights and adapter_names cannot be combined. To give each sequence one adapter, pass one-hot "
            "rows of routing_weights instead of adapter_names."
        )
    if kwargs.get("alora_offsets") is not None:
        raise ValueError("routing_weights cannot be combined with aLoRA. Activate adapters without invocation tokens.")
    if not hasattr(layer, "lora_A"):
        raise ValueError(f"Layers of type {kind} do not support routing_weights; use plain LoRA adapters.")
    if kind in ("ParamWrapper", "MultiheadAttention", "LoraParallelLinear"):
        raise ValueError(
            f"Layers of type {kind} (target_parameters, nn.MultiheadAttention, Megatron) apply LoRA to the weight and "
            "cannot weigh it per token. Exclude these modules from the routed adapters."
        )
    if layer.merged:
        raise ValueError(
            f"Cannot route a layer with merged adapters ({layer.merged_adapters}); call `unmerge_adapter` first."
        )
    for name in layer.active_adapters:
        if name in layer.lora_variant or layer.use_dora.get(name, False):
            variant = layer.lora_variant.get(name)
            variant = "DoRA" if variant is None else type(variant).__name__
            raise ValueError(
                f"Adapter '{name}' uses the LoRA variant {variant}, which is not linear in its update and cannot be "
                "weighted per token. Use plain LoRA (or rsLoRA) for adapters that are routed."
            )
        if name in layer.lora_A and not isinstance(layer.lora_A[name], nn.Module):
            raise ValueError(f"Layers of type {kind} do not support routing_weights; use plain LoRA adapters.")
    if getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None:
        raise ValueError(
            "routing_weights does not support tensor-parallel layers. Load the base model without tp_plan."
        )


def fit_to_tokens(routing_weights: torch.Tensor, tokens: tuple[int, ...], where: str = "input") -> torch.Tensor:
    """Shape weights so that they broadcast against `[*tokens, num_experts]`.

    Args:
        routing_weights: `[num_experts]`, `[batch, num_experts]` or `[batch, seq, num_experts]`.
        tokens: the input's shape without its features, e.g. `(batch, seq)`, or `(batch * seq,)` where a model
            flattens its tokens.
        where: what the error calls the input.

    Raises:
        ValueError: batch or sequence length differ; names both shapes.
    """
    *lead, num_experts = routing_weights.shape
    batch = tokens[0] if tokens else 1
    if len(lead) == 0:
        return routing_weights
    if len(lead) == 1 and lead[0] == batch:
        return routing_weights.reshape(batch, *(1,) * (len(tokens) - 1), num_experts)
    if len(lead) == 1 and len(tokens) == 1 and batch % lead[0] == 0:  # tokens flattened by the model
        return routing_weights.repeat_interleave(batch // lead[0], dim=0)
    if len(lead) == 2 and tuple(lead) == tuple(tokens):
        return routing_weights
    if len(lead) == 2 and len(tokens) == 1 and lead[0] * lead[1] == batch:
        return routing_weights.reshape(batch, num_experts)
    raise ValueError(
        f"routing_weights of shape {tuple(routing_weights.shape)} does not fit the {where} of {tuple(tokens)} tokens. "
        "Pass [num_experts], [batch, num_experts] or [batch, seq, num_experts] for the batch and sequence length of "
        "this call."
    )


class ExpertStack(NamedTuple):
    """The factors of several adapters, concatenated along the rank dimension.

    `A` is `[sum of ranks, in_features]` (None for embeddings, which look up each adapter instead), `B` is
    `[out_features, sum of ranks]`, `bias` is `[num_experts, out_features]` or None.
    """

    A: Optional[torch.Tensor]
    B: torch.Tensor
    bias: Optional[torch.Tensor]


def _linear_delta(layer, x, routing_weights, names, columns, kept) -> torch.Tensor:
    names, columns = _sorted_by_dropout(layer, names, columns)
    ranks = [layer.r[name] for name in names]
    stack = _expert_stack(layer, names)
    x = layer._cast_input_dtype(x, stack.A.dtype)
    weights = fit_to_tokens(routing_weights, tuple(x.shape[:-1]))
    rates = {_dropout_rate(layer, name) if layer.training else 0.0 for name in names}
    if len(rates) == 1 and pays(x.shape[:-1].numel(), ranks, kept):
        weights = _scaled(layer, weights, names, columns, x.dtype)
        flat, rate = x.flatten(0, -2), rates.pop()
        flat = F.dropout(flat, rate) if rate > 0 else flat
        by_token = weights.expand(*x.shape[:-1], -1).flatten(0, -2)
        update = sparse_update(flat, by_token, stack.A, stack.B, ranks, min(kept, len(names)))
        delta = update.unflatten(0, x.shape[:-1])
    else:
        hidden = _down(layer, x, stack.A, names, F.linear, feature_dim=-1)
        weights = _scaled(layer, weights, names, columns, hidden.dtype)
        delta = F.linear(_weigh(hidden, weights, ranks), stack.B)
    return delta if stack.bias is None else delta + weights @ stack.bias.to(weights.dtype)


def _embedding_delta(layer, x, routing_weights, names, columns) -> torch.Tensor:
    # A is [rank, num_embeddings]: looking up each adapter copies tokens x rank, stacking the tables would copy them.
    looked_up = [layer._embed(x, layer.lora_embedding_A[name].T) for name in names]
    hidden = torch.cat(looked_up, dim=-1)
    stack = _expert_stack(layer, names)
    weights = _scaled(layer, fit_to_tokens(routing_weights, tuple(x.shape)), names, columns, hidden.dtype)
    delta = F.linear(_weigh(hidden, weights, [layer.r[name] for name in names]), stack.B)
    embed_scale = layer._get_embed_scale()
    return delta if embed_scale is None else delta * embed_scale.to(delta.dtype)


def _conv_delta(layer, x, routing_weights, names, columns) -> torch.Tensor:
    if x.dim() < layer.get_base_layer().weight.dim():  # one image without a batch dimension
        return _conv_delta(layer, x.unsqueeze(0), routing_weights, names, columns).squeeze(0)
    names, columns = _sorted_by_dropout(layer, names, columns)
    stack = _expert_stack(layer, names)
    x = layer._cast_input_dtype(x, stack.A.dtype)
    base, first = layer.get_base_layer(), layer.lora_A[names[0]]
    convolve = functools.partial(layer.conv_fn, stride=first.stride, padding=first.padding)
    hidden = _down(layer, x, stack.A, names, convolve, feature_dim=1)
    batch, _, *spatial = hidden.shape
    # Positions of the output play the part of the tokens: [batch, rank, *spatial] -> [batch, positions, rank].
    hidden = hidden.flatten(2).transpose(1, 2)
    weights = fit_to_tokens(routing_weights, (batch, hidden.shape[1]), where="convolution output")
    weights = _scaled(layer, weights, names, columns, hidden.dtype)
    ranks = [layer.r[name] for name in names]
    weighted = _weigh(hidden, weights, ranks).transpose(1, 2)
    if base.groups > 1:  # each group of B sees its own share of every adapter's rank
        shares = [part.unflatten(1, (base.groups, -1)) for part in weighted.split(ranks, dim=1)]
        weighted = torch.cat(shares, dim=2).flatten(1, 2)
    delta = layer.conv_fn(weighted.unflatten(2, spatial), stack.B, groups=base.groups)
    if stack.bias is None:
        return delta
    bias = (weights @ stack.bias.to(weights.dtype)).expand(batch, hidden.shape[1], -1)
    return delta + bias.transpose(1, 2).unflatten(2, spatial)


def _down(layer, x, A, names, product, *, feature_dim: int) -> torch.Tensor:
    """Project the input to all ranks; adapters with the same dropout share one mask and one product."""
    if not layer.training or all(_dropout_rate(layer, name) == 0 for name in names):
        return product(x, A)
    parts, start = [], 0
    for rate in dict.fromkeys(_dropout_rate(layer, name) for name in names):
        rows = sum(layer.r[name] for name in names if _dropout_rate(layer, name) == rate)
        parts.append(product(F.dropout(x, rate), A[start : start + rows]))
        start += rows
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=feature_dim)


def _dropout_rate(layer, name: str) -> float:
    return getattr(layer.lora_dropout[name], "p", 0.0)


def _sorted_by_dropout(layer, names, columns):
    """Bring adapters of the same dropout next to each other, so that each group is one slice of the stack."""
    if not layer.training or len({_dropout_rate(layer, name) for name in names}) == 1:
        return names, columns
    order = sorted(range(len(names)), key=lambda i: _dropout_rate(layer, names[i]))
    columns = list(range(len(names))) if columns is None else columns
    return [names[i] for i in order], [columns[i] for i in order]


def _scaled(layer, routing_weights, names, columns, dtype) -> torch.Tensor:
    """Pick the columns of this layer's adapters and multiply each by its adapter's scaling (alpha / rank)."""
    if columns is not None:
        routing_weights = torch.stack([routing_weights[..., column] for column in columns], dim=-1)
    scalings = [layer.scaling[name] for name in names]
    routing_weights = routing_weights.to(torch.promote_types(routing_weights.dtype, dtype))  # round once, at the end
    if len(set(scalings)) == 1:
        return (routing_weights * scalings[0]).to(dtype)
    # A list of floats becomes a tensor without a copy from the host in each call: scale the columns one by one.
    scaled = [routing_weights[..., i] * scaling for i, scaling in enumerate(scalings)]
    return torch.stack(scaled, dim=-1).to(dtype)


def _weigh(hidden: torch.Tensor, weights: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    """Multiply each adapter's block of ranks by that adapter's weight: `[..., sum of ranks]` by `[..., experts]`."""
    if len(set(ranks)) == 1:
        return (hidden.unflatten(-1, (len(ranks), ranks[0])) * weights.unsqueeze(-1)).flatten(-2)
    blocks = [block * weights[..., i : i + 1] for i, block in enumerate(hidden.split(ranks, dim=-1))]
    return torch.cat(blocks, dim=-1)


def _expert_stack(layer, names: list[str]) -> ExpertStack:
    """The stacked factors: differentiable while an adapter trains, otherwise kept until a weight changes."""
    tensors = _factors(layer, names)
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if training or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        # In-place steps through `.data` leave no trace on the version counter, so training always drops the copy.
        if not torch.compiler.is_compiling():
            layer._caches.pop(STACK_CACHE_KEY, None)
        return _concatenate(layer, names)

    held = layer._caches.get(STACK_CACHE_KEY)
    if held is None or not held.still_holds(names, tensors):
        with torch.no_grad():
            held = _HeldStack(names, tensors, _concatenate(layer, names))
        layer._caches[STACK_CACHE_KEY] = held
    return held.stack


def drop_expert_stacks(model: nn.Module) -> None:
    """Forget the stacks that layers keep, after or before weights are written through `.data`."""
    for module in model.modules():
        if isinstance(module, RoutedLayerMixin):
            module._caches.pop(STACK_CACHE_KEY, None)


class _HeldStack:
    """A stack together with what tells whether it still holds: parameters, their storage and their version.

    The aliases keep the storages alive, so that an address cannot be given to other values meanwhile. What cannot be
    seen is an in-place write through `.data` between two calls without gradients: write to the parameter itself,
    under `torch.no_grad()`.
    """

    def __init__(self, names: list[str], tensors: list[torch.Tensor], stack: ExpertStack) -> None:
        self.names = list(names)
        self.tensors = tensors
        self.aliases = [tensor.detach() for tensor in tensors]
        self.versions = [tensor._version for tensor in tensors]
        self.stack = stack

    def still_holds(self, names: list[str], tensors: list[torch.Tensor]) -> bool:
        if names != self.names or (self.stack.B.is_inference() and torch.is_grad_enabled()):
            return False
        return all(
            tensor is before and tensor._version == version and tensor.data_ptr() == alias.data_ptr()
            for tensor, before, version, alias in zip(tensors, self.tensors, self.versions, self.aliases)
        )

    def __deepcopy__(self, memo):
        return None  # a copied layer has parameters of its own


def _factors(layer, names: list[str]) -> list[torch.Tensor]:
    if len(layer.lora_embedding_A):
        return [layer.lora_embedding_B[name] for name in names]
    tensors = []
    for name in names:
        tensors += [layer.lora_A[name].weight, layer.lora_B[name].weight]
        if layer.lora_B[name].bias is not None:
            tensors.append(layer.lora_B[name].bias)
    return tensors


def _concatenate(layer, names: list[str]) -> ExpertStack:
    if len(layer.lora_embedding_A):
        return ExpertStack(None, torch.cat([layer.lora_embedding_B[name] for name in names], dim=1), None)
    A = torch.cat([layer.lora_A[name].weight for name in names], dim=0)
    B = torch.cat([layer.lora_B[name].weight for name in names], dim=1)
    biases = [layer.lora_B[name].bias for name in names]
    if all(bias is None for bias in biases):
        return ExpertStack(A, B, None)
    present = next(bias for bias in biases if bias is not None)
    return ExpertStack(A, B, torch.stack([torch.zeros_like(present) if b is None else b for b in biases]))
