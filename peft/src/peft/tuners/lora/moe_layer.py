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
experts there are, and no tensor of size tokens x experts x out_features exists; see `moe_product.py`.

LoRA: Hu et al. 2021, https://huggingface.co/papers/2106.09685. One implementation serves every LoRA layer type, float
or quantized, because it only calls the frozen base layer and adds the update out of place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn

from .moe_path import sparse_pays
from .moe_product import add_sparse, add_stacked, project, weigh
from .moe_stack import expert_stack, refuse_unstackable


if TYPE_CHECKING:
    from .layer import LoraLayer
    from .moe_context import RoutingPort


class OwnGate(NamedTuple):
    """A gate that looks at the layer's own input, so that the layer can score it in the product of its experts.

    `weight` is `[num_experts, in_features]`; `weights_of` turns scores `[..., num_experts]`, of the input divided by
    its root mean square, into routing weights.
    """

    weight: torch.Tensor
    weights_of: Callable[[torch.Tensor], torch.Tensor]


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
    routing_weights: Union[torch.Tensor, OwnGate],
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
            skipped, the others keep their weight. A row of zeros leaves that token to the base layer. A linear layer
            also takes the gate that decides from its own input.
        kept: how many entries of a row are not zero at most, if that is known; lets many experts run sparsely.

    Returns:
        The layer's output in the dtype that the base layer returns.

    Raises:
        ValueError: the weights do not fit the input or the active adapters, or the layer cannot be routed.
    """
    _refuse_call(layer, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("adapter_names", "alora_offsets")}
    if layer.disable_adapters:
        return layer.base_layer(x, *args, **kwargs)

    names = layer.active_adapters
    num_weights = len(routing_weights.weight) if isinstance(routing_weights, OwnGate) else routing_weights.shape[-1]
    if num_weights != len(names):
        raise ValueError(
            f"routing_weights has {num_weights} columns but {len(names)} adapters are active ({names}); "
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
        return _add_linear(layer, x, result, routing_weights, held, columns, kept)
    return (result + delta).to(result.dtype)


def why_unroutable(layer: LoraLayer) -> Optional[str]:
    """Why the layer, in the state it is in, has no routed forward, and what to do instead; None if it has one."""
    try:
        _refuse_call(layer)
        refuse_unstackable(layer, layer.active_adapters)
    except ValueError as refused:
        return str(refused)
    return None


def _refuse_call(layer: LoraLayer, *, adapter_names=None, alora_offsets=None, **kwargs: Any) -> None:
    kind = type(layer).__name__
    if adapter_names is not None:
        raise ValueError(
            "routing_weights and adapter_names cannot be combined. To give each sequence one adapter, pass one-hot "
            "rows of routing_weights instead of adapter_names."
        )
    if alora_offsets is not None:
        raise ValueError("routing_weights cannot be combined with aLoRA. Activate adapters without invocation tokens.")
    if not hasattr(layer, "lora_A"):
        raise ValueError(f"Layers of type {kind} do not support routing_weights; use plain LoRA adapters.")
    if kind in ("ParamWrapper", "MultiheadAttention", "LoraParallelLinear"):
        raise ValueError(
            f"Layers of type {kind} (target_parameters, nn.MultiheadAttention, Megatron) apply LoRA to the weight and "
            "cannot weigh it per token. Exclude these modules from the routed adapters. Of a mixture-of-experts model, "
            "'all-linear' adapts the fused experts and the gate as target_parameters: name the modules instead."
        )
    if layer.merged_adapters:
        raise ValueError(
            f"Cannot route a layer with merged adapters ({layer.merged_adapters}); call `unmerge_adapter` first."
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
    if routing_weights.shape[:-1] == tokens:
        return routing_weights
    *lead, num_experts = routing_weights.shape
    batch = tokens[0] if tokens else 1
    if len(lead) == 0:
        return routing_weights
    if len(lead) == 1 and lead[0] == batch:
        return routing_weights.reshape(batch, *(1,) * (len(tokens) - 1), num_experts)
    if len(lead) == 1 and len(tokens) == 1 and lead[0] and batch % lead[0] == 0:  # tokens flattened by the model
        return routing_weights.repeat_interleave(batch // lead[0], dim=0)
    if len(lead) == 2 and len(tokens) == 1 and lead[0] * lead[1] == batch:
        return routing_weights.reshape(batch, num_experts)
    raise ValueError(
        f"routing_weights of shape {tuple(routing_weights.shape)} does not fit the {where} of {tuple(tokens)} tokens. "
        "Pass [num_experts], [batch, num_experts] or [batch, seq, num_experts] for the batch and sequence length of "
        "this call."
    )


def _add_linear(layer, x, result, routing, names, columns, kept) -> torch.Tensor:
    names, columns = _sorted_by_dropout(layer, names, columns)
    tokens, num_tokens = x.shape[:-1], x.shape[:-1].numel()
    rates = set(_dropout_rates(layer, names))
    own = isinstance(routing, OwnGate)
    # A gate keeps its float32: scores rounded to bfloat16 send tokens to other experts.
    alike = own and rates == {0.0} and _product_dtype(layer, x, _dtype_of(layer, names[0])) == routing.weight.dtype
    stack = expert_stack(layer, names, routing.weight if alike else None)
    dtype = _product_dtype(layer, x, stack.dtype)
    sparse = len(rates) == 1 and sparse_pays(num_tokens, stack.ranks, kept, dtype, x.device.type)
    with_gate = alike and dtype == routing.weight.dtype and not sparse

    hidden = None
    if own:
        rows = stack.rows if with_gate else [routing.weight]
        hidden, scores = project(x, rows, len(routing.weight), routing.weight.dtype)
        weights = routing.weights_of(scores.reshape(*tokens, len(routing.weight)))
    else:
        weights = fit_to_tokens(routing, tokens).expand(*tokens, -1)
    weights = _for_experts(weights, stack, columns, dtype).reshape(num_tokens, len(names))
    if sparse:
        dropped = F.dropout(x, *rates) if any(rates) else x
        factors = stack.expert_rows(), stack.expert_columns()
        updated = add_sparse(result, dropped, weights, *factors, min(kept, len(names)), dtype)
    else:
        if not with_gate:
            rows = stack.expert_rows() if alike else stack.rows
            hidden = _down(layer, x, rows, names, functools.partial(_hidden_ranks, dtype=dtype), feature_dim=-1)
        updated = add_stacked(result, hidden, weights, stack.columns, stack.ranks)
    if stack.bias is not None:
        bias = (weights @ stack.bias.to(weights.dtype)).reshape(result.shape)
        return (updated + bias).to(result.dtype)
    return updated


def _product_dtype(layer, x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which stock LoRA would multiply this input by factors of a dtype."""
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return dtype if layer.cast_input_dtype_enabled else x.dtype


