"""Whether a token goes where the token before it went (Mixtral, Jiang et al. 2024, arXiv:2401.04088, section 5).

Shape letters: D domains, L gates.
"""

import torch
from torch import Tensor

from moe_ext.router_study.collect.totals import Totals
from moe_ext.router_study.metrics.metric import Metric


def first_choice(totals: Totals) -> Tensor:
    """The part of neighbours with the same first choice, [L]. By chance 1 / E; with uneven loads more, as the shuffled
    control shows."""
    return totals.repeats_DL2[..., 0].sum(dim=0) / totals.neighbours_D.sum().clamp_min(1)


def either_choice(totals: Totals) -> Tensor:
    """The part of neighbours that share any expert, [L]. By chance 1 - C(E - k, k) / C(E, k): 46 % for 2 of 8."""
    return totals.repeats_DL2[..., 1].sum(dim=0) / totals.neighbours_D.sum().clamp_min(1)


def first_choice_by_domain(totals: Totals) -> Tensor:
    """`first_choice` in each domain, [D, L]."""
    return totals.repeats_DL2[..., 0] / totals.neighbours_D.clamp_min(1)[:, None]


def _first_by_chance(totals: Totals) -> Tensor:
    return torch.full((len(totals.chosen_LE),), 1 / totals.num_experts, dtype=torch.float64)


def _first_by_chance_in_domains(totals: Totals) -> Tensor:
    return _first_by_chance(totals).expand(len(totals.tokens_D), -1)


def _either_by_chance(totals: Totals) -> Tensor:
    E, k_L = float(totals.num_experts), totals.num_chosen_L

    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

    all_L = torch.full_like(k_L, E)
    none_shared_L = (log_choose(all_L - k_L, k_L.clamp_max(E - k_L)) - log_choose(all_L, k_L)).exp()
    return torch.where(2 * k_L > E, 1.0, 1 - none_shared_L)


METRICS = (
    Metric("repetition.first", first_choice, _first_by_chance, "tokens", ("layer",), "same first choice"),
    Metric("repetition.either", either_choice, _either_by_chance, "tokens", ("layer",), "any expert shared"),
    Metric(
        "repetition.first_by_domain",
        first_choice_by_domain,
        _first_by_chance_in_domains,
        "tokens",
        ("domain", "layer"),
        "same first choice, by domain",
    ),
)
