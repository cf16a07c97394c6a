"""The plot of router saturation: how much of the final routing each revision of a model has."""

from pathlib import Path

from moe_ext.router_study.analysis.evolution import Saturation
from moe_ext.router_study.report.drawings import Drawing, Lines, Series


def saturation_drawing(found: list[Saturation], labels: list[str], last: str) -> Drawing:
    """Curves of all layers over the revisions."""
    series = [
        Series(
            f"layer {label}",
            [one.chosen[layer] for one in found],
            [one.low[layer] for one in found],
            [one.high[layer] for one in found],
            group=layer,
        )
        for layer, label in enumerate(labels)
    ]
    series.append(Series("chance", [one.chance for one in found], role="chance"))
    shuffled = [sum(one.shuffled) / len(one.shuffled) for one in found]
    series.append(Series("shuffled", shuffled, role="shuffled", group=6))
    first, mean = found[0], sum(found[0].chosen) / len(labels)
    latest = found[-1]
    more = f", at {_short(latest.revision)} {sum(latest.chosen) / len(labels):.0%}" if len(found) > 1 else ""
    return Drawing(
        "saturation",
        "Router saturation",
        f"At {_short(first.revision)} tokens choose {mean:.0%} of the experts that they choose at {_short(last)}"
        f"{more}; by chance {first.chance:.1%}, shuffled tokens {shuffled[0]:.0%}.",
        Lines([_short(one.revision) for one in found], series, "revision", "part of the final experts"),
    )


def _short(revision: str) -> str:
    return Path(revision).name
