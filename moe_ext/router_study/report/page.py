"""The report: one HTML file that needs no network, with plotly's script inside it, compressed.

plotly's script is 4.8 MB; packed with gzip it is 1.5 MB, and any browser since 2023 unpacks it (DecompressionStream).
"""

import base64
import gzip
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from moe_ext.router_study.report.drawings import Bars, Drawing, Flow, Heat, Lines, PerLayer, Plot, Series
from moe_ext.router_study.report.extra import needs_study
from moe_ext.router_study.report.passages import Passage
from moe_ext.router_study.report.pictures import COLOURS, GREY, colour_scale

TEMPLATE = "page_template.html"
DIGITS = 4
HEAT_COLOURS = {"two-sided": "RdBu", "one-sided": "Viridis"}
MOST_TICKS = 32


def report_page(
    title: str,
    about: Mapping[str, str],
    drawings: Sequence[Drawing],
    passages: Sequence[Passage] = (),
    *,
    num_experts: int = 0,
    notes: Sequence[str] = (),
) -> str:
    """The text of the file.

    Args:
        title: headline.
        about: what was studied, as rows of a table.
        drawings: the plots, in order.
        passages: text to colour by expert, with a slider for the layer.
        num_experts: of the passages.
        notes: what was left out, and why.
    """
    with needs_study():
        from plotly.offline import get_plotlyjs
    script = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    sections = [
        f'<section id="{drawing.name}"><h2>{html.escape(drawing.title)}</h2>'
        f"<p>{html.escape(drawing.sentence)}</p>"
        f'<div class="plot{" wide" if _is_wide(drawing.plot) else ""}" id="plot-{drawing.name}"></div></section>'
        for drawing in drawings
    ]
    figures = {drawing.name: figure_of(drawing.plot) for drawing in drawings}
    fill = {
        "TITLE": html.escape(title),
        "ABOUT": "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in about.items()
        ),
        "NOTES": "".join(f'<p class="note">Left out: {html.escape(note)}</p>' for note in notes),
        "SECTIONS": "\n".join(sections),
        "FIGURES": _in_script(figures),
        "PASSAGES": _in_script(
            {"experts": num_experts, "texts": [vars(passage) for passage in passages]} if passages else None
        ),
        "PLOTLY": script,
    }
    page = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    for name, text in fill.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def figure_of(plot: Plot) -> dict[str, Any]:
    """The plot as plotly's JSON: `data` and `layout`."""
    with needs_study():
        from plotly import graph_objects
    figure = graph_objects.Figure()
    figure.update_layout(
        template="none",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        font={"size": 12},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
    )
    if isinstance(plot, PerLayer):
        _add_per_layer(figure, plot)
    else:
        for trace in _traces(plot):
            figure.add_trace(trace)
        _title_axes(figure, plot)
    return json.loads(figure.to_json(validate=False), parse_float=_short)


def _is_wide(plot: Plot) -> bool:
    return isinstance(plot, Flow)


def _traces(plot: Lines | Heat | Bars | Flow) -> list[Any]:
    from plotly import graph_objects

    if isinstance(plot, Lines):
        traces, named = [], set()
        for series in plot.series:
            traces += _line(plot.x, series, in_legend=series.name not in named)
            named.add(series.name)
        return traces
    if isinstance(plot, Heat):
        return [_heat(plot)]
    if isinstance(plot, Bars):
        bars = [
            graph_objects.Bar(
                x=list(plot.x),
                y=list(series.y),
                name=series.name,
                marker_color=_colour(series),
                error_y=_errors(series),
            )
            for series in plot.series
        ]
        chance = graph_objects.Scatter(
            x=list(plot.x),
            y=[plot.chance] * len(plot.x),
            name="chance",
            mode="lines",
            line={"color": "#333333", "dash": "dash", "width": 1.5},
        )
        return [*bars, chance]
    return [_flow(plot)]


def _line(x: Sequence[str], series: Series, *, in_legend: bool) -> list[Any]:
    from plotly import graph_objects

    places, traces = list(x)[: len(series.y)], []
    if series.low is not None:
        traces.append(
            graph_objects.Scatter(
                x=places + places[::-1],
                y=[*series.high, *reversed(list(series.low))],
                fill="toself",
                fillcolor=_colour(series),
                opacity=0.2,
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
            )
        )
    dash = {"measured": "solid", "chance": "dash", "shuffled": "dot"}[series.role]
    measured = series.role == "measured"
    traces.append(
        graph_objects.Scatter(
            x=places,
            y=list(series.y),
            name=series.name,
            showlegend=in_legend,
            mode="lines+markers" if measured and len(places) <= MOST_TICKS else "lines",
            line={"color": _colour(series), "dash": dash, "width": 2.5 if measured else 1.5},
        )
    )
    return traces


