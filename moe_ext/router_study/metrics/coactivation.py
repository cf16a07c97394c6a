"""Which experts are chosen together, by one gate and by gates of different layers.

N tokens; N_i choose expert i, N_ij choose both i and j. All pairs count, not only those next to each other in rank.

Shape letters: L gates, E experts, M = L * E.
"""

import torch
from torch import Tensor

from moe_ext.router_study.collect.totals import Totals
from moe_ext.router_study.metrics.metric import Metric


def conditional(totals: Totals) -> Tensor:
    """P(j | i) = N_ij / N_i, [L, E, E], row i; the diagonal is 0 (OLMoE, Muennighoff et al. 2024, arXiv:2409.02060,
    section 5.2).

    By chance a token's other k - 1 experts are drawn by their loads: (k - 1) N_j / sum_(m != i) N_m.
    """
    pairs_LEE = totals.pairs_LEE()
    return _off_diagonal(pairs_LEE / totals.chosen_LE.clamp_min(1)[..., None])


def conditional_as_in_script(totals: Totals) -> Tensor:
    """The same with N_ij of tokens alone that rank i and j one after the other, as the OLMoE authors' script counts.

    Raises:
        ValueError: that was not counted.
    """
    if totals.next_in_rank_LEE is None:
        raise ValueError("Experts next to each other in rank were not counted. Collect with in_rank (--as_in_script).")
    return totals.next_in_rank_LEE / totals.chosen_LE.clamp_min(1)[..., None]


def jaccard(totals: Totals) -> Tensor:
    """N_ij / (N_i + N_j - N_ij), [L, E, E]; the diagonal is 0 (Jaccard 1912).

    Of independent experts f_i f_j / (f_i + f_j - f_i f_j), with f = N_i / N.
    """
    pairs_LEE, chosen_LE = totals.pairs_LEE(), totals.chosen_LE
    either_LEE = chosen_LE[..., :, None] + chosen_LE[..., None, :] - pairs_LEE
    return _off_diagonal(pairs_LEE / either_LEE.clamp_min(1))


def conditional_by_chance(totals: Totals) -> Tensor:
    """P(j | i) where a token's other experts are drawn by their loads, [L, E, E]."""
    chosen_LE = totals.chosen_LE
    others_LE = chosen_LE.sum(dim=-1, keepdim=True) - chosen_LE
    drawn_L = (totals.num_chosen_L - 1).clamp_min(0)
    chance_LEE = drawn_L[:, None, None] * chosen_LE[..., None, :] / others_LE.clamp_min(1)[..., :, None]
    return _off_diagonal(chance_LEE.clamp_max(1))


def jaccard_by_chance(totals: Totals) -> Tensor:
    """The Jaccard index of independent experts, [L, E, E]."""
    f_LE = totals.chosen_LE / totals.num_tokens
    both_LEE = f_LE[..., :, None] * f_LE[..., None, :]
    either_LEE = f_LE[..., :, None] + f_LE[..., None, :] - both_LEE
    return _off_diagonal(both_LEE / either_LEE.clamp_min(1e-30))


def strongest(totals: Totals) -> Tensor:
    """max_ij P(j | i), [L]: the pair that is chosen together most. By chance the largest of its chance values."""
    return conditional(totals).amax(dim=(1, 2))


def strongest_as_in_script(totals: Totals) -> Tensor:
    """max_ij of `conditional_as_in_script`, [L]."""
    return conditional_as_in_script(totals).amax(dim=(1, 2))


def excess(totals: Totals) -> Tensor:
    """mean_ij |P(j | i) - chance|, [L], over i != j: how far pairs are from being drawn by load. By chance 0."""
    E = totals.num_experts
    return (conditional(totals) - conditional_by_chance(totals)).abs().sum(dim=(1, 2)) / (E * (E - 1))


def correlation_of_masks(totals: Totals) -> Tensor:
    """The phi coefficient of "token chose (gate, e)" and "token chose (gate', e')", [M, M] (Pearson 1900).

    (N N_ab - N_a N_b) / sqrt(N_a (N - N_a) N_b (N - N_b)); 0 where an expert is chosen always or never. By chance 0
    between gates; within a gate negative, since a token's k choices are limited.
    """
    N, together_MM = totals.num_tokens, totals.together_MM
    chosen_M = together_MM.diagonal()
    spread_M = (chosen_M * (N - chosen_M)).clamp_min(0).sqrt()
    covariance_MM = N * together_MM - chosen_M[:, None] * chosen_M[None]
    spread_MM = spread_M[:, None] * spread_M[None]
    return torch.where(spread_MM > 0, covariance_MM / spread_MM.clamp_min(1e-30), 0.0)


def across_layers(totals: Totals) -> Tensor:
    """mean_e max_e' |phi((l, e), (l', e'))|, [L, L]: how well an expert's best partner in another layer tells whether
    it is chosen; 1 on the diagonal. By chance 0."""
    L, E = totals.chosen_LE.shape
    return correlation_of_masks(totals).abs().view(L, E, L, E).amax(dim=3).mean(dim=1)


def _off_diagonal(table_LEE: Tensor) -> Tensor:
    return table_LEE * (1 - torch.eye(table_LEE.shape[-1], dtype=table_LEE.dtype))


def _nothing(totals: Totals) -> Tensor:
    return torch.zeros(len(totals.chosen_LE), dtype=torch.float64)


def _identity(totals: Totals) -> Tensor:
    return torch.eye(len(totals.chosen_LE), dtype=torch.float64)


def _strongest_by_chance(totals: Totals) -> Tensor:
    return conditional_by_chance(totals).amax(dim=(1, 2))


METRICS = (
    Metric(
        "coactivation.conditional",
        conditional,
        conditional_by_chance,
        "columns",
        ("layer", "expert", "other"),
        "P(j | i)",
    ),
    Metric(
        "coactivation.jaccard", jaccard, jaccard_by_chance, "columns", ("layer", "expert", "other"), "Jaccard index"
    ),
    Metric("coactivation.strongest", strongest, _strongest_by_chance, "columns", ("layer",), "strongest pair"),
    Metric("coactivation.excess", excess, _nothing, "columns", ("layer",), "mean distance of pairs from chance"),
    Metric(
        "coactivation.across_layers",
        across_layers,
        _identity,
        "tokens",
        ("layer", "other_layer"),
        "correlation of an expert with its best partner in another layer",
    ),
)
IN_SCRIPT = (
    Metric(
        "coactivation.strongest_as_in_script",
        strongest_as_in_script,
        _strongest_by_chance,
        "columns",
        ("layer",),
        "strongest pair of neighbours in rank",
    ),
)
