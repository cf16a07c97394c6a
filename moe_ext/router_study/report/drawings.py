"""What a plot shows, whoever draws it: the page (`page.py`) and the pictures (`pictures.py`) draw the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["measured", "chance", "shuffled"]


@dataclass(frozen=True)
class Series:
    """A line.

    Args:
        name: in the legend.
        y: its values, one for each x of the plot.
        low, high: of the band around it.
        role: what it is; chance and control are drawn thin.
        group: lines of one group have one colour.
    """

    name: str
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    role: Role = "measured"
    group: int = 0


@dataclass(frozen=True)
class Lines:
    """Lines over named places, such as layers."""

    x: Sequence[str]
    series: Sequence[Series]
    x_title: str
    y_title: str


@dataclass(frozen=True)
class Heat:
    """A table of numbers as colours.

    Args:
        z: one row for each y, the first at the top.
        centre: what is drawn white; None where the smallest number is.
    """

    z: Sequence[Sequence[float]]
    x: Sequence[str]
    y: Sequence[str]
    x_title: str
    y_title: str
    colour_title: str
    centre: float | None = None


@dataclass(frozen=True)
class Bars:
    """Bars side by side for each x, with a line at what chance gives."""

    x: Sequence[str]
    series: Sequence[Series]
    x_title: str
    y_title: str
    chance: float


@dataclass(frozen=True)
class Flow:
    """Streams between columns of boxes.

    Args:
        columns: the boxes' labels, column by column.
        streams: (column, box, box of the next column, width).
    """

    columns: Sequence[Sequence[str]]
    streams: Sequence[tuple[int, int, int, float]]


@dataclass(frozen=True)
class PerLayer:
    """One plot for each layer, between which a slider moves."""

    layers: Sequence[str]
    plots: Sequence[Heat | Bars]


Plot = Lines | Heat | Bars | Flow | PerLayer


@dataclass(frozen=True)
class Drawing:
    """A plot with its words.

    Args:
        name: of its file and its place on the page.
        title: in a few words.
        sentence: what is seen, and what chance would give.
    """

    name: str
    title: str
    sentence: str
    plot: Plot
