"""The plots as PNG files, drawn by matplotlib; no browser is needed."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_ext.router_study.report.drawings import Bars, Drawing, Flow, Heat, Lines, PerLayer, Series
from moe_ext.router_study.report.extra import needs_study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
GREY = "#7f7f7f"
MOST_TICKS = 16
INCHES = (6.4, 4.2)
DPI = 110


def write_pictures(drawings: Sequence[Drawing], folder: str | Path) -> list[Path]:
    """Write every drawing as `NAME.png` into the folder, and all but flows together as `overview.png`.

    Of a plot for each layer the middle one is drawn.
    """
    pyplot = _pyplot()
    folder, written = Path(folder), []
    for drawing in drawings:
        figure, axes = pyplot.subplots(figsize=INCHES, layout="constrained")
        _draw(axes, drawing)
        figure.supxlabel(_wrapped(drawing.sentence, 92), fontsize=8, color="#333333")
        written.append(folder / f"{drawing.name}.png")
        figure.savefig(written[-1], dpi=DPI)
        pyplot.close(figure)
    written.append(folder / "overview.png")
    _write_overview(pyplot, [drawing for drawing in drawings if not isinstance(drawing.plot, Flow)], written[-1])
    return written


def _write_overview(pyplot, drawings: Sequence[Drawing], path: Path) -> None:
    columns = 3
    lines = -(-len(drawings) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(5.0 * columns, 3.7 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(drawings) :]:
        axes.axis("off")
    for axes, drawing in zip(grid.flat, drawings, strict=False):
        _draw(axes, drawing)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _pyplot():
    with needs_study():
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    return pyplot


def _draw(axes: "Axes", drawing: Drawing) -> None:
    plot, title = drawing.plot, drawing.title
    if isinstance(plot, PerLayer):
        middle = len(plot.layers) // 2
        title, plot = f"{title}, layer {plot.layers[middle]}", plot.plots[middle]
    legend = isinstance(plot, Lines | Bars)
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold", pad=20 if legend else 6)
    if isinstance(plot, Lines):
        _draw_lines(axes, plot)
    elif isinstance(plot, Heat):
        _draw_heat(axes, plot)
    elif isinstance(plot, Bars):
        _draw_bars(axes, plot)
    else:
        _draw_flow(axes, plot)
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_size(8)
    axes.yaxis.label.set_size(8)


def _draw_lines(axes: "Axes", plot: Lines) -> None:
    for series in plot.series:
        places = range(len(series.y))
        axes.plot(places, series.y, label=series.name, **_style(series, dots=len(plot.x) <= MOST_TICKS))
        if series.low is not None:
            axes.fill_between(places, series.low, series.high, color=_colour(series), alpha=0.18, linewidth=0)
    _name_ticks(axes.xaxis, plot.x)
    axes.set(xlabel=plot.x_title, ylabel=plot.y_title)
    axes.grid(axis="y", color="#e6e6e6")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _add_legend(axes)


def _draw_heat(axes: "Axes", plot: Heat) -> None:
    limits, colours = colour_scale(plot)
    image = axes.imshow(plot.z, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label(plot.colour_title, size=8)
    bar.ax.tick_params(labelsize=7)
    _name_ticks(axes.xaxis, plot.x)
    _name_ticks(axes.yaxis, plot.y)
    axes.set(xlabel=plot.x_title, ylabel=plot.y_title)


def colour_scale(plot: Heat) -> tuple[tuple[float, float], str]:
    """Limits of the colours, and matplotlib's name for them: two-sided around the centre, or one-sided.

    NaN, an empty cell, is left out.
    """
    numbers = [number for row in plot.z for number in row if math.isfinite(number)]
    if plot.centre is None:
        return (min(numbers), max(numbers)), "viridis"
    reach = max([abs(number - plot.centre) for number in numbers] + [1e-9])
    return (plot.centre - reach, plot.centre + reach), "RdBu_r"


def _draw_bars(axes: "Axes", plot: Bars) -> None:
    width = 0.8 / len(plot.series)
    for number, series in enumerate(plot.series):
        places = [place + (number - (len(plot.series) - 1) / 2) * width for place in range(len(plot.x))]
        errors = None
        if series.low is not None:
            errors = [
                [max(0, value - low) for value, low in zip(series.y, series.low, strict=True)],
                [max(0, high - value) for value, high in zip(series.y, series.high, strict=True)],
            ]
        axes.bar(
            places,
            series.y,
            width,
            yerr=errors,
            label=series.name,
            color=_colour(series),
            error_kw={"elinewidth": 0.7, "ecolor": "#444444"},
        )
    axes.axhline(plot.chance, color="#333333", linestyle="--", linewidth=1, label="chance")
    _name_ticks(axes.xaxis, plot.x)
    axes.set(xlabel=plot.x_title, ylabel=plot.y_title)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _add_legend(axes)


def _draw_flow(axes: "Axes", plot: Flow) -> None:
    deepest = max(len(column) for column in plot.columns)
    widest = max((width for *_, width in plot.streams), default=1)
    for column, one, other, width in plot.streams:
        colour = COLOURS[one % len(COLOURS)]
        axes.plot([column, column + 1], [-one, -other], color=colour, alpha=0.45, linewidth=7 * width / widest)
    for number, column in enumerate(plot.columns):
        axes.scatter([number] * len(column), [-place for place in range(len(column))], s=12, color="#333333", zorder=3)
    axes.set_xticks(range(len(plot.columns)), [column[0].rsplit(".", 1)[0] for column in plot.columns])
    axes.set_yticks([-place for place in range(deepest)][:: max(1, deepest // MOST_TICKS)])
    axes.set_yticklabels([str(-int(tick)) for tick in axes.get_yticks()])
    axes.set(xlabel="layer", ylabel="expert")
    for side in axes.spines.values():
        side.set_visible(False)


def _add_legend(axes: "Axes") -> None:
    """Above the plot, each name once."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(
        handles.values(),
        handles.keys(),
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.98),
        fontsize=7,
        frameon=False,
        ncols=6,
        columnspacing=0.8,
        handlelength=1.4,
    )


def _style(series: Series, *, dots: bool) -> dict:
    if series.role == "chance":
        return {"color": GREY, "linestyle": "--", "linewidth": 1.2}
    if series.role == "shuffled":
        return {"color": _colour(series), "linestyle": ":", "linewidth": 1.4}
    return {"color": _colour(series), "linewidth": 1.8, "marker": "o" if dots else None, "markersize": 3.5}


def _colour(series: Series) -> str:
    return COLOURS[series.group % len(COLOURS)]


def _name_ticks(axis, names: Sequence[str]) -> None:
    step = -(-len(names) // MOST_TICKS)
    axis.set_ticks(range(0, len(names), step), [names[place] for place in range(0, len(names), step)])


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))