def _heat(plot: Heat) -> Any:
    from plotly import graph_objects

    two_sided = plot.centre is not None
    settings: dict[str, Any] = {"colorscale": HEAT_COLOURS["two-sided" if two_sided else "one-sided"]}
    if two_sided:
        (least, most), _ = colour_scale(plot)
        settings |= {"zmin": least, "zmax": most, "reversescale": True}
    return graph_objects.Heatmap(
        z=[list(row) for row in plot.z],
        x=list(plot.x),
        y=list(plot.y),
        colorbar={"title": {"text": plot.colour_title, "side": "right"}, "thickness": 12},
        hovertemplate=(
            f"{plot.y_title} %{{y}}<br>{plot.x_title} %{{x}}<br>{plot.colour_title} %{{z:.4g}}<extra></extra>"
        ),
        **settings,
    )


def _flow(plot: Flow) -> Any:
    from plotly import graph_objects

    starts = [sum(len(column) for column in plot.columns[:number]) for number in range(len(plot.columns))]
    labels = [label for column in plot.columns for label in column]
    colours = [COLOURS[place % len(COLOURS)] for column in plot.columns for place in range(len(column))]
    used = {starts[column] + one for column, one, _, _ in plot.streams}
    used |= {starts[column + 1] + other for column, _, other, _ in plot.streams}
    place_of = {node: place for place, node in enumerate(sorted(used))}
    return graph_objects.Sankey(
        node={
            "label": [labels[node] for node in sorted(used)],
            "color": [colours[node] for node in sorted(used)],
            "pad": 8,
            "thickness": 12,
        },
        link={
            "source": [place_of[starts[column] + one] for column, one, _, _ in plot.streams],
            "target": [place_of[starts[column + 1] + other] for column, _, other, _ in plot.streams],
            "value": [width for *_, width in plot.streams],
            "color": [_faint(colours[starts[column] + one]) for column, one, _, _ in plot.streams],
        },
    )


def _add_per_layer(figure: Any, plot: PerLayer) -> None:
    middle, counts = len(plot.layers) // 2, []
    for number, one in enumerate(plot.plots):
        traces = _traces(one)
        counts.append(len(traces))
        for trace in traces:
            trace.visible = number == middle
            figure.add_trace(trace)
    owner = [number for number, count in enumerate(counts) for _ in range(count)]
    steps = [
        {"method": "restyle", "label": label, "args": [{"visible": [place == number for place in owner]}]}
        for number, label in enumerate(plot.layers)
    ]
    _title_axes(figure, plot.plots[middle])
    figure.update_layout(
        sliders=[{"active": middle, "steps": steps, "currentvalue": {"prefix": "layer "}, "pad": {"t": 50}}],
        margin_b=110,
    )


def _title_axes(figure: Any, plot: Plot) -> None:
    if isinstance(plot, Flow):
        return
    # Names, even where they are digits: plotly would draw numbers on a scale of its own.
    figure.update_xaxes(title_text=plot.x_title, type="category", nticks=MOST_TICKS)
    figure.update_yaxes(title_text=plot.y_title)
    if isinstance(plot, Heat):
        figure.update_yaxes(type="category", autorange="reversed", nticks=MOST_TICKS // 2)
    if isinstance(plot, Bars):
        figure.update_layout(barmode="group", bargap=0.25)


def _errors(series: Series) -> dict[str, Any] | None:
    if series.low is None:
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - value) for value, high in zip(series.y, series.high, strict=True)],
        "arrayminus": [max(0.0, value - low) for value, low in zip(series.y, series.low, strict=True)],
        "thickness": 1,
        "width": 2,
        "color": "#444444",
    }


def _colour(series: Series) -> str:
    return GREY if series.role == "chance" else COLOURS[series.group % len(COLOURS)]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.35)"


def _short(number: str) -> float:
    """Four digits are more than a plot shows, and keep the file small."""
    value = float(number)
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value


def _in_script(content: Any) -> str:
    """JSON that can stand inside a script element, whatever text it holds."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
