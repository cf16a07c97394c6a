"""Whole studies in Python: what does not fit a mixture is left out aloud, and intervals hold what they should."""

import pytest
import torch
from study_testing import activations_of
from tiny_models import lora_mixture, tiny_model

from moe_ext.router_study import MoEModelWrapper
from moe_ext.router_study.analysis.measure import drawn_parts, interval
from moe_ext.router_study.analysis.study import run_study
from moe_ext.router_study.collect.data import TokenRows
from moe_ext.router_study.collect.totals import totals_of
from moe_ext.router_study.collect.vocabulary_counts import predictions
from moe_ext.router_study.metrics.load import share
from moe_ext.router_study.metrics.vocabulary import favourites, specialisation, specialisation_by_chance


def text(num_ids=64):
    ids = torch.randint(3, num_ids, (6, 24), generator=torch.Generator().manual_seed(0))
    return {"text": TokenRows(ids, torch.ones_like(ids, dtype=torch.bool))}


def test_every_family_can_be_studied_whole(family):
    study = run_study(MoEModelWrapper(tiny_model(family)), text(), replicates=3, least_seen=1)
    assert study.weights.left_out == []
    assert {found.name for found in study.weights.compared} >= {"weights.cosine", "experts.agreement"}


@pytest.mark.parametrize("scope", ["layer", "block", "model"])
def test_a_lora_mixture_can_be_studied_and_what_it_lacks_is_said(scope):
    study = run_study(MoEModelWrapper(lora_mixture(router_scope=scope)), text(), replicates=3, least_seen=1)
    assert study.measured["load.share"].value.shape[-1] == 4
    assert any("hidden state" in reason for reason in study.weights.left_out) == (scope != "layer")
    assert any("rows cannot be compared" in reason for reason in study.weights.left_out) == (scope == "layer")


def test_the_interval_of_a_share_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        counts = activations_of(torch.randn(1, 1, 40, 8, 4, generator=generator), 1, num_groups=20).counts
        draws = [share(totals_of(counts, 1, drawn_parts(1, 20, generator)))[0, 0] for _ in range(100)]
        low, high = interval(torch.stack(draws), share(totals_of(counts, 1))[0, 0])
        held += bool(low <= 0.25 <= high)
    assert held >= 33  # 38 of 40 are expected; fewer than 33 would be one case in two hundred


def test_an_interval_is_the_spread_of_the_draws_around_the_value():
    draws = torch.arange(101, dtype=torch.float64)
    low, high = interval(draws, torch.tensor(7.0, dtype=torch.float64))
    assert float(high - low) == pytest.approx(95)
    assert float(low + high) / 2 == pytest.approx(7)


def test_a_bootstrap_draws_as_many_parts_of_each_domain_as_it_has():
    drawn = drawn_parts(3, 5, torch.Generator().manual_seed(0)).view(3, 5)
    assert drawn.sum(dim=1).tolist() == [5, 5, 5]


def test_the_vocabulary_figures_are_those_of_a_loop():
    table = torch.randint(0, 6, (2, 9, 3), generator=torch.Generator().manual_seed(0))
    table[1] = table[0].flip(-1)  # the same ids, as often, by another gate
    seen = table[0].sum(dim=-1).tolist()
    often = [place for place in range(9) if seen[place] >= 6]
    expected = sum(max(table[0, place].tolist()) / seen[place] for place in often) / len(often)
    assert specialisation(table, least_seen=6).tolist() == pytest.approx([expected] * 2)
    best = max(often, key=lambda place: int(table[0, place, 1]) / seen[place])
    part = int(table[0, best, 1]) / seen[best]
    assert favourites(table, 0, 1, least_seen=6)[0] == (best, pytest.approx(part), seen[best])
    assert torch.isnan(specialisation(table, least_seen=1000)).all()


def test_the_chance_of_a_favourite_is_that_of_so_many_draws():
    once = torch.zeros(1, 4, 2, dtype=torch.int32)
    once[0, :, 0] = 1  # an id that is seen once is always at its favourite
    assert specialisation_by_chance(once, least_seen=1) == 1
    twice = 2 * once
    assert specialisation_by_chance(twice, least_seen=1) == pytest.approx(0.75, abs=0.05)  # 1 or 1/2, even odds


def test_predictions_are_the_largest_logits_in_every_dtype():
    logits = torch.randn(2, 5, 31, generator=torch.Generator().manual_seed(0))
    assert torch.equal(predictions(logits), logits.argmax(dim=-1))
    assert torch.equal(predictions(logits.bfloat16()), logits.bfloat16().argmax(dim=-1))
