"""A bracketed search ends with a worse neighbour on either side of the best, and near the true best."""

import math

from hypothesis import given
from hypothesis import strategies as st

from moe_common.runs.bracketing import bracket, lowest


def itself(value: float) -> float:
    return value


@given(first=st.floats(1e-4, 1.0), best=st.floats(1e-6, 100.0), factor=st.sampled_from([1.5, 2.0, 3.0]))
def test_the_best_has_a_worse_neighbour_on_either_side_and_nothing_is_measured_twice(first, best, factor):
    asked = []

    def measure(value):
        asked.append(value)
        return abs(math.log(value / best))

    measured = bracket(measure, first, score=itself, factor=factor)
    assert len(asked) == len(set(asked)) == len(measured)
    values = list(measured)
    assert values == sorted(asked)
    assert 0 < values.index(lowest(measured, itself)) < len(values) - 1
    assert abs(math.log(lowest(measured, itself) / best, factor)) <= 0.5 + 1e-9
