"""GPTQ against committed golden values, a plain implementation, and brute force on tiny matrices."""

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")

from moe_ext.gptq import hessian_of
from moe_ext.router_ft.formats import round_to_levels, spread
from moe_ext.router_ft.gptq import gptq


def load_plain():
    path = Path(__file__).parent / "plain_gptq.py"
    spec = importlib.util.spec_from_file_location("plain_gptq", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = load_plain()
GOLDEN = json.loads(plain.GOLDEN.read_text())


def run_case(number, **options):
    case = plain.make_case(number)
    return gptq(
        torch.from_numpy(case["weight"]),
        torch.from_numpy(case["hessian"]),
        torch.from_numpy(case["scale"]),
        case["name"],
        **options,
    ).numpy()


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_the_golden_values_are_met_to_the_last_bit(number):
    expected = np.array([[float.fromhex(x) for x in row] for row in GOLDEN[number]["rounded"]])
    np.testing.assert_array_equal(run_case(number), expected)


def test_the_golden_values_are_those_of_the_plain_implementation():
    number = 0
    case = plain.make_case(number)
    scales = case["scale"].repeat(case["group"], axis=1)
    found = plain.plain_gptq(case["weight"], case["hessian"], scales, case["name"], damp=0.01)
    assert [[x.hex() for x in row] for row in found.tolist()] == GOLDEN[number]["rounded"]


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_the_block_size_changes_nothing(block_size):
    np.testing.assert_array_equal(run_case(1, block_size=block_size), run_case(1))


def output_error(weight, rounded, hessian):
    lost = weight - rounded
    return float(((lost @ hessian) * lost).sum())


def tiny(seed, columns=4):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, columns, generator=generator, dtype=torch.float64)
    inputs[:, 1] += inputs[:, 0]
    weight = torch.randn(1, columns, generator=generator, dtype=torch.float64)
    return weight, hessian_of(inputs), torch.full((1, 1), 0.75, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_each_level_is_the_best_that_brute_force_finds_for_the_columns_still_free(seed):
    # GPTQ's own claim: with the columns before it fixed and those after it free to take any value, no level is better.
    weight, hessian, scale = tiny(seed)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    found = gptq(weight, hessian, scale, "INT2")
    order = torch.argsort(hessian.diagonal(), descending=True)
    fixed = []
    for column in order.tolist():
        free = [c for c in order.tolist() if c not in fixed and c != column]

        def best_error(level, column=column, free=free):
            lost = weight.clone()
            lost[0, fixed] -= found[0, fixed]
            lost[0, column] -= level
            if free:  # the free columns take what makes the whole error smallest
                known = [c for c in range(4) if c not in free]
                lost[0, free] = -torch.linalg.solve(damped[free][:, free], damped[free][:, known] @ lost[0, known])
            return float(((lost @ damped) * lost).sum())

        levels = [level * 0.75 for level in (-2, -1, 0, 1)]
        assert found[0, column].item() == min(levels, key=best_error)
        fixed.append(column)


def test_it_lies_between_the_best_of_all_roundings_and_rounding_to_nearest():
    shares = []
    for seed in range(30):
        weight, hessian, scale = tiny(seed)
        levels = torch.tensor(list(itertools.product((-2, -1, 0, 1), repeat=4)), dtype=torch.float64) * 0.75
        best = min(output_error(weight, level[None], hessian) for level in levels)
        nearest = output_error(weight, round_to_levels(weight, spread(scale, 4), "INT2"), hessian)
        found = output_error(weight, gptq(weight, hessian, scale, "INT2"), hessian)
        assert best <= found + 1e-9
        shares.append((found, nearest, best))
    found, nearest, best = map(sum, zip(*shares, strict=True))
    assert best <= found < nearest


def test_independent_inputs_leave_rounding_to_nearest():
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.full((5, 1), 0.3, dtype=torch.float64)
    diagonal = torch.diag(torch.arange(1.0, 33.0, dtype=torch.float64))
    expected = round_to_levels(weight, spread(scale, 32), "INT3")
    assert torch.equal(gptq(weight, diagonal, scale, "INT3"), expected)


def test_a_column_that_no_input_reached_is_rounded_and_not_zeroed():
    weight, hessian, scale = tiny(0)
    hessian[2], hessian[:, 2] = 0, 0
    weight[0, 2] = -1.4
    found = gptq(weight, hessian, scale, "INT2")
    assert torch.isfinite(found).all()
    assert found[0, 2] == -1.5


def test_inputs_that_are_not_finite_are_refused():
    weight, hessian, scale = tiny(0)
    hessian[1, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, hessian, scale, "INT2")


def test_the_hessian_is_that_of_the_squared_output_error():
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    lost = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    expected = (lost @ inputs.double().T).square().sum() * 2 / 50
    torch.testing.assert_close(torch.tensor(output_error(lost, 0, hessian_of(inputs))).double(), expected)
