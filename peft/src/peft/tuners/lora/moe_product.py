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

The stacked form is two matrix products however many experts there are. The sparse form sorts the tokens by expert, so
that each expert multiplies a segment of them; its arithmetic grows with the experts kept for a token, not with the
experts held.

The backward passes are written out, for three reasons. The concatenated factors are made again there instead of being
kept. Of the forward, only the layer's input, the small hidden `x A^T` and the weights are kept. And the gradient of the
input comes from one product for all experts and the gate, where autograd would add up one tensor of the input's size
for each.

Shape letters: T tokens, I inputs, O outputs, E experts, K experts kept, N = T K rows sorted by expert, R sum of
ranks, S scores of a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
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
    """The base layer's result plus the update of each token's kept experts, all of one rank.

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
        values_TK, experts_TK = weights.topk(kept, dim=-1, sorted=False)
        order_N, places_TK, sizes = _sort_by_expert(experts_TK, weights.shape[1])
        A, B = _factors_of(factors, dtype)
        inputs = _flat(x, x.dtype).index_select(0, order_N // kept).to(dtype)
        hidden = _segment_products(inputs, [factor.t() for factor in A], sizes)
        weighted = hidden * values_TK.flatten()[order_N].to(dtype).unsqueeze(1)
        update = _segment_products(weighted, [factor.t() for factor in B], sizes)
        ctx.save_for_backward(x, weights, experts_TK, order_N, places_TK, hidden, *factors)
        ctx.dtype, ctx.sizes = dtype, sizes
        updated = F.embedding_bag(places_TK, update, mode="sum").to(torch.promote_types(result.dtype, dtype))
        return updated.add_(_flat(result, result.dtype)).to(result.dtype).reshape(result.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weights, experts_TK, order_N, places_TK, hidden, *factors = ctx.saved_tensors
        needs_result, needs_x, needs_weights, _, _, *needs_factors = ctx.needs_input_grad
        dtype, sizes = ctx.dtype, ctx.sizes
        A, B = _factors_of(factors, dtype)
        tokens_N = order_N // experts_TK.shape[1]
        values = weights.gather(1, experts_TK).flatten()[order_N].to(dtype).unsqueeze(1)
        inputs = _flat(x, x.dtype).index_select(0, tokens_N).to(dtype)
        if torch.is_grad_enabled():  # what was saved is a constant to second derivatives
            hidden = _segment_products(inputs, [factor.t() for factor in A], sizes)
        grad_update = _flat(grad, grad.dtype).index_select(0, tokens_N).to(dtype)
        grad_weighted = _segment_products(grad_update, B, sizes)
        grad_hidden = grad_weighted * values
        grad_x = grad_weights = None
        if needs_x:
            grad_x = F.embedding_bag(places_TK, _segment_products(grad_hidden, A, sizes), mode="sum")
            grad_x = grad_x.to(x.dtype).reshape(x.shape)
        if needs_weights:
            grad_values = (grad_weighted * hidden).sum(dim=1).to(weights.dtype)
            grad_weights = torch.zeros_like(weights).scatter(1, experts_TK, grad_values[places_TK])
        pairs = [*zip(grad_hidden.split(sizes), inputs.split(sizes))]
        pairs += zip(grad_update.split(sizes), (hidden * values).split(sizes))
        grad_factors = [
            (left.t() @ right).to(factor.dtype) if needed else None
            for (left, right), factor, needed in zip(pairs, factors, needs_factors)
        ]
        return grad if needs_result else None, grad_x, grad_weights, None, None, *grad_factors


def _sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sort the choices of all tokens by expert.

    Returns:
        Which choice lies in each row, `[N]`; in which row each choice lies, `[T, K]`; how many rows each expert has.
    """
    experts_N = experts_TK.flatten()
    order_N = experts_N.argsort(stable=True)
    places_N = torch.empty_like(order_N)
    places_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return order_N, places_N.view(experts_TK.shape), torch.bincount(experts_N, minlength=num_experts).tolist()


def _segment_products(left_NF: Tensor, right: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Each expert's rows times its own factor `[F, G]`; `[N, G]`."""
    segments = left_NF.split(sizes)
    if torch.is_grad_enabled():
        return torch.cat([rows @ factor for rows, factor in zip(segments, right)])
    product = left_NF.new_empty(len(left_NF), right[0].shape[1])
    for rows, factor, place in zip(segments, right, product.split(sizes)):
        torch.mm(rows, factor, out=place)
    return product


def _factors_of(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    factors = [factor if factor.dtype == dtype else factor.to(dtype) for factor in factors]
    return factors[: len(factors) // 2], factors[len(factors) // 2 :]


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
