"""Allocation against all possible allocations of small problems."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")
pytest.importorskip("scipy", reason="needs the extra 'quant'")

from moe_ext.router_ft.allocation import allocate, rounding_errors, sensitivities, solve
from moe_ext.router_ft.matrices import find_matrices


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    slack=st.floats(0, 1),
)
def test_no_allocation_of_all_is_cheaper(rows, columns, seed, slack):
    rng = np.random.default_rng(seed)
    cost, weight = rng.random((rows, columns)), rng.integers(1, 20, (rows, columns)).astype(float)
    lowest, highest = weight.min(axis=1).sum(), weight.max(axis=1).sum()
    capacity = lowest + slack * (highest - lowest)
    found = solve(cost, weight, capacity)
    choices = [
        (cost[range(rows), choice].sum(), choice)
        for choice in itertools.product(range(columns), repeat=rows)
        if weight[range(rows), choice].sum() <= capacity * (1 + 1e-12)
    ]
    assert weight[range(rows), found].sum() <= capacity * (1 + 1e-9)
    assert cost[range(rows), found].sum() == pytest.approx(min(choices)[0])


@pytest.fixture
def mixture(model_of):
    model = model_of("olmoe")
    matrices = find_matrices(model)
    alphas = np.random.default_rng(0).uniform(1.5, 6, len(matrices)).tolist()
    return model, matrices, {matrix.name: alpha for matrix, alpha in zip(matrices, alphas, strict=True)}


@pytest.mark.parametrize("budget", [3.5, 4.0, 5.3, 8.0])
def test_a_plan_costs_what_it_may_and_little_less(mixture, budget):
    model, matrices, alphas = mixture
    plan = allocate(model, matrices, alphas, budget_bits=budget)
    assert budget - 0.3 < plan.bits_per_weight <= budget
    assert {plan.formats[matrix.name] for matrix in matrices if matrix.kind == "dense"} == {"BF16"}


def test_heavy_tails_get_the_bits_in_one_direction_and_lose_them_in_the_other(mixture):
    model, matrices, alphas = mixture

    def mean_alpha_of_int4(direction):
        plan = allocate(model, matrices, alphas, budget_bits=4, formats=("INT4", "INT3"), sensitivity=direction)
        return np.mean([alphas[name] for name, given in plan.formats.items() if given == "INT4"])

    assert mean_alpha_of_int4("lower_alpha") < mean_alpha_of_int4("none") < mean_alpha_of_int4("higher_alpha")


def test_the_sensitivity_is_a_factor_about_one():
    alphas = [2.0, 4.0]
    assert sensitivities(alphas, "lower_alpha").tolist() == [1.5, 0.75]
    assert sensitivities(alphas, "higher_alpha").tolist() == [pytest.approx(2 / 3), pytest.approx(4 / 3)]
    assert sensitivities(alphas, "none").tolist() == [1, 1]


def test_chance_deals_out_the_same_factors():
    alphas = list(range(2, 30))
    dealt = sensitivities(alphas, "random", seed=1)
    assert sorted(dealt) == sorted(sensitivities(alphas, "lower_alpha"))
    assert dealt.tolist() != sensitivities(alphas, "random", seed=2).tolist()


def test_fewer_bits_lose_more_of_a_matrix(mixture):
    model, matrices, _ = mixture
    errors = rounding_errors(model, matrices[:3], ["BF16", "MXFP8", "INT4", "INT3", "INT2"])
    assert (np.diff(errors, axis=1) > 0).all()


def test_dense_matrices_may_compete_with_experts(mixture):
    model, matrices, alphas = mixture
    plan = allocate(model, matrices, alphas, budget_bits=4, dense_format=None)
    assert "BF16" not in plan.formats.values()
    assert plan.bits_per_weight <= 4


def test_a_budget_below_the_cheapest_format_is_refused_with_both_numbers(mixture):
    model, matrices, alphas = mixture
    with pytest.raises(ValueError, match=r"\b3 bits.*\b3\.5\b"):
        allocate(model, matrices, alphas, budget_bits=3)


def test_a_missing_alpha_is_named(mixture):
    model, matrices, alphas = mixture
    del alphas["model.layers.1.mlp.experts.3.up_proj"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj \(1 of 24"):
        allocate(model, matrices, alphas, budget_bits=4)
