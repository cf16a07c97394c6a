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
"""The routed update when few of many experts are kept: each token meets its own experts only.

The stacked product multiplies every token by every expert and throws most of it away. Here the tokens are sorted by
expert, each expert multiplies the tokens it was given, and the parts are added up where they belong; the arithmetic
grows with the experts kept for a token, not with the experts held.

Shape letters: T tokens, K experts kept, E experts, I inputs, O outputs, R sum of ranks.
"""

from __future__ import annotations

import torch


def pays(num_tokens: int, ranks: list[int], kept: int | None) -> bool:
    """Whether to take this path: where all ranks are at least 64 times those that a token keeps.

    Sorting and gathering cost more than a plain matrix product of the same size. On two CPU cores, with 1024 inputs and
    outputs, rank 16 and top-2, this path took 1.5 / 0.7 / 0.5 times the stacked product's time for 64 / 128 / 256
    experts at 512 tokens, and 0.9 / 0.7 / 0.6 times at one token.
    """
    if kept is None or torch.compiler.is_compiling() or num_tokens == 0:
        return False
    return sum(ranks) >= 64 * kept * max(ranks)


def sparse_update(
    x_TI: torch.Tensor, weights_TE: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, ranks: list[int], kept: int
) -> torch.Tensor:
    """Sum over a token's kept experts of weight * B_e A_e x.

    Args:
        weights_TE: at most `kept` entries of a row are not zero; scalings are in them.
        A_RI, B_OR: the stacked factors, in the order of the columns.
        ranks: rank of each expert; they add up to R.

    Returns:
        delta_TO, in the dtype of x; differentiable in all four tensors.
    """
    values_TK, experts_TK = weights_TE.topk(kept, dim=-1, sorted=False)
    order = experts_TK.flatten().argsort(stable=True)
    tokens = order // kept
    counts = torch.bincount(experts_TK.flatten(), minlength=len(ranks)).tolist()
    gathered = x_TI[tokens].split(counts)
    weights = values_TK.flatten()[order].unsqueeze(-1).split(counts)
    factors = zip(A_RI.split(ranks, dim=0), B_OR.split(ranks, dim=1))
    parts = [
        ((x @ A.t()) * weight) @ B.t() for x, weight, (A, B) in zip(gathered, weights, factors, strict=True) if len(x)
    ]
    # Back to the order of the tokens, K rows each: a gather and a sum.
    return torch.cat(parts)[order.argsort()].unflatten(0, (len(x_TI), kept)).sum(dim=1)
