"""From the experts of one layer to those of the next.

Shape letters: L gates, E experts.
"""

import torch
from torch import Tensor

from moe_ext.router_study.collect.totals import Totals
from moe_ext.router_study.metrics.metric import Metric


def transition(totals: Totals) -> Tensor:
    """P(e' | e), [L - 1, E, E], row e: of the choices that tokens of e make at the next gate, those that fall on e'.

    N_(e,e') / sum_e' N_(e,e') over all pairs of a token's choices. By chance f_e', the share of e'.
    """
    across_LEE = totals.across_LEE()
    return across_LEE / across_LEE.sum(dim=-1, keepdim=True).clamp_min(1)


def information(totals: Totals) -> Tensor:
    """sum p(e, e') log(p(e, e') / p(e) p(e')), [L - 1], nats: what a choice at one gate tells of one at the next
    (Shannon 1948). By chance 0."""
    across_LEE = totals.across_LEE()
    p_LEE = across_LEE / across_LEE.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    apart_LEE = p_LEE.sum(dim=2, keepdim=True) * p_LEE.sum(dim=1, keepdim=True)
    return torch.special.xlogy(p_LEE, p_LEE / apart_LEE.clamp_min(1e-300)).sum(dim=(1, 2))


def _share_of_the_next(totals: Totals) -> Tensor:
    share_LE = totals.chosen_LE / totals.chosen_LE.sum(dim=-1, keepdim=True)
    return share_LE[1:, None, :].expand(-1, totals.num_experts, -1)


def _nothing(totals: Totals) -> Tensor:
    return torch.zeros(len(totals.chosen_LE) - 1, dtype=torch.float64)


METRICS = (
    Metric(
        "transitions.probability", transition, _share_of_the_next, "tokens", ("step", "expert", "other"), "P(e' | e)"
    ),
    Metric(
        "transitions.information",
        information,
        _nothing,
        "tokens",
        ("step",),
        "nats that a choice tells of one at the next layer",
    ),
)
