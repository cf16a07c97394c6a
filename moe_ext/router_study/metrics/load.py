"""How evenly the experts are used.

Shape letters: L gates, E experts. N tokens choose k of E experts each; N_e of them choose expert e.
"""

import math

import torch
from torch import Tensor

from moe_ext.router_study.collect.totals import Totals
from moe_ext.router_study.metrics.metric import Metric


def share(totals: Totals) -> Tensor:
    """f_e = N_e / (k N), [L, E]: the part of all choices that an expert gets. By chance 1 / E."""
    chosen_LE = totals.chosen_LE
    return chosen_LE / chosen_LE.sum(dim=-1, keepdim=True)


def variation(totals: Totals) -> Tensor:
    """std_e(f_e) / mean_e(f_e), [L]: the coefficient of variation (Shazeer et al. 2017, arXiv:1701.06538, section 4).

    By chance sqrt((E - k) / (k N)): each token draws k experts, and the loads differ by luck alone.
    """
    share_LE = share(totals)
    return share_LE.std(dim=-1, unbiased=False) / share_LE.mean(dim=-1)


def busiest(totals: Totals) -> Tensor:
    """E * max_e f_e, [L]: how many times its even share the busiest expert takes. By chance 1."""
    return totals.num_experts * share(totals).amax(dim=-1)


def evenness(totals: Totals) -> Tensor:
    """-sum_e f_e log f_e / log E, [L]: the normalised entropy of the loads (Pielou 1966). By chance 1."""
    return torch.special.entr(share(totals)).sum(dim=-1) / math.log(totals.num_experts)


def dead(totals: Totals) -> Tensor:
    """The number of experts that no token chose, [L]. By chance E (1 - k / E)^N, which is 0 for any real text."""
    return (totals.chosen_LE == 0).sum(dim=-1).double()


def balance(totals: Totals) -> Tensor:
    """E sum_e f_e P_e, [L], with P_e the mean probability of e: what the balance loss of the Switch Transformer holds
    down (Fedus et al. 2021, arXiv:2101.03961, equation 4). By chance 1."""
    probability_LE = totals.probability_DLE.sum(dim=0) / totals.num_tokens
    return totals.num_experts * (share(totals) * probability_LE).sum(dim=-1)


def _variation_by_chance(totals: Totals) -> Tensor:
    k_L = totals.num_chosen_L
    return ((totals.num_experts - k_L).clamp_min(0) / (k_L * totals.num_tokens)).sqrt()


def _dead_by_chance(totals: Totals) -> Tensor:
    missed_L = (1 - totals.num_chosen_L / totals.num_experts).clamp_min(0)
    return totals.num_experts * missed_L**totals.num_tokens


def _one(totals: Totals) -> Tensor:
    return torch.ones(len(totals.chosen_LE), dtype=torch.float64)


def _even(totals: Totals) -> Tensor:
    return torch.full_like(totals.chosen_LE, 1 / totals.num_experts)


METRICS = (
    Metric("load.share", share, _even, "labels", ("layer", "expert"), "share of an expert"),
    Metric("load.variation", variation, _variation_by_chance, "labels", ("layer",), "coefficient of variation"),
    Metric("load.busiest", busiest, _one, "labels", ("layer",), "busiest expert over the even share"),
    Metric("load.evenness", evenness, _one, "labels", ("layer",), "normalised entropy of the loads"),
    Metric("load.dead", dead, _dead_by_chance, "labels", ("layer",), "experts that no token chose"),
    Metric("load.balance", balance, _one, "labels", ("layer",), "E sum f P"),
)
