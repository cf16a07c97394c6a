"""A figure about routing, and what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe_ext.router_study.collect.sample import Shuffle
from moe_ext.router_study.collect.totals import Totals


@dataclass(frozen=True)
class Metric:
    """One figure, as a function of the totals.

    Args:
        name: as in tables, `group.figure`.
        compute: the figure; its docstring has the formula and the source.
        chance: what routing by chance would give, in the same shape or as one number.
        shuffle: which shuffle of `Sample.shuffled` is its control.
        axes: what its dimensions are: "layer", "expert", "domain", "step" (from a layer to the next).
        title: in a few words.
    """

    name: str
    compute: Callable[[Totals], Tensor]
    chance: Callable[[Totals], Tensor]
    shuffle: Shuffle
    axes: tuple[str, ...]
    title: str
