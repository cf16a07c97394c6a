"""The plots of a report: speed beside what the operations allow, memory, and what grows."""

import io

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import ratio

MiB = 2**20
OURS, OTHERS, PLAIN, ALLOWED = "#1b6ca8", "#c9803a", "#8a8f98", "#20242b"


def draw(results: dict[str, dict]) -> dict[str, bytes]:
    """SVG files by name, of the parts that are there. The same results give the same bytes."""
    groups = {group["name"]: group for result in results.values() for group in result["groups"]}
    plots = {
        "speed": (_speed, ["forward", "training"]),
        "memory": (_memory, ["memory"]),
        "scaling": (_scaling, ["experts-forward", "tokens-forward", "rank-forward"]),
    }
    drawn = {}
    for name, (function, needed) in plots.items():
        if all(group in groups for group in needed):
            drawn[name] = _as_svg(function(groups))
    return drawn


def _speed(groups: dict[str, dict]) -> Figure:
    figure = Figure(figsize=(12, 8.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("forward", "training"), strict=True):
        group = groups[name]
        reference = next(row for row in group["rows"] if row["way"] == group["reference"])
        rows = group["rows"][::-1]
        found = [ratio(row["seconds"], reference["seconds"]) for row in rows]
        spread = [[r.median - r.low for r in found], [r.high - r.median for r in found]]
        axes.barh(
            range(len(rows)),
            [r.median for r in found],
            xerr=spread,
            color=[_colour(row["way"]) for row in rows],
            error_kw={"elinewidth": 1, "ecolor": "#555555"},
        )
        allowed = [row["flops"] / reference["flops"] for row in rows]
        axes.plot(allowed, range(len(rows)), "|", color=ALLOWED, ms=11, mew=2, label="what the operations allow")
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8.5)
        axes.set_title(group["title"].partition(", over")[0], fontsize=11)
        axes.set_xlabel(f"time over that of the {reference['label'].removeprefix('one ')}; less is better")
        axes.legend(loc="upper right", frameon=False)
        _plain(axes, "x")
    return figure


def _memory(groups: dict[str, dict]) -> Figure:
    rows = [row for row in groups["memory"]["rows"] if "training_peak" in row][::-1]
    figure = Figure(figsize=(8, 7.4), layout="constrained")
    axes = figure.subplots()
    peaks = [row["training_peak"] / MiB for row in rows]
    axes.barh(range(len(rows)), peaks, color=[_colour(row["way"]) for row in rows])
    kept = [row["saved"] / MiB for row in rows]
    axes.plot(kept, range(len(rows)), "|", color=ALLOWED, ms=11, mew=2, label="of it, kept for backward")
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8.5)
    axes.set_xlabel("peak memory of a training step above the parameters (MiB)")
    axes.legend(loc="upper right", frameon=False)
    _plain(axes, "x")
    return figure


def _scaling(groups: dict[str, dict]) -> Figure:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_experts, by_tokens, by_rank = figure.subplots(1, 3)
    for name, style in (("experts-forward", "o-"), ("experts-training", "s--")):
        rows = {row["x"]: row for row in groups.get(name, {"rows": []})["rows"]}
        if rows:
            first = min(x for x in rows if x is not None)
            _line(by_experts, {x: (row, rows[first]) for x, row in rows.items() if x is not None}, style, _step(name))
    by_experts.set(xlabel="experts (top-2)", ylabel="time over that of the fewest experts", title="Experts")
    rows = groups["tokens-forward"]["rows"]
    for way, style in ((rows[1]["way"], "s--"), (rows[2]["way"], "o-")):
        base = {row["x"]: row for row in rows if row["way"] == "base"}
        mine = {row["x"]: (row, base[row["x"]]) for row in rows if row["way"] == way}
        _line(by_tokens, mine, style, next(row["label"] for row in rows if row["way"] == way))
    by_tokens.set(xlabel="tokens of a forward pass", ylabel="time over the base model's", title="Tokens")
    for name, style in (("rank-forward", "o-"), ("rank-training", "s--")):
        rows = groups.get(name, {"rows": []})["rows"]
        lora = {row["x"]: row for row in rows if row["way"] == "lora"}
        pairs = {row["x"]: (row, lora[row["x"]]) for row in rows if row["way"] == "routed"}
        if pairs:
            _line(by_rank, pairs, style, _step(name))
    by_rank.set(
        xlabel="rank of each of 8 experts (top-2)", ylabel="time over one LoRA of 8 times the rank", title="Rank"
    )
    for axes in (by_experts, by_tokens, by_rank):
        axes.legend(frameon=False, fontsize=9)
        axes.set_ylim(bottom=0)
        _plain(axes, "y")
    return figure


def _line(axes: Axes, pairs: dict[int, tuple[dict, dict]], style: str, label: str) -> None:
    """Ratios of pairs of rows over x, with the quartiles as a band."""
    found = {x: ratio(row["seconds"], over["seconds"]) for x, (row, over) in sorted(pairs.items())}
    (drawn,) = axes.plot(list(found), [r.median for r in found.values()], style, ms=4.5, label=label)
    low, high = [r.low for r in found.values()], [r.high for r in found.values()]
    axes.fill_between(list(found), low, high, color=drawn.get_color(), alpha=0.15, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found), [str(x) for x in found])
    axes.minorticks_off()


def _step(group: str) -> str:
    return {"forward": "forward pass", "training": "training step"}[group.rpartition("-")[2]]


def _colour(way: str) -> str:
    kind = way.partition("-")[0]
    return {"routed": OURS, "base": PLAIN, "lora": PLAIN}.get(kind, OTHERS)


def _plain(axes: Axes, along: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=along, color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    if along == "x":
        axes.margins(y=0.01)


def _as_svg(figure: Figure) -> bytes:
    content = io.BytesIO()
    # The ids of an SVG are random without a salt, and its date is now.
    with matplotlib.rc_context({"svg.hashsalt": "dylo-moe", "svg.fonttype": "path"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
