import math

import numpy as np
import pytest
import torch

from moe_ext.moqe.experts.expert import load_expert
from moe_ext.moqe.training.evaluation import (
    ORACLE_SEQUENCE,
    ORACLE_TOKEN,
    REFERENCE,
    STATIC,
    UNIFORM,
    Measured,
    measure,
)
from moe_ext.moqe.training.rows import Row


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return [
        Row([0, *torch.randint(2, 4000, (length,), generator=generator).tolist()], length, source, document)
        for source, document, length in (("a", 0, 6), ("a", 0, 3), ("a", 1, 8), ("b", 0, 5))
    ]


@torch.no_grad()
def losses_one_row_at_a_time(model, row):  # oracle: a row by itself, the experts as whole models
    tokens = torch.tensor([row.tokens])
    logits = torch.stack([e.model(tokens).logits[0, :-1] for e in model.expert_set.experts])
    weights = model.routing_weights(tokens, torch.ones_like(tokens))[0, :-1]

    def nats(logits_LV):
        return -logits_LV.log_softmax(-1)[range(len(row.tokens) - 1), row.tokens[1:]]

    singles = torch.stack([nats(own) for own in logits])
    return singles, nats(logits.mean(0)), nats(torch.einsum("le,elv->lv", weights, logits))


def test_every_way_costs_what_it_does_row_by_row(mixture, rows, tiny_base):
    measured = measure(mixture.expert_set, {"router": mixture}, rows, batch_size=3, reference=load_expert(tiny_base))
    expected = {way: np.zeros(3) for way in ("int2", "int3", UNIFORM, "router", ORACLE_TOKEN, ORACLE_SEQUENCE)}
    for row, document in zip(rows, (0, 0, 1, 2), strict=True):
        singles, uniform, routed = losses_one_row_at_a_time(mixture, row)
        expected["int2"][document] += singles[0].sum().item()
        expected["int3"][document] += singles[1].sum().item()
        expected[UNIFORM][document] += uniform.sum().item()
        expected["router"][document] += routed.sum().item()
        expected[ORACLE_TOKEN][document] += singles.amin(0).sum().item()
        expected[ORACLE_SEQUENCE][document] += singles.sum(1).amin().item()
    for way, nats in expected.items():
        np.testing.assert_allclose(measured.nats[way], nats, rtol=1e-4, err_msg=way)
    np.testing.assert_allclose(measured.nats[STATIC], measured.nats[UNIFORM])  # a new mixture's static weights
    assert REFERENCE in measured.nats
    assert measured.tokens.tolist() == [9, 8, 5]
    assert measured.num_bytes.tolist() == [9, 8, 5]
    assert sum(measured.usage["router"]) == pytest.approx(1.0)


def test_in_sequence_mode_the_prefix_is_predicted_by_the_default_expert(mixture, rows, monkeypatch):
    mixture.router.config.mode, mixture.router.config.prefix_length = "sequence", 3
    mixture.default_expert = 0
    monkeypatch.setattr(mixture.router, "choice", lambda scores, mask: torch.ones(len(scores), dtype=torch.long))
    measured = measure(mixture.expert_set, {"router": mixture}, rows[3:], batch_size=1)
    singles, _, _ = losses_one_row_at_a_time(mixture, rows[3])
    # Places 0 and 1 predict tokens 1 and 2; the choice is made by reading token 2, so it holds from place 2 on.
    expected = singles[0, :2].sum() + singles[1, 2:].sum()
    assert measured.nats["router"][0] == pytest.approx(expected.item(), rel=1e-4)


def two_ways(gain, num_documents=40):
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 150, num_documents).astype(float)
    nats = tokens * generator.normal(3.0, 0.5, num_documents)
    better = nats - tokens * generator.normal(gain, 0.02, num_documents)
    sources = ["a"] * (num_documents // 2) + ["b"] * (num_documents // 2)
    return Measured(sources, tokens, tokens * 3, {"better": better, "other": nats}, {})


def test_the_interval_holds_the_gain_and_not_nothing():
    gain, low, high = two_ways(0.05).difference("better", "other", resamples=500)
    assert low < gain < high
    assert low > 0.03 and high < 0.07


def test_without_a_gain_the_interval_holds_nothing():
    _, low, high = two_ways(0.0).difference("better", "other", resamples=500)
    assert low < 0 < high


def test_the_same_documents_are_drawn_for_both_ways():
    # Documents differ by far more than the ways do: unpaired, the interval would be many times as wide.
    measured = two_ways(0.05)
    _, low, high = measured.difference("better", "other", resamples=500)
    per_token = measured.nats["other"] / measured.tokens
    assert high - low < 0.2 * per_token.std() / math.sqrt(len(per_token)) * 4


def test_perplexity_and_bits_a_byte_weigh_tokens_and_sources_alike():
    measured = Measured(
        ["a", "a", "b"], np.array([1.0, 3.0, 2.0]), np.array([4.0, 4.0, 4.0]), {"w": np.array([1.0, 5.0, 4.0])}, {}
    )
    assert measured.perplexity("w", "a") == pytest.approx(math.exp(6 / 4))
    assert measured.mean_nats("w") == pytest.approx((6 / 4 + 4 / 2) / 2)
    assert measured.bits_per_byte("w") == pytest.approx((6 / 8 + 4 / 4) / 2 / math.log(2))
