import itertools
from collections import Counter

import pytest
import torch

from moe_ext.multi_token.decoding.planning import Choice, FixedPlan, PassCosts, Planner, measure_costs


def long_run(choices, kinds, costs):
    """Tokens a millisecond where each kind of position always takes the same source and number."""
    tokens = taken = 0.0
    for choice, (share, gates) in zip(choices, kinds, strict=True):
        tokens += share * (1 + (sum(gates[choice.source][: choice.num_drafts]) if choice.source else 0))
        taken += share * (costs[choice.source][choice.num_drafts] if choice.source else costs["heads"][0])
    return tokens / taken


def as_tensors(gates):
    return {name: torch.tensor([row]) for name, row in gates.items()}


@pytest.mark.parametrize(
    "costs",
    [(1.0, 1.1, 1.2, 1.3), (1.0, 1.4, 1.8, 2.2), (1.0, 1.9, 2.8, 3.7), (1.0, 2.5, 4.0, 5.5)],
)
@pytest.mark.parametrize("copy_costs", [(1.0, 1.05, 1.1, 1.15), (1.0, 3.0, 5.0, 7.0)])
def test_in_the_long_run_no_fixed_choice_gives_more_tokens_a_second(costs, copy_costs):
    costs = {"heads": costs, "copies": copy_costs}
    kinds = [  # a third each: easy for heads, hard for both, in a circle
        (1 / 3, {"heads": [0.9, 0.8, 0.7], "copies": []}),
        (1 / 3, {"heads": [0.3, 0.1, 0.02], "copies": [0.2, 0.1, 0.1]}),
        (1 / 3, {"heads": [0.5, 0.3, 0.1], "copies": [0.95, 0.9, 0.85]}),
    ]
    choices = [
        [Choice(), *(Choice(name, k) for name, row in gates.items() for k in range(1, len(row) + 1))]
        for _, gates in kinds
    ]
    best = max(long_run(choice, kinds, costs) for choice in itertools.product(*choices))
    planner = Planner(PassCosts(1.0, costs))
    for _ in range(400):
        for _, gates in kinds:
            choice = planner.choose(as_tensors(gates))
            planner.record(choice, 1 + sum(gates[choice.source][: choice.num_drafts]) if choice.source else 1)
    chosen = [planner.choose(as_tensors(gates)) for _, gates in kinds]
    assert long_run(chosen, kinds, costs) == pytest.approx(best, rel=1e-6)


def test_a_draft_that_is_never_right_is_never_made():
    planner = Planner(PassCosts(1.0, {"heads": (1.0, 1.01, 1.02)}))
    assert planner.choose({"heads": torch.tensor([[0.0, 0.0]])}) == Choice()


def test_a_draft_that_is_free_and_may_be_right_is_always_made():
    planner = Planner(PassCosts(1.0, {"heads": (1.0, 1.0, 1.0)}))
    assert planner.choose({"heads": torch.tensor([[0.1, 0.05]])}) == Choice("heads", 2)


def test_of_two_sources_that_promise_the_same_the_cheaper_one_drafts():
    costs = PassCosts(1.0, {"heads": (1.0, 1.5), "copies": (1.0, 1.1)})
    gates = {"heads": torch.tensor([[0.8]]), "copies": torch.tensor([[0.8]])}
    assert Planner(costs).choose(gates) == Choice("copies", 1)
    assert Planner(costs.of(["heads"])).choose({"heads": gates["heads"]}) == Choice("heads", 1)


def test_a_batch_expects_what_all_its_rows_accept():
    planner = Planner(PassCosts(1.0, {"heads": (1.0, 1.3)}))
    assert planner.choose({"heads": torch.tensor([[0.5]])}) == Choice("heads", 1)
    assert planner.choose({"heads": torch.tensor([[0.5], [0.5]])}) == Choice()


def test_a_source_that_promises_too_much_is_no_longer_asked():
    planner = Planner(PassCosts(1.0, {"heads": (1.0, 1.4), "copies": (1.0, 1.4)}))
    gates = {"heads": torch.tensor([[0.9]]), "copies": torch.tensor([[0.7]])}
    assert planner.choose(gates) == Choice("heads", 1)
    for _ in range(60):
        choice = planner.choose(gates)
        planner.record(choice, 1 if choice.source == "heads" else 2)  # of the heads no draft ever stands
    assert planner.choose(gates) == Choice("copies", 1)


