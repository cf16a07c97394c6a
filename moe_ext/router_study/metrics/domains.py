"""What experts have to do with the domain of the text.

Shape letters: D domains, L gates, E experts.
"""

import math

import torch
from torch import Tensor

from moe_ext.router_study.collect.totals import Totals
from moe_ext.router_study.metrics.metric import Metric


def rate(totals: Totals) -> Tensor:
    """N_(e,d) / N_d, [D, L, E]: the part of a domain's tokens that choose the expert (OLMoE's domain specialisation,
    Muennighoff et al. 2024, arXiv:2409.02060, section 5.3). By chance k / E."""
    return totals.chosen_DLE / totals.tokens_D.clamp_min(1)[:, None, None]


def share_of_expert(totals: Totals) -> Tensor:
    """P(d | e), [D, L, E]: of an expert's tokens those of the domain, all domains counted as equally long.

    By chance 1 / D.
    """
    rate_DLE = rate(totals)
    return rate_DLE / rate_DLE.sum(dim=0, keepdim=True).clamp_min(1e-30)


def divergence(totals: Totals) -> Tensor:
    """H(mean_d f_d) - mean_d H(f_d), [L], nats: the Jensen-Shannon divergence of the domains' shares (Lin 1991).

    At most log D. It is the mutual information of domain and expert where all domains are equally long. By chance 0.
    """
    share_DLE = totals.chosen_DLE / totals.chosen_DLE.sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share_DLE.mean(dim=0)).sum(dim=-1) - torch.special.entr(share_DLE).sum(dim=-1).mean(
        dim=0
    )


def pairwise_divergence(totals: Totals) -> Tensor:
    """The Jensen-Shannon divergence of every two domains, [D, D, L], nats, at most log 2. By chance 0."""
    share_DLE = totals.chosen_DLE / totals.chosen_DLE.sum(dim=-1, keepdim=True).clamp_min(1)
    middle = (share_DLE[:, None] + share_DLE[None]) / 2
    entropy_DL = torch.special.entr(share_DLE).sum(dim=-1)
    return torch.special.entr(middle).sum(dim=-1) - (entropy_DL[:, None] + entropy_DL[None]) / 2


def information(totals: Totals) -> Tensor:
    """I(domain; expert) / log D, [L], over all choices as they fall: 1 where the expert gives the domain away
    (Shannon 1948). By chance 0."""
    p_DLE = totals.chosen_DLE / totals.chosen_DLE.sum(dim=(0, 2), keepdim=True).clamp_min(1)
    apart_DLE = p_DLE.sum(dim=2, keepdim=True) * p_DLE.sum(dim=0, keepdim=True)
    nats_L = torch.special.xlogy(p_DLE, p_DLE / apart_DLE.clamp_min(1e-300)).sum(dim=(0, 2))
    return nats_L / math.log(len(p_DLE))


def _rate_by_chance(totals: Totals) -> Tensor:
    k_L = totals.num_chosen_L
    return (k_L / totals.num_experts)[None, :, None].expand_as(totals.chosen_DLE)


def _even_domains(totals: Totals) -> Tensor:
    return torch.full_like(totals.chosen_DLE, 1 / len(totals.chosen_DLE))


def _nothing(totals: Totals) -> Tensor:
    return torch.zeros(len(totals.chosen_LE), dtype=torch.float64)


def _no_pair(totals: Totals) -> Tensor:
    D, L, _ = totals.chosen_DLE.shape
    return torch.zeros(D, D, L, dtype=torch.float64)


# Of one domain alone only the first can be told.
OF_ONE = (Metric("domains.rate", rate, _rate_by_chance, "tokens", ("domain", "layer", "expert"), "rate in a domain"),)
METRICS = (
    *OF_ONE,
    Metric(
        "domains.share_of_expert",
        share_of_expert,
        _even_domains,
        "tokens",
        ("domain", "layer", "expert"),
        "share of a domain in an expert's tokens",
    ),
    Metric(
        "domains.divergence", divergence, _nothing, "tokens", ("layer",), "Jensen-Shannon divergence of the domains"
    ),
    Metric(
        "domains.pairwise_divergence",
        pairwise_divergence,
        _no_pair,
        "tokens",
        ("domain", "other_domain", "layer"),
        "Jensen-Shannon divergence of two domains",
    ),
    Metric("domains.information", information, _nothing, "tokens", ("layer",), "information of domain and expert"),
)
