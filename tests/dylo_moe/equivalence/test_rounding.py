"""The yardstick of rounding: small, repeatable, and of the size that float32 really has."""

import pytest
import torch
from torch import nn

from dylo_moe.equivalence.rounding import SAFETY, largest_difference, rounding_effect, rounding_errors


@pytest.fixture
def deep():
    torch.manual_seed(0)
    blocks = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*blocks, nn.Linear(64, 8))


@torch.no_grad()
def test_float32_stays_within_the_tolerance_and_within_sight_of_it(deep):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    effect = rounding_effect(deep, lambda: deep(x))
    single = deep(x)
    of_float32 = largest_difference(single, deep.double()(x.double()))
    assert effect / 16 < of_float32 < SAFETY * effect


@torch.no_grad()
def test_a_draw_is_repeatable_and_leaves_no_hook(deep):
    x = torch.ones(2, 64)
    clean, moved = deep(x), []
    for seed in (0, 0, 1):
        with rounding_errors(deep, seed):
            moved.append(deep(x))
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
    assert torch.equal(deep(x), clean) and not torch.equal(moved[0], clean)


def test_the_effect_on_gradients_can_be_measured(deep):
    x = torch.ones(2, 64)
    effect = rounding_effect(deep, lambda: torch.autograd.grad(deep(x).sum(), deep[0].weight)[0])
    assert 0 < effect < 1e-4


def test_a_value_that_is_not_a_number_is_infinitely_far():
    assert largest_difference(torch.tensor([1.0, torch.nan]), torch.ones(2)) == torch.inf
