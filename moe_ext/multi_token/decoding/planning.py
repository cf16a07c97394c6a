"""Which source drafts in a pass, and how much: as many tokens as are worth the time they take, from the best source.

A pass that drafts and checks k tokens takes c(k) and gives 1 + sum_{j<=k} g_j tokens (g: the router's gates; c: of the
source). The most tokens a second in the long run come from the source and the k with the highest

    1 + sum_{j<=k} g_j  -  rate * c(k)

where `rate` is the tokens a second reached so far: time is worth what it has yielded up to now (renewal reward; solved
step by step as Dinkelbach 1967 solves a ratio). Where no draft is worth its time, k is 0. A source whose drafts stood
less often than its gates had promised is believed that much less.

To ask a source for its gates takes time too, c(0) of the source beyond a plain pass. A source whose drafts have not
been worth that of late rests, and is asked now and then until they are.

Shape letters: B rows, K drafts of a source.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from moe_ext.multi_token.decoding.sources import SourceName

WARM_UP = 2
PROMISED = 8.0  # tokens after which a source's own record counts as much as its gates
RECENT = 16  # times asked, over which is judged what asking a source was worth
REST = 8  # passes from one question to the next where asking is not worth its time


@dataclass(frozen=True)
class Choice:
    """Which source drafts, and how many tokens; None and 0 where none does."""

    source: SourceName | None = None
    num_drafts: int = 0


@dataclass(frozen=True)
class PassCosts:
    """What passes take, in milliseconds.

    Args:
        plain_ms: a pass that asks no source.
        ms: c(k) of each source: a pass that asks it alone, and drafts and checks k tokens, for k = 0, 1, ...
    """

    plain_ms: float
    ms: dict[SourceName, tuple[float, ...]]

    def of(self, names: Sequence[SourceName]) -> "PassCosts":
        """Those of some sources."""
        return PassCosts(self.plain_ms, {name: self.ms[name] for name in names})

    def asking(self, name: SourceName) -> float:
        """What it takes to ask a source for its gates."""
        return max(0.0, self.ms[name][0] - self.plain_ms)

    def drafting(self, choice: Choice) -> float:
        """What it takes to write and check a draft, beside asking."""
        return 0.0 if choice.source is None else self.ms[choice.source][choice.num_drafts] - self.ms[choice.source][0]


def measure_costs(
    run_pass: Callable[[SourceName | None, int], None], longest: Mapping[SourceName, int], *, rounds: int = 8
) -> PassCosts:
    """Time passes of many lengths, in turns, and take the fastest; what lies between two lengths is interpolated.

    The fastest, because whatever else runs on the machine only ever adds to a time; for the same reason a pass counts
    as no slower than a longer one was.

    Args:
        run_pass: asks a source, drafts so many tokens by it and checks them, and waits until that is done; None and 0
            for a plain pass.
        longest: most tokens of each source.
        rounds: passes of each length.
    """
    # Short passes differ in what a token costs, long ones little: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 ...
    steps = [0, 1, *(size for power in range(1, 16) for size in (2**power, 3 * 2 ** (power - 1)))]
    lengths = {name: sorted({*(step for step in steps if step < most), most}) for name, most in longest.items()}
    passes = [(None, 0), *((name, size) for name, sizes in lengths.items() for size in sizes)]
    taken: dict[tuple[SourceName | None, int], list[float]] = {}
    for turn in range(WARM_UP + rounds):
        for each in passes:
            start = time.perf_counter()
            run_pass(*each)
            if turn >= WARM_UP:
                taken.setdefault(each, []).append(1e3 * (time.perf_counter() - start))
    ms = {}
    for name, sizes in lengths.items():
        fastest = np.minimum.accumulate([min(taken[name, size]) for size in reversed(sizes)])[::-1]
        ms[name] = tuple(np.interp(range(longest[name] + 1), sizes, fastest).tolist())
    return PassCosts(min(*taken[None, 0], *(times[0] for times in ms.values())), ms)


class Planner:
    """Chooses what drafts, and learns what time is worth and how far each source is to be believed.

    Args:
        costs: c(k) on this device, of every source.
    """

    def __init__(self, costs: PassCosts) -> None:
        self.costs = costs
        # One plain pass to begin with: time is worth at least what plain decoding yields.
        self.tokens, self.ms = 1.0, costs.plain_ms
        self.num_passes = 0
        # The cheapest to ask first: a source is worth what it adds to those.
        self.order = sorted(costs.ms, key=costs.asking)
        self.gained = dict.fromkeys(costs.ms, 1.0)  # tokens beyond what it takes to draft them, each time asked
        self.rests_until = dict.fromkeys(costs.ms, 0)
        self.asked: list[SourceName] = []
        self.promised = dict.fromkeys(costs.ms, PROMISED)
        self.stood = dict.fromkeys(costs.ms, PROMISED)
        self.expected = 0.0

    def asks(self, name: SourceName) -> bool:
        """Whether `choose` is to be given the gates of a source in this pass."""
        return self.num_passes >= self.rests_until[name]

    def choose(self, gates: Mapping[SourceName, Tensor]) -> Choice:
        """What drafts now; a batch goes on by as many tokens as all its rows accept.

        Args:
            gates: [B, K] of each source that was asked, of the rows that still go on.
        """
        rate = self.tokens / self.ms
        best, best_gain, self.expected = Choice(), 0.0, 0.0
        self.asked = [name for name in self.order if name in gates]
        for name in self.asked:
            gain_before = best_gain
            belief = self.stood[name] / self.promised[name]
            promises = accumulate(gates[name].prod(dim=0).tolist())
            for num_drafts, promised in enumerate(promises, start=1):
                choice = Choice(name, num_drafts)
                gain = belief * promised - rate * self.costs.drafting(choice)
                if gain > best_gain:
                    best, best_gain, self.expected = choice, gain, promised
            gain, known = best_gain - gain_before, self.gained[name]
            rested = self.num_passes == self.rests_until[name]
            # What is found behind a rest counts at once, so that a text that has become easy is not missed.
            self.gained[name] = max(known, gain) if rested else known + (gain - known) / RECENT
            if self.gained[name] < rate * self.costs.asking(name):
                self.rests_until[name] = self.num_passes + REST
        return best

    def record(self, choice: Choice, tokens: int) -> None:
        """Note what a pass gave.

        Args:
            choice: as `choose` gave it; of a draft that was cut short, what was checked of it.
            tokens: new ones, the pass's own included.
        """
        self.num_passes += 1
        self.tokens += tokens
        self.ms += self.costs.plain_ms + sum(map(self.costs.asking, self.asked)) + self.costs.drafting(choice)
        if choice.source is not None:
            self.promised[choice.source] += self.expected
            self.stood[choice.source] += tokens - 1


class FixedPlan:
    """The same number of drafts of one source in every pass, or as many as it has.

    Args:
        num_drafts: how many.
        source: which drafts.
    """

    def __init__(self, num_drafts: int, source: SourceName = "heads") -> None:
        self.num_drafts = num_drafts
        self.source: SourceName = source

    def asks(self, name: SourceName) -> bool:
        return name == self.source

    def choose(self, gates: Mapping[SourceName, Tensor]) -> Choice:
        num_drafts = min(self.num_drafts, gates[self.source].shape[1])
        return Choice(self.source, num_drafts) if num_drafts else Choice()

    def record(self, choice: Choice, tokens: int) -> None:
        """Nothing is learnt."""


class OpenGates:
    """As many drafts as heads whose gate is open in every row: what unverified heads are trusted with.

    Args:
        threshold: a gate is open above it.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def asks(self, name: SourceName) -> bool:
        return name == "heads"

    def choose(self, gates: Mapping[SourceName, Tensor]) -> Choice:
        num_drafts = int((gates["heads"] > self.threshold).all(dim=0).sum())
        return Choice("heads", num_drafts) if num_drafts else Choice()

    def record(self, choice: Choice, tokens: int) -> None:
        """Nothing is learnt."""


Plan = Planner | FixedPlan | OpenGates


def wait_for(device: torch.device) -> None:
    """Until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