def _dtype_of(layer, name: str) -> torch.dtype:
    return layer.lora_A[name].weight.dtype


def _hidden_ranks(x: torch.Tensor, rows: list[torch.Tensor], *, dtype: torch.dtype) -> torch.Tensor:
    return project(x, rows, 0, dtype)[0]


def _embedding_delta(layer, x, routing_weights, names, columns) -> torch.Tensor:
    # A is [rank, num_embeddings]: looking up each adapter copies tokens x rank, stacking the tables would copy them.
    looked_up = [layer._embed(x, layer.lora_embedding_A[name].T) for name in names]
    hidden = torch.cat(looked_up, dim=-1)
    stack = expert_stack(layer, names)
    weights = _for_experts(fit_to_tokens(routing_weights, x.shape), stack, columns, hidden.dtype)
    delta = F.linear(weigh(hidden, weights, stack.ranks), _joined(stack.columns, dim=1))
    embed_scale = layer._get_embed_scale()
    return delta if embed_scale is None else delta * embed_scale.to(delta.dtype)


def _conv_delta(layer, x, routing_weights, names, columns) -> torch.Tensor:
    if x.dim() < layer.get_base_layer().weight.dim():  # one image without a batch dimension
        return _conv_delta(layer, x.unsqueeze(0), routing_weights, names, columns).squeeze(0)
    names, columns = _sorted_by_dropout(layer, names, columns)
    stack = expert_stack(layer, names)
    A = _joined(stack.rows, dim=0)
    x = layer._cast_input_dtype(x, A.dtype)
    base, first = layer.get_base_layer(), layer.lora_A[names[0]]

    def convolve(x: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
        return layer.conv_fn(x, _joined(rows, dim=0), stride=first.stride, padding=first.padding)

    hidden = _down(layer, x, [A], names, convolve, feature_dim=1)
    batch, _, *spatial = hidden.shape
    # Positions of the output play the part of the tokens: [batch, rank, *spatial] -> [batch, positions, rank].
    hidden = hidden.flatten(2).transpose(1, 2)
    weights = fit_to_tokens(routing_weights, (batch, hidden.shape[1]), where="convolution output")
    weights = _for_experts(weights, stack, columns, hidden.dtype)
    weighted = weigh(hidden, weights, stack.ranks).transpose(1, 2)
    if base.groups > 1:  # each group of B sees its own share of every adapter's rank
        shares = [part.unflatten(1, (base.groups, -1)) for part in weighted.split(stack.ranks, dim=1)]
        weighted = torch.cat(shares, dim=2).flatten(1, 2)
    delta = layer.conv_fn(weighted.unflatten(2, spatial), _joined(stack.columns, dim=1), groups=base.groups)
    if stack.bias is None:
        return delta
    bias = (weights @ stack.bias.to(weights.dtype)).expand(batch, hidden.shape[1], -1)
    return delta + bias.transpose(1, 2).unflatten(2, spatial)


def _down(layer, x, rows, names, product, *, feature_dim: int) -> torch.Tensor:
    """Project the input to all ranks; adapters with the same dropout share one mask and one product."""
    rates = _dropout_rates(layer, names)
    if not any(rates):
        return product(x, rows)
    if len(rows) == 1:
        rows = rows[0].split([layer.r[name] for name in names])
    parts = []
    for rate in dict.fromkeys(rates):
        parts.append(product(F.dropout(x, rate), [row for row, own in zip(rows, rates) if own == rate]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=feature_dim)


def _dropout_rates(layer, names: list[str]) -> list[float]:
    if not layer.training:
        return [0.0] * len(names)
    return [getattr(layer.lora_dropout[name], "p", 0.0) for name in names]


def _sorted_by_dropout(layer, names, columns):
    """Bring adapters of the same dropout next to each other, so that each group is one slice of the stack."""
    rates = _dropout_rates(layer, names)
    if len(set(rates)) == 1:
        return names, columns
    order = sorted(range(len(names)), key=lambda i: rates[i])
    columns = list(range(len(names))) if columns is None else columns
    return [names[i] for i in order], [columns[i] for i in order]


def _for_experts(routing_weights, stack, columns, dtype) -> torch.Tensor:
    """Pick the columns of this layer's adapters; scale each by alpha / rank where the stack is not scaled."""
    if columns is not None:
        routing_weights = torch.stack([routing_weights[..., column] for column in columns], dim=-1)
    if stack.scalings is None:
        return routing_weights.to(dtype)
    routing_weights = routing_weights.to(torch.promote_types(routing_weights.dtype, dtype))  # round once, at the end
    if len(set(stack.scalings)) == 1:
        return (routing_weights * stack.scalings[0]).to(dtype)
    # A list of floats becomes a tensor without a copy from the host in each call: scale the columns one by one.
    scaled = [routing_weights[..., i] * scaling for i, scaling in enumerate(stack.scalings)]
    return torch.stack(scaled, dim=-1).to(dtype)


def _joined(parts: list[torch.Tensor], *, dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