def passes(planner, gates, num_passes):
    """How often each source is asked and drafts in so many passes; what is promised stands."""
    asked, drafted = Counter(), Counter()
    for _ in range(num_passes):
        heard = {name: row for name, row in gates.items() if planner.asks(name)}
        asked.update(heard.keys())
        choice = planner.choose(as_tensors(heard))
        drafted[choice.source] += 1
        stood = sum(gates[choice.source][: choice.num_drafts]) if choice.source else 0
        planner.record(choice, 1 + stood)
    return asked, drafted


def test_a_source_that_is_dear_to_ask_and_promises_little_is_asked_now_and_then():
    planner = Planner(PassCosts(1.0, {"heads": (1.2, 1.4), "copies": (1.03, 1.1)}))
    hard, easy = {"heads": [0.3], "copies": [0.3]}, {"heads": [0.95], "copies": [0.3]}
    passes(planner, hard, 40)
    asked, drafted = passes(planner, hard, 160)
    assert asked == {"heads": 20, "copies": 160}  # in every eighth pass
    assert drafted == {"copies": 160}
    _, drafted = passes(planner, easy, 160)
    assert drafted["heads"] > 160 - 8  # from the next time it is asked


def test_where_nothing_promises_its_cost_passes_are_all_but_plain():
    planner = Planner(PassCosts(1.0, {"heads": (1.2, 1.4), "copies": (1.03, 1.1)}))
    nothing = {"heads": [0.01], "copies": [0.01]}
    passes(planner, nothing, 60)
    before = planner.ms
    _, drafted = passes(planner, nothing, 160)
    assert drafted == {None: 160}
    assert (planner.ms - before) / 160 == pytest.approx(1.0 + (0.2 + 0.03) / 8)


def test_of_two_sources_that_promise_the_same_one_is_asked():
    planner = Planner(PassCosts(1.0, {"heads": (1.2, 1.4), "copies": (1.1, 1.3)}))
    gates = {"heads": [0.9], "copies": [0.9]}
    passes(planner, gates, 60)
    asked, _ = passes(planner, gates, 160)
    assert asked == {"copies": 160, "heads": 20}


def test_a_fixed_plan_is_fixed_as_far_as_there_are_drafts():
    plan = FixedPlan(2)
    plan.record(Choice("heads", 2), 1)
    assert plan.choose({"heads": torch.zeros(1, 3)}) == Choice("heads", 2)
    assert plan.choose({"heads": torch.zeros(1, 1)}) == Choice("heads", 1)
    assert plan.choose({"heads": torch.zeros(1, 0)}) == Choice()


def test_many_lengths_of_pass_are_timed_in_turns_and_the_rest_lies_between(monkeypatch):
    asked, now = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def run_pass(name, size):
        asked.append((name, size))
        now[0] += {None: 0.5, "heads": 2, "copies": 1}[name] * (1 + size) / 1e3

    costs = measure_costs(run_pass, {"heads": 3, "copies": 10}, rounds=2)
    turn = [(None, 0), ("heads", 0), ("heads", 1), ("heads", 2), ("heads", 3)]
    turn += [("copies", size) for size in (0, 1, 2, 3, 4, 6, 8, 10)]
    assert asked == turn * 4  # two rounds to warm up
    assert costs.plain_ms == pytest.approx(0.5)
    assert costs.ms["heads"] == pytest.approx([2, 4, 6, 8])
    assert costs.ms["copies"] == pytest.approx([1 + size for size in range(11)])


def test_a_pass_that_was_held_up_counts_as_no_slower_than_a_longer_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    took = {(None, 0): 3.0, ("heads", 0): 9.0, ("heads", 1): 4.0, ("heads", 2): 7.0, ("heads", 3): 5.0}

    def run_pass(name, size):
        now[0] += took[name, size] / 1e3

    costs = measure_costs(run_pass, {"heads": 3}, rounds=1)
    assert costs.ms["heads"] == pytest.approx([4, 4, 5, 5]) and costs.plain_ms == pytest.approx(3)
