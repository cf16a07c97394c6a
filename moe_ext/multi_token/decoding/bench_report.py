"""The bench's figures as tables to read."""

from typing import Any

SHOWN_PLACES = 4  # of a draft, in the table of acceptance


def table(figures: dict[str, Any]) -> str:
    """Markdown tables: the ways of generating, overall and by source; acceptance by head; the cost of a pass."""
    parts = [_ways(figures["ways"])]
    if len(figures["by_source"]) > 1:
        parts.append(_by_source(figures["by_source"]))
    parts += [_acceptance(figures["ways"]), _costs(figures["cost_ms"])]
    here = figures["machine"]
    parts.append(
        f"{here['device']}, {here['threads']} threads, {here['dtype']}, torch {here['torch']}, transformers "
        f"{here['transformers']}; in turns in one process."
    )
    return "\n\n".join(parts)


def _ways(ways: dict[str, dict]) -> str:
    head = ["way", "tokens a pass", "tokens/s", "times generate", "exact match", "nats a token"]
    return _markdown(
        head,
        [
            [
                name,
                f"{way['tokens_per_pass']:.2f}",
                f"{way['tokens_per_second']:.0f}",
                f"{way['times_generate']:.2f}",
                f"{100 * way['exact_match']:.0f} %",
                f"{way['nats_per_token']:.3f}",
            ]
            for name, way in ways.items()
        ],
    )


def _by_source(by_source: dict[str, dict]) -> str:
    names = list(next(iter(by_source.values())))
    return _markdown(
        ["tokens a pass (times generate)", *by_source],
        [
            [
                name,
                *(
                    f"{ways[name]['tokens_per_pass']:.2f} ({ways[name]['times_generate']:.2f})"
                    for ways in by_source.values()
                ),
            ]
            for name in names
        ],
    )


def _acceptance(ways: dict[str, dict]) -> str:
    rows = []
    for name, way in ways.items():
        for source, record in way["sources"].items() if name != "fast" else ():
            drafted, accepted = record["drafted"], record["accepted"]
            shares = [f"{stood / tried:.2f}" if tried else "" for stood, tried in zip(accepted, drafted, strict=True)]
            shown = (shares + [""] * SHOWN_PLACES)[:SHOWN_PLACES]
            rows.append([name, source, f"{drafted[0] / way['passes']:.2f}", *shown])
    places = [f"token {place}" for place in range(1, SHOWN_PLACES + 1)]
    return _markdown(["accepted, of what was drafted", "by", "in passes", *places], rows)


def _costs(cost_ms: dict[str, tuple[float, ...]]) -> str:
    return "\n\n".join(
        _markdown(
            [f"tokens drafted by {source}", *map(str, range(len(costs)))],
            [["c(k), ms", *(f"{cost:.2f}" for cost in costs)], ["over c(0)", *(f"{c / costs[0]:.2f}" for c in costs)]],
        )
        for source, costs in cost_ms.items()
    )


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
