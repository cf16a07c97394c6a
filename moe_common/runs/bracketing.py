"""Search for one setting: up and down from a first value, until the best one has a worse neighbour on either side."""

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def bracket(
    measure: Callable[[float], Result], first: float, *, score: Callable[[Result], float], factor: float = 2.0
) -> dict[float, Result]:
    """Measure a setting at `first`, below and above it, until the lowest score is bracketed.

    Args:
        measure: what a value of the setting comes to; called once for each value.
        first: the value to begin with, above 0.
        score: of what was measured; lower is better.
        factor: between two neighbours, above 1.

    Returns:
        All that was measured, by value, in rising order.
    """
    measured = {value: measure(value) for value in (first, first / factor)}
    while (best := lowest(measured, score)) in (min(measured), max(measured)):
        value = best / factor if best == min(measured) else best * factor
        measured[value] = measure(value)
    return dict(sorted(measured.items()))


def lowest(measured: dict[float, Result], score: Callable[[Result], float]) -> float:
    """The value with the lowest score."""
    return min(measured, key=lambda value: score(measured[value]))
