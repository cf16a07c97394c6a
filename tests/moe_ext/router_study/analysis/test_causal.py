"""Experts taken away and tokens sent elsewhere: against models that are changed by hand."""

import copy

import pytest
import torch
from tiny_models import tiny_model

from moe_ext.router_study import MoEModelWrapper
from moe_ext.router_study.analysis.causal import (
    intervene,
    overrule_for,
    row_losses,
    send_to,
    send_to_next,
    take_away,
    take_away_at_random,
)
from moe_ext.router_study.collect.data import TokenRows

WEIGHTS = torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.0, 0.7, 0.3, 0.0]])
LOGITS = torch.tensor([[5.0, 4.0, 1.0, 2.0], [0.5, 4.0, 3.0, 0.0]])


@pytest.fixture
def wrapper():
    model = tiny_model("olmoe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(50)  # so that an expert matters
    return MoEModelWrapper(model)


@pytest.fixture
def text():
    ids = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 8:] = False
    return {"text": TokenRows(ids, mask)}


def test_interventions_change_the_weights_they_say():
    torch.testing.assert_close(take_away(1)(WEIGHTS, LOGITS), torch.tensor([[0.6, 0, 0, 0], [0, 0, 0.3, 0]]))
    moved = send_to(1, 2)(WEIGHTS, LOGITS)
    torch.testing.assert_close(moved, torch.tensor([[0.6, 0, 0.4, 0], [0, 0, 1.0, 0]]))
    following = send_to_next(1)(WEIGHTS, LOGITS)
    torch.testing.assert_close(following, torch.tensor([[0.6, 0, 0, 0.4], [0.7, 0, 0.3, 0]]))
    everyone = torch.full((1, 4), 0.25)
    torch.testing.assert_close(send_to_next(1)(everyone, LOGITS[:1]), torch.tensor([[0.25, 0, 0.25, 0.25]]))
    generator = torch.Generator().manual_seed(0)
    kept = take_away_at_random(0.25, generator)(torch.ones(1000, 8), torch.ones(1000, 8))
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.02)


def test_an_expert_that_is_taken_away_is_one_whose_output_is_zero(wrapper, text):
    (found,) = intervene(wrapper, text, lambda *_: 0.25, experts=[2], replicates=50)[:1]
    other = copy.deepcopy(wrapper.model)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj[2].zero_()
    before, after = (
        row_losses(MoEModelWrapper(model), text["text"], batch_size=3) for model in (wrapper.model, other)
    )
    expected = (after - before)[:, 0].sum() / before[:, 1].sum()
    assert found.change == pytest.approx(float(expected), abs=1e-6)
    assert (found.layer, found.expert, found.domain) == (0, 2, "text")
    assert found.low <= found.change <= found.high
    assert found.change != 0


def test_an_expert_that_nobody_chooses_changes_nothing(text):
    model = tiny_model("olmoe", num_experts_per_tok=1)
    with torch.no_grad():  # scores s, -s, 2 s and s / 2: the last is never the largest
        weight = model.model.layers[0].mlp.gate.weight
        weight[1:] = torch.tensor([-1.0, 2.0, 0.5])[:, None] * weight[0]
    found = intervene(MoEModelWrapper(model), text, lambda *_: 0.0, experts=[3], replicates=20)
    assert found[0].change == 0 == found[0].low == found[0].high
    assert found[0].control == pytest.approx(0, abs=1e-6)  # nothing is taken away at random either


def test_tokens_sent_to_an_equal_expert_lose_nothing(wrapper, text):
    experts = wrapper.gates.layers[1].experts
    with torch.no_grad():
        experts.gate_up_proj[3].copy_(experts.gate_up_proj[0])
        experts.down_proj[3].copy_(experts.down_proj[0])
    found = [
        one for one in intervene(wrapper, text, lambda *_: 0.25, to="3", experts=[0], replicates=20) if one.layer == 1
    ]
    assert found[0].change == pytest.approx(0, abs=1e-6)
    assert abs(found[0].control) > 1e-4


def test_losses_are_those_of_the_model_itself(wrapper, text):
    held = text["text"]
    labels = held.ids_NS.masked_fill(~held.mask_NS, -100)
    with torch.no_grad():
        expected = wrapper.model(held.ids_NS, attention_mask=held.mask_NS.long(), labels=labels).loss
    found = row_losses(wrapper, held, batch_size=2).sum(dim=0)
    assert float(found[0] / found[1]) == pytest.approx(float(expected), rel=1e-5)
    assert int(found[1]) == 4 * 11 + 7


def test_what_was_measured_is_not_measured_again(wrapper, text, monkeypatch):
    kept = {}

    def measured(name, measure):
        return kept[name] if name in kept else kept.setdefault(name, measure())

    found = intervene(wrapper, text, lambda *_: 0.25, replicates=20, measured=measured)
    assert len(kept) == 1 + 2 * 4 and "gate 1, expert 3" in kept
    monkeypatch.setattr("moe_ext.router_study.analysis.causal.row_losses", None)
    assert intervene(wrapper, text, lambda *_: 0.25, measured=measured) == found


def test_unknown_experts_and_places_are_refused(wrapper, text):
    with pytest.raises(ValueError, match=r"expert 4\b.*\b0 to 3\b"):
        intervene(wrapper, text, lambda *_: 0.25, experts=[4])
    with pytest.raises(ValueError, match=r"\bto\b.*'away'.*nowhere, next.*\b0 to 3\b"):
        overrule_for("away", 0, 4)
