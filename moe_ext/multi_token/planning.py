"""How many heads draft in a pass: as many as the tokens they promise are worth the time they take.

A pass that drafts and checks k tokens takes c(k) and gives 1 + sum_{j<=k} g_j tokens (g: the router's gates). The most
tokens a second in the long run come from the k with the highest

    1 + sum_{j<=k} g_j  -  rate * c(k)

where `rate` is the tokens a second reached so far: time is worth what it has yielded up to now (renewal reward; solved
step by step as Dinkelbach 1967 solves a ratio). Where no draft is worth its time, k is 0.

Shape letters: B rows, H heads.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

WARM_UP = 2


@dataclass(frozen=True)
class PassCosts:
    """c(k): milliseconds of a pass that drafts and checks k tokens, for k = 0..H."""

    ms: tuple[float, ...]


def measure_costs(run_pass: Callable[[int], None], num_heads: int, *, rounds: int = 8) -> PassCosts:
    """Time passes of every length, in turns, and take medians.

    Args:
        run_pass: drafts and checks so many tokens, and waits until that is done.
        num_heads: H.
        rounds: passes of each length.
    """
    taken: list[list[float]] = [[] for _ in range(num_heads + 1)]
    for turn in range(WARM_UP + rounds):
        for drafted in range(num_heads + 1):
            start = time.perf_counter()
            run_pass(drafted)
            if turn >= WARM_UP:
                taken[drafted].append(1e3 * (time.perf_counter() - start))
    return PassCosts(tuple(median(times) for times in taken))


class Planner:
    """Chooses how many heads draft, and learns what time is worth.

    Args:
        costs: c(k) on this device.
    """

    def __init__(self, costs: PassCosts) -> None:
        self.costs = costs
        # One plain pass to begin with: time is worth at least what plain decoding yields.
        self.tokens, self.ms = 1.0, costs.ms[0]

    def choose(self, gates_BH: Tensor) -> int:
        """How many heads draft now; a batch goes on by as many tokens as all its rows accept.

        Args:
            gates_BH: of the rows that still go on.
        """
        gates = gates_BH.prod(dim=0).tolist()
        rate = self.tokens / self.ms
        best, best_worth, expected = 0, 1.0 - rate * self.costs.ms[0], 1.0
        for drafted, gate in enumerate(gates, start=1):
            expected += gate
            worth = expected - rate * self.costs.ms[drafted]
            if worth > best_worth:
                best, best_worth = drafted, worth
        return best

    def record(self, drafted: int, tokens: int) -> None:
        """Note what a pass with so many drafts gave."""
        self.tokens += tokens
        self.ms += self.costs.ms[drafted]


class FixedPlan:
    """The same number of drafts in every pass.

    Args:
        drafted: how many.
    """

    def __init__(self, drafted: int) -> None:
        self.drafted = drafted

    def choose(self, gates_BH: Tensor) -> int:
        return self.drafted

    def record(self, drafted: int, tokens: int) -> None:
        """Nothing is learnt."""


class OpenGates:
    """As many drafts as heads whose gate is open in every row: what unverified heads are trusted with.

    Args:
        threshold: a gate is open above it.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def choose(self, gates_BH: Tensor) -> int:
        return int((gates_BH > self.threshold).all(dim=0).sum())

    def record(self, drafted: int, tokens: int) -> None:
        """Nothing is learnt."""


Plan = Planner | FixedPlan | OpenGates


def wait_for(device: torch.device) -> None:
    """Until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
