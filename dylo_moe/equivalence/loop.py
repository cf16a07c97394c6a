"""The plainly right routed layer: a loop over its experts in float64, and a model whose layers all compute it.

    y = base(x) + sum_e w_e(token) * s_e * (B_e A_e x)          (LoRA: Hu et al. 2021, arXiv:2106.09685)

It shares no code with the routed layers of the fork: it reads A, B, rank and alpha of each adapter and multiplies.

Shape letters: T tokens (leading dimensions flattened), E experts, I inputs, O outputs, R rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class Update(NamedTuple):
    """What the experts add to a layer's base output.

    Args:
        value: the update in float64, with the leading dimensions of the layer's input.
        magnitude: the same sum with every factor replaced by its absolute value: what rounding errors scale with.
        terms: how many products the longest sum has.
    """

    value: Tensor
    magnitude: Tensor
    terms: int


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers of a PEFT model by their name in the base model."""
    base = model.base_model.model
    return {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}


def has_loop(layer: LoraLayer) -> bool:
    """Whether the loop knows this kind of layer: linear layers and embeddings, not convolutions."""
    return not isinstance(layer.get_base_layer(), nn.modules.conv._ConvNd)


def scaling_of(layer: LoraLayer, name: str) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    rank = layer.r[name]
    return layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora[name] else rank)


def weights_of_tokens(weights: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Write out `[E]`, `[batch, E]` or `[batch, seq, E]` as one row for each of the layer's tokens: weights_TE."""
    num_tokens, num_experts = math.prod(tokens), weights.shape[-1]
    if weights.dim() == 1:
        return weights.expand(num_tokens, num_experts)
    rows = weights.reshape(-1, num_experts)
    return rows.repeat_interleave(num_tokens // len(rows), dim=0)


def expert_update(layer: LoraLayer, x: Tensor, weights: Tensor, names: list[str]) -> Update:
    """What the experts add to the base layer's output, one expert after the other, in float64.

    Args:
        layer: a linear layer or an embedding with LoRA adapters, without dropout (eval mode).
        x: the layer's input, `[..., I]`, or token ids for an embedding.
        weights: weight of each expert, `[E]`, `[batch, E]` or `[batch, seq, E]`.
        names: the adapters that the columns belong to; those that this layer lacks are skipped.
    """
    embedding = len(layer.lora_embedding_A) > 0
    held = layer.lora_embedding_A if embedding else layer.lora_A
    tokens = tuple(x.shape) if embedding else tuple(x.shape[:-1])
    weights_TE = weights_of_tokens(weights.to(x.device), tokens).double()
    inputs = x.reshape(-1) if embedding else x.reshape(-1, x.shape[-1]).double()
    value, magnitude, terms = 0.0, 0.0, 1
    for column, name in enumerate(names):
        if name not in held:
            continue
        weight_T1 = weights_TE[:, column : column + 1] * scaling_of(layer, name)
        if embedding:
            hidden_TR = layer.lora_embedding_A[name].double().t()[inputs]
            B_OR, bias = layer.lora_embedding_B[name].double(), None
            weight_T1 = weight_T1 * getattr(layer.get_base_layer(), "embed_scale", 1.0)
            spread_TR = hidden_TR.abs()
        else:
            A_RI, B_OR, bias = layer.lora_A[name].weight.double(), layer.lora_B[name].weight, layer.lora_B[name].bias
            B_OR = B_OR.double()
            hidden_TR, spread_TR = inputs @ A_RI.t(), inputs.abs() @ A_RI.abs().t()
            terms = max(terms, A_RI.shape[1])
        moved_TO, size_TO = hidden_TR @ B_OR.t(), spread_TR @ B_OR.abs().t()
        if bias is not None:
            moved_TO, size_TO = moved_TO + bias.double(), size_TO + bias.double().abs()
        value, magnitude = value + weight_T1 * moved_TO, magnitude + weight_T1.abs() * size_TO
        terms = max(terms, len(names) * B_OR.shape[1])
    if isinstance(value, float):  # this layer holds none of the experts
        zeros = torch.zeros(*tokens, 1, dtype=torch.float64, device=x.device)
        return Update(zeros, zeros, terms)
    return Update(value.reshape(*tokens, -1), magnitude.reshape(*tokens, -1), terms)


@contextmanager
def looped(model: nn.Module, weights: Tensor, names: list[str]) -> Iterator[None]:
    """Let every adapted layer of a model compute the loop with these weights; differentiable in all it reads."""
    layers = [layer for layer in lora_layers(model).values() if has_loop(layer)]
    for layer in layers:
        layer.forward = partial(_loop_forward, layer, weights=weights, names=names)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _loop_forward(layer: LoraLayer, x: Tensor, *, weights: Tensor, names: list[str]) -> Tensor:
    base = layer.base_layer(x)
    return (base.double() + expert_update(layer, x, weights, names).value).to(base.dtype)
