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
"""The arithmetic of a routed linear layer.

    stacked:  result + ((x A^T) * per_rank(w)) B^T      A, B: the experts' factors side by side
    sparse:   result + sum over the kept experts of w_e (x A_e^T) B_e^T, each expert with its own tokens

The stacked form is two matrix products however many experts there are. The sparse form sorts the tokens by expert; its
arithmetic grows with the experts kept for a token, not with the experts held.

The backward passes are written out, for three reasons. The concatenated factors are made again there instead of being
kept. Of the forward, only the layer's input, the small hidden `x A^T` and the weights are kept. And the gradient of the
input comes from one product for all experts and the gate, where autograd would add up one tensor of the input's size
for each.

Shape letters: T tokens, I inputs, O outputs, E experts, K experts kept, R sum of ranks, S scores of a gate.
"""

from __future__ import annotations

from typing import Any, Iterator, Optional, Sequence

import torch
from torch import Tensor
from torch.autograd import Function


NORM_EPSILON = 1e-6


def project(x: Tensor, rows: Sequence[Tensor], num_scores: int, dtype: torch.dtype) -> tuple[Tensor, Optional[Tensor]]:
    """Multiply the input by the experts' A factors and by a gate, in one product.

    Args:
        x: `[..., I]`; its tokens are flattened.
        rows: factors `[rank, I]`, the gate's `[S, I]` last; stacked or one by one.
        num_scores: how many of all rows are the gate's, S.
        dtype: in which to multiply.

    Returns:
        hidden_TR in that dtype, and scores_TS = (x / rms(x)) W^T, at least float32, or None where S is 0.
    """
    if torch.is_autocast_enabled(x.device.type):  # the dtype is chosen already
        with torch.autocast(x.device.type, enabled=False):
            return project(x, rows, num_scores, dtype)
    if not torch.is_grad_enabled():
        return _project(x, rows, num_scores, dtype)[:2]
    return _Project.apply(x, num_scores, dtype, *rows)


def add_stacked(
    result: Tensor, hidden_TR: Tensor, weights_TE: Tensor, columns: Sequence[Tensor], ranks: Sequence[int]
) -> Tensor:
    """The base layer's result plus the update of all experts.

    Args:
        result: `[..., O]`.
        columns: factors `[O, rank]`, stacked or one by one.
        ranks: rank of each expert; they add up to R.

    Returns:
        A new tensor in the result's dtype; the products run in the hidden's.
    """
    if not torch.is_grad_enabled():
        return _add_stacked(result, hidden_TR, weights_TE, ranks, columns)
    return _AddStacked.apply(result, hidden_TR, weights_TE, ranks, *columns)


def add_sparse(
    result: Tensor,
    x: Tensor,
    weights_TE: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    kept: int,
    dtype: torch.dtype,
) -> Tensor:
    """The base layer's result plus the update of each token's kept experts.

    Args:
        result, x: `[..., O]` and `[..., I]`.
        weights_TE: at most `kept` entries of a row are not zero.
        rows, columns: A `[rank, I]` and B `[O, rank]` of each expert, in the order of the weights.

    Returns:
        A new tensor in the result's dtype. A weight that is not among the kept gets no gradient.
    """
    return _AddSparse.apply(result, x, weights_TE, kept, dtype, *rows, *columns)


