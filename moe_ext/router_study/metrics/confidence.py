"""How sure the gates are of a token's experts.

The figures are means over tokens of p, the E probabilities of a token in descending order. Chance is a gate that
prefers nothing, p_e = 1 / E; the control deals out each expert's scores among the tokens, so that a token's scores no
longer belong together.

Shape letters: L gates.
"""

import math

import torch
from torch import Tensor

from moe_ext.router_study.collect.totals import Totals
from moe_ext.router_study.metrics.metric import Metric


def _mean(totals: Totals, place: int) -> Tensor:
    return totals.confidence_DL4[..., place].sum(dim=0) / totals.num_tokens


def entropy(totals: Totals) -> Tensor:
    """-sum_e p_e log p_e / log E, [L]: a token's normalised entropy (Shannon 1948). By chance 1."""
    return _mean(totals, 0) / math.log(totals.num_experts)


def top1(totals: Totals) -> Tensor:
    """p_1, [L]: the probability of the first choice. By chance 1 / E."""
    return _mean(totals, 1)


def mass(totals: Totals) -> Tensor:
    """The sum of p over the chosen experts, [L]: what top-k keeps of the softmax. By chance k / E."""
    return _mean(totals, 2)


def margin(totals: Totals) -> Tensor:
    """p_k - p_(k+1), [L]: the last expert chosen less the best one not chosen. By chance 0."""
    return _mean(totals, 3)


def _constant(value_of):
    def chance(totals: Totals) -> Tensor:
        return torch.ones_like(totals.num_chosen_L) * value_of(totals)

    return chance


METRICS = (
    Metric("confidence.entropy", entropy, _constant(lambda _: 1.0), "columns", ("layer",), "entropy of a token"),
    Metric(
        "confidence.top1", top1, _constant(lambda t: 1 / t.num_experts), "columns", ("layer",), "top-1 probability"
    ),
    Metric(
        "confidence.mass",
        mass,
        _constant(lambda t: t.num_chosen_L / t.num_experts),
        "columns",
        ("layer",),
        "probability of all chosen experts",
    ),
    Metric("confidence.margin", margin, _constant(lambda _: 0.0), "columns", ("layer",), "margin of rank k to k + 1"),
)
