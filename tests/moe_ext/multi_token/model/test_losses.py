import math

import pytest
import torch

from moe_ext.multi_token.model.losses import LossWeights, copy_loss, head_loss, router_losses


def losses(logits, right=None, judged=None, on=None, budget=2.0):
    every = torch.ones_like(logits, dtype=torch.bool)
    return router_losses(
        logits,
        right_NH=every if right is None else right,
        judged_NH=every if judged is None else judged,
        on_NH=every if on is None else on,
        budget=budget,
    )


def test_the_cross_entropy_counts_judged_heads_alone():
    torch.manual_seed(0)
    logits = torch.randn(5, 3)
    right, judged = torch.rand(5, 3) < 0.5, torch.rand(5, 3) < 0.6
    written_out = [
        -math.log(1 / (1 + math.exp(-float(logits[n, h]) * (1 if right[n, h] else -1))))
        for n in range(5)
        for h in range(3)
        if judged[n, h]
    ]
    assert float(losses(logits, right, judged)["bce"]) == pytest.approx(sum(written_out) / len(written_out), rel=1e-5)


def test_heads_used_alike_are_balanced_and_one_that_does_it_all_is_not():
    certain = torch.full((4, 3), 20.0)
    assert float(losses(certain)["balance"]) == pytest.approx(1.0, rel=1e-4)
    first_only = torch.tensor([[20.0, -20.0, -20.0]]).repeat(4, 1)
    on = torch.tensor([[True, False, False]]).repeat(4, 1)
    assert float(losses(first_only, on=on)["balance"]) == pytest.approx(3.0, rel=1e-4)


def test_entropy_is_highest_at_one_half():
    assert float(losses(torch.zeros(2, 1))["entropy"]) == pytest.approx(math.log(2), rel=1e-5)
    assert float(losses(torch.full((2, 1), 15.0))["entropy"]) < 1e-4


@pytest.mark.parametrize(("budget", "expected"), [(3.0, 0.0), (2.0, 1.0), (1.0, 4.0)])
def test_the_budget_counts_what_the_gates_exceed_it_by(budget, expected):
    assert float(losses(torch.full((4, 3), 20.0), budget=budget)["budget"]) == pytest.approx(expected, abs=1e-4)


def test_certain_gates_have_finite_gradients():
    logits = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    sum(losses(logits).values()).backward()
    assert torch.isfinite(logits.grad).all()


def test_heads_that_are_off_do_not_count():
    nll = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    on = torch.tensor([[True, True], [True, False]])
    assert float(head_loss(nll, on)) == 2.0
    assert float(head_loss(nll, torch.zeros_like(on))) == 0.0


def test_each_weight_counts_for_its_loss():
    parts = {
        name: torch.tensor(value)
        for name, value in {
            "bce": 0.1,
            "copy_bce": 0.5,
            "balance": 0.2,
            "entropy": 0.3,
            "budget": 0.4,
        }.items()
    }
    weights = LossWeights(bce=1, balance=10, entropy=100, budget=1000)
    assert float(weights.total(parts)) == pytest.approx(0.1 + 0.5 + 2 + 30 + 400)


def test_copies_count_where_they_are_judged():
    torch.manual_seed(0)
    logits, right, judged = torch.randn(4, 3), torch.rand(4, 3) < 0.5, torch.rand(4, 3) < 0.6
    written_out = [
        -math.log(1 / (1 + math.exp(-float(logits[n, k]) * (1 if right[n, k] else -1))))
        for n in range(4)
        for k in range(3)
        if judged[n, k]
    ]
    assert float(copy_loss(logits, right, judged)) == pytest.approx(sum(written_out) / len(written_out), rel=1e-5)
