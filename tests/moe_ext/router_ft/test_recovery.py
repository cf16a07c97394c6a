"""Recovery by hand, and an interval that holds what it says."""

import numpy as np
import pytest

from moe_ext.router_ft.recovery import measure_recovery


def losses(*values):
    return {"text": np.array(values, dtype=float)}


def test_recovery_is_the_share_of_the_damage_less_what_the_control_gains():
    full, quantized, finetuned, control = losses(2, 2), losses(3, 3), losses(2.6, 2.6), losses(1.9, 1.9)
    found = measure_recovery(full, quantized, finetuned, control)
    assert found.plain == pytest.approx(0.4)
    assert found.beyond_control == pytest.approx(0.3)
    assert found.damage == pytest.approx(1)
    assert (found.low, found.high) == (pytest.approx(0.3), pytest.approx(0.3))


def test_a_finetuning_that_harms_recovers_less_than_nothing():
    found = measure_recovery(losses(2), losses(2.5), losses(2.6), losses(2))
    assert found.plain == pytest.approx(-0.2)


def test_every_source_weighs_the_same():
    full = {"a": np.full(10, 1.0), "b": np.full(1, 1.0)}
    quantized = {"a": np.full(10, 2.0), "b": np.full(1, 4.0)}
    finetuned = {"a": np.full(10, 2.0), "b": np.full(1, 1.0)}
    assert measure_recovery(full, quantized, finetuned, full).plain == pytest.approx(3 / 4)


def test_the_interval_holds_the_truth_about_nineteen_times_of_twenty():
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        full = 2 + rng.normal(size=40) * 0.5
        damage = 0.3 + rng.normal(size=40) * 0.1
        repaired = 0.25 * 0.3 + rng.normal(size=40) * 0.05
        arrays = (full, full + damage, full + damage - repaired, full)
        found = measure_recovery(*({"text": values} for values in arrays), seed=seed)
        held += found.low <= 0.25 <= found.high
    assert 50 <= held <= 60
