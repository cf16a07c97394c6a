"""Sums over the parts of a text, each part as often as a bootstrap drew it: what every metric of routing is made of.

Shape letters: U parts, D domains, L gates, E experts, M = L * E.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ext.router_study.collect.counts import Counts


@dataclass(frozen=True)
class Totals:
    """Sums by domain, float64; the fields are those of `Counts`.

    Args:
        together_MM, next_in_rank_LEE: over all domains; the latter is None where it was not counted.
    """

    tokens_D: Tensor
    chosen_DLE: Tensor
    first_DLE: Tensor
    probability_DLE: Tensor
    together_MM: Tensor
    confidence_DL4: Tensor
    neighbours_D: Tensor
    repeats_DL2: Tensor
    next_in_rank_LEE: Tensor | None

    @property
    def num_experts(self) -> int:
        return self.chosen_DLE.shape[-1]

    @property
    def num_tokens(self) -> float:
        return float(self.tokens_D.sum())

    @property
    def chosen_LE(self) -> Tensor:
        """N_e: how many tokens chose each expert."""
        return self.chosen_DLE.sum(dim=0)

    @property
    def num_chosen_L(self) -> Tensor:
        """k: experts of a token, on average where their number varies."""
        return self.chosen_LE.sum(dim=-1) / self.num_tokens

    def pairs_LEE(self) -> Tensor:
        """N_ij: how many tokens chose both experts of a gate; the diagonal is N_i."""
        L, E = self.chosen_LE.shape
        return torch.diagonal(self.together_MM.view(L, E, L, E), dim1=0, dim2=2).permute(2, 0, 1)

    def across_LEE(self) -> Tensor:
        """How many tokens chose e at a gate and e' at the next, one matrix for each pair of neighbours."""
        L, E = self.chosen_LE.shape
        return torch.diagonal(self.together_MM.view(L, E, L, E), offset=1, dim1=0, dim2=2).permute(2, 0, 1)


def totals_of(counts: Counts, num_domains: int, weights_U: Tensor | None = None) -> Totals:
    """Add up the parts.

    Args:
        counts: the parts of the first domain come first, and as many for each domain.
        weights_U: how often each part counts; None counts each once.
    """
    num_parts = counts.shape[0]
    weights_U = torch.ones(num_parts) if weights_U is None else weights_U
    drawn_U = weights_U.nonzero()[:, 0]  # a bootstrap leaves out a third of the parts

    def by_domain(table: Tensor) -> Tensor:
        weighted = table.double() * weights_U.double().view(-1, *[1] * (table.ndim - 1))
        return weighted.unflatten(0, (num_domains, -1)).sum(dim=1)

    def in_all(table: Tensor) -> Tensor:
        total = torch.zeros(table.shape[1:], dtype=torch.float64)
        for part in drawn_U.tolist():
            total.add_(table[part], alpha=float(weights_U[part]))
        return total

    return Totals(
        tokens_D=by_domain(counts.tokens_U),
        chosen_DLE=by_domain(counts.chosen_ULE),
        first_DLE=by_domain(counts.first_ULE),
        probability_DLE=by_domain(counts.probability_ULE),
        together_MM=in_all(counts.together_UMM),
        confidence_DL4=by_domain(counts.confidence_UL4),
        neighbours_D=by_domain(counts.neighbours_U),
        repeats_DL2=by_domain(counts.repeats_UL2),
        next_in_rank_LEE=in_all(counts.next_in_rank_ULEE) if len(counts.next_in_rank_ULEE) else None,
    )
