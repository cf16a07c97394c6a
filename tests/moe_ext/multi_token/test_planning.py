import itertools

import pytest
import torch

from moe_ext.multi_token.planning import FixedPlan, PassCosts, Planner, measure_costs


def long_run(choices, kinds, costs):
    """Tokens a millisecond where each kind of position always drafts the same number."""
    tokens = sum(share * (1 + sum(gates[:k])) for (share, gates), k in zip(kinds, choices, strict=True))
    taken = sum(share * costs[k] for (share, _), k in zip(kinds, choices, strict=True))
    return tokens / taken


@pytest.mark.parametrize(
    "costs",
    [(1.0, 1.1, 1.2, 1.3), (1.0, 1.4, 1.8, 2.2), (1.0, 1.9, 2.8, 3.7), (1.0, 2.5, 4.0, 5.5)],
)
def test_in_the_long_run_no_fixed_choice_gives_more_tokens_a_second(costs):
    kinds = [(0.5, [0.9, 0.8, 0.7]), (0.5, [0.3, 0.1, 0.02])]  # easy and hard positions, half each
    best = max(long_run(choice, kinds, costs) for choice in itertools.product(range(4), repeat=2))
    planner = Planner(PassCosts(costs))
    for _ in range(400):
        for _, gates in kinds:
            drafted = planner.choose(torch.tensor([gates]))
            planner.record(drafted, 1 + sum(gates[:drafted]))
    chosen = [planner.choose(torch.tensor([gates])) for _, gates in kinds]
    assert long_run(chosen, kinds, costs) == pytest.approx(best, rel=1e-6)


def test_a_draft_that_is_never_right_is_never_made():
    planner = Planner(PassCosts((1.0, 1.01, 1.02)))
    assert planner.choose(torch.tensor([[0.0, 0.0]])) == 0


def test_a_draft_that_is_free_and_may_be_right_is_always_made():
    planner = Planner(PassCosts((1.0, 1.0, 1.0)))
    assert planner.choose(torch.tensor([[0.1, 0.05]])) == 2


def test_a_batch_expects_what_all_its_rows_accept():
    planner = Planner(PassCosts((1.0, 1.3)))
    assert planner.choose(torch.tensor([[0.5]])) == 1
    assert planner.choose(torch.tensor([[0.5], [0.5]])) == 0


def test_a_fixed_plan_is_fixed():
    plan = FixedPlan(2)
    plan.record(2, 1)
    assert plan.choose(torch.zeros(1, 3)) == 2


def test_every_length_of_pass_is_timed_in_turns():
    asked = []
    costs = measure_costs(asked.append, 3, rounds=2)
    assert asked == [0, 1, 2, 3] * 4  # two rounds to warm up
    assert len(costs.ms) == 4