def weigh(hidden: Tensor, weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """Multiply each expert's block of ranks `[..., R]` by that expert's weight `[..., E]`."""
    if len(set(ranks)) == 1:
        by_expert = hidden.view(*hidden.shape[:-1], len(ranks), ranks[0])
        return (by_expert * weights.unsqueeze(-1)).view(hidden.shape)
    blocks = [block * weights[..., i : i + 1] for i, block in enumerate(hidden.split(ranks, dim=-1))]
    return torch.cat(blocks, dim=-1)


def _project(
    x: Tensor, rows: Sequence[Tensor], num_scores: int, dtype: torch.dtype
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    flat = _flat(x, dtype)
    product = flat @ _join(rows, dtype, dim=0).t()
    if not num_scores:
        return product, None, None
    inverse_rms = _inverse_rms(flat)
    num_ranks = product.shape[1] - num_scores
    return product[:, :num_ranks], product[:, num_ranks:] * inverse_rms, inverse_rms  # scores become float32


class _Project(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_scores: int, dtype: torch.dtype, *rows: Tensor) -> tuple[Tensor, Tensor]:
        hidden, scores, inverse_rms = _project(x, rows, num_scores, dtype)
        ctx.save_for_backward(x, scores, inverse_rms, *rows)
        ctx.dtype = dtype
        return hidden, scores

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, grad_scores: Tensor) -> tuple[Optional[Tensor], ...]:
        x, scores, inverse_rms, *rows = ctx.saved_tensors
        needs_x, _, _, *needs_rows = ctx.needs_input_grad
        flat = _flat(x, ctx.dtype)
        grad_product = grad_hidden.to(ctx.dtype)
        if inverse_rms is not None:
            if torch.is_grad_enabled():  # what was saved is a constant to second derivatives
                inverse_rms = _inverse_rms(flat)
            grad_product = torch.cat([grad_product, (grad_scores * inverse_rms).to(ctx.dtype)], dim=1)
        grad_x = None
        if needs_x:
            grad_x = grad_product @ _join(rows, ctx.dtype, dim=0)
            if inverse_rms is not None:  # d (1 / rms) / dx = -x / (I rms^3)
                pull = (grad_scores * scores).sum(dim=1, keepdim=True) * inverse_rms.square() / flat.shape[1]
                grad_x.addcmul_(flat, pull.to(ctx.dtype), value=-1)
            grad_x = grad_x.to(x.dtype).reshape(x.shape)
        grad_rows = _grad_of_parts(grad_product, flat, rows, needs_rows, dim=0)
        return grad_x, None, None, *grad_rows


def _add_stacked(
    result: Tensor, hidden: Tensor, weights: Tensor, ranks: Sequence[int], columns: Sequence[Tensor]
) -> Tensor:
    weighted = weigh(hidden, weights.to(hidden.dtype), ranks)
    B = _join(columns, hidden.dtype, dim=1)
    flat = result.reshape(-1, result.shape[-1])
    if result.dtype == hidden.dtype:
        return torch.addmm(flat, weighted, B.t()).reshape(result.shape)
    return (flat + weighted @ B.t()).to(result.dtype).reshape(result.shape)


class _AddStacked(Function):
    @staticmethod
    def forward(
        ctx: Any, result: Tensor, hidden: Tensor, weights: Tensor, ranks: Sequence[int], *columns: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, weights, *columns)
        ctx.ranks = ranks
        return _add_stacked(result, hidden, weights, ranks, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        hidden, weights, *columns = ctx.saved_tensors
        needs_result, needs_hidden, needs_weights, _, *needs_columns = ctx.needs_input_grad
        grad_update = grad.reshape(-1, grad.shape[-1]).to(hidden.dtype)
        cast_weights = weights.to(hidden.dtype)
        grad_hidden = grad_weights = None
        if needs_hidden or needs_weights:
            grad_weighted = grad_update @ _join(columns, hidden.dtype, dim=1)
            if needs_hidden:
                grad_hidden = weigh(grad_weighted, cast_weights, ctx.ranks)
            if needs_weights:
                grad_weights = _sum_by_expert(grad_weighted * hidden, ctx.ranks).to(weights.dtype)
        grad_columns: Sequence[Optional[Tensor]] = [None] * len(columns)
        if any(needs_columns):
            weighted = weigh(hidden, cast_weights, ctx.ranks)
            grad_columns = _grad_of_parts(weighted, grad_update, columns, needs_columns, dim=1)
        return grad if needs_result else None, grad_hidden, grad_weights, None, *grad_columns


class _AddSparse(Function):
    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, weights: Tensor, kept: int, dtype: torch.dtype, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weights, *factors)
        ctx.kept, ctx.dtype = kept, dtype
        flat = x.reshape(-1, x.shape[-1])
        updated = result.reshape(-1, result.shape[-1]).to(torch.promote_types(result.dtype, dtype), copy=True)
        for expert, tokens, expert_weights in _tokens_by_expert(weights, kept):
            A, B = _factors_of(expert, factors, dtype)
            hidden = (flat.index_select(0, tokens).to(dtype) @ A.t()) * expert_weights.to(dtype)
            # a token meets an expert once, so that its row can be read, added to and put back
            updated.index_copy_(0, tokens, _add_product(updated.index_select(0, tokens), hidden, B.t()))
        return updated.to(result.dtype).reshape(result.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weights, *factors = ctx.saved_tensors
        needs_result, needs_x, needs_weights, _, _, *needs_factors = ctx.needs_input_grad
        flat, grad_flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.zeros_like(flat, dtype=ctx.dtype) if needs_x else None
        grad_weights = torch.zeros_like(weights) if needs_weights else None
        grad_factors = [torch.zeros_like(f) if needed else None for f, needed in zip(factors, needs_factors)]
        num_experts = weights.shape[1]
        for expert, tokens, expert_weights in _tokens_by_expert(weights, ctx.kept):
            A, B = _factors_of(expert, factors, ctx.dtype)
            inputs = flat.index_select(0, tokens).to(ctx.dtype)
            grad_update = grad_flat.index_select(0, tokens).to(ctx.dtype)
            expert_weights = expert_weights.to(ctx.dtype)
            hidden, grad_weighted = inputs @ A.t(), grad_update @ B
            grad_hidden = grad_weighted * expert_weights
            if needs_x:
                rows = grad_x.index_select(0, tokens)
                grad_x.index_copy_(0, tokens, _add_product(rows, grad_hidden, A))
            if needs_weights:
                by_token = (grad_weighted * hidden).sum(dim=1).to(weights.dtype)
                grad_weights[:, expert].index_copy_(0, tokens, by_token)
            if needs_factors[expert]:
                grad_factors[expert].copy_(grad_hidden.t() @ inputs)
            if needs_factors[num_experts + expert]:
                grad_factors[num_experts + expert].copy_(grad_update.t() @ (hidden * expert_weights))
        grad_x = grad_x.to(x.dtype).reshape(x.shape) if needs_x else None
        return grad if needs_result else None, grad_x, grad_weights, None, None, *grad_factors


def _tokens_by_expert(weights_TE: Tensor, kept: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that some token keeps: its column, those tokens, and their weights for it, `[tokens, 1]`."""
    values_TK, experts_TK = weights_TE.topk(kept, dim=-1, sorted=False)
    order = experts_TK.flatten().argsort(stable=True)
    counts = torch.bincount(experts_TK.flatten(), minlength=weights_TE.shape[1]).tolist()
    hit = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in hit]
    tokens, values = order // kept, values_TK.flatten()[order].unsqueeze(-1)
    return zip(hit, tokens.split(sizes), values.split(sizes))


def _factors_of(expert: int, factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return factors[expert].to(dtype), factors[len(factors) // 2 + expert].to(dtype)


def _add_product(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.addmm(rows, left, right) if rows.dtype == left.dtype else rows + left @ right


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.dtype == dtype else flat.to(dtype)


def _join(parts: Sequence[Tensor], dtype: torch.dtype, *, dim: int) -> Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
    return joined if joined.dtype == dtype else joined.to(dtype)


def _grad_of_parts(
    ranks_TR: Tensor, features_TF: Tensor, parts: Sequence[Tensor], needed: Sequence[bool], *, dim: int
) -> Sequence[Optional[Tensor]]:
    """The gradients of factors `[rank, F]` (`dim` 0) or `[F, rank]` (`dim` 1), side by side along the rank.

    Args:
        ranks_TR, features_TF: what stands on the two sides of the factors, one of them the gradient.
        needed: which parts train; one product where all do.
    """
    sizes = [part.shape[dim] for part in parts]
    if not all(needed):
        shares = ranks_TR.split(sizes, dim=1)
        grads = [_outer(share, features_TF, dim) if need else None for share, need in zip(shares, needed)]
        return [None if grad is None else grad.to(part.dtype) for grad, part in zip(grads, parts)]
    grad, dtypes = _outer(ranks_TR, features_TF, dim), {part.dtype for part in parts}
    if dim == 1 and len(set(sizes)) == 1 and len(dtypes) == 1:  # one copy that leaves every part contiguous
        grad = grad.unflatten(1, (len(parts), sizes[0])).transpose(0, 1)
        return grad.to(*dtypes, memory_format=torch.contiguous_format).unbind()
    grad = grad.to(*dtypes) if len(dtypes) == 1 else grad
    return [share.to(part.dtype) for share, part in zip(grad.split(sizes, dim=dim), parts)]


def _outer(ranks_TR: Tensor, features_TF: Tensor, dim: int) -> Tensor:
    return ranks_TR.t() @ features_TF if dim == 0 else features_TF.t() @ ranks_TR


def _inverse_rms(x_TI: Tensor) -> Tensor:
    """1 / rms of each token `[T, 1]`, at least float32.

    A norm reads x once and writes one number a token; the mean of squares would write all of x again.
    """
    norm = torch.linalg.vector_norm(x_TI, dim=-1, keepdim=True)
    norm = norm if norm.dtype.itemsize >= 4 else norm.float()
    return torch.rsqrt(norm.square() / x_TI.shape[-1] + NORM_EPSILON)


def _sum_by_expert(by_rank_TR: Tensor, ranks: Sequence[int]) -> Tensor:
    if len(set(ranks)) == 1:
        return by_rank_TR.unflatten(-1, (len(ranks), ranks[0])).sum(dim=-1)
    return torch.stack([block.sum(dim=-1) for block in by_rank_TR.split(ranks, dim=-1)], dim=-1)
