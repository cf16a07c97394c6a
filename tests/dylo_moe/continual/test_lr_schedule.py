"""`TwoPhaseLRScheduler` against its formula, written out once more."""

import math

import pytest
import torch

from dylo_moe.continual.lr_schedule import TwoPhaseLRScheduler

STEPS = {"seed_steps": 10, "consolidate_steps": 5, "warmup_steps": 2, "ratio": 0.2}


def optimizer_of(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def rates_of(optimizer, scheduler, num_steps):
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def closed_form(step):
    if step < 2:
        return (step + 1) / 3
    if step < 10:
        return 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2
    if step < 15:
        return 0.2 * (1 + math.cos(math.pi * (step - 10) / 5)) / 2
    return 0.0


def test_the_rate_follows_the_formula_in_every_group():
    optimizer = optimizer_of(1.0, 3.0)
    scheduler = TwoPhaseLRScheduler(optimizer, **STEPS)
    expected = [[closed_form(step), 3 * closed_form(step)] for step in range(17)]
    torch.testing.assert_close(rates_of(optimizer, scheduler, 17), expected)


def test_the_peak_is_reached_behind_the_warmup_and_the_phases_meet():
    optimizer = optimizer_of(1.0)
    rates = [rate for (rate,) in rates_of(optimizer, TwoPhaseLRScheduler(optimizer, **STEPS), 15)]
    assert max(rates) == rates[2] == 1.0
    assert rates[10] == 0.2
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.parametrize("stopped", [1, 9, 10, 12])
def test_a_run_goes_on_from_its_state(stopped):
    optimizer = optimizer_of(1.0)
    whole = rates_of(optimizer, TwoPhaseLRScheduler(optimizer, **STEPS), 15)
    optimizer = optimizer_of(1.0)
    scheduler = TwoPhaseLRScheduler(optimizer, **STEPS)
    rates_of(optimizer, scheduler, stopped)
    other = optimizer_of(1.0)
    resumed = TwoPhaseLRScheduler(other, **STEPS)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert rates_of(other, resumed, 15 - stopped) == whole[stopped:]


def test_without_a_seed_phase_it_only_consolidates():
    optimizer = optimizer_of(1.0)
    scheduler = TwoPhaseLRScheduler(optimizer, seed_steps=0, consolidate_steps=4, ratio=0.5)
    expected = [[0.5 * (1 + math.cos(math.pi * step / 4)) / 2] for step in range(4)]
    torch.testing.assert_close(rates_of(optimizer, scheduler, 4), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed_steps": -1}, "seed_steps.*-1.*consolidate_steps 5"),
        ({"seed_steps": 0, "consolidate_steps": 0, "warmup_steps": 0}, "together they must make at least one step"),
        ({"warmup_steps": 11}, r"warmup_steps.*\b11\b.*\b0\b.*seed_steps \(10\)"),
        ({"ratio": 1.5}, r"ratio.*\b1\.5\b"),
    ],
)
def test_steps_that_do_not_fit_together_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        TwoPhaseLRScheduler(optimizer_of(1.0), **{**STEPS, **changed})
