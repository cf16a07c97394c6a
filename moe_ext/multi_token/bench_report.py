"""The bench's figures as tables to read."""

from typing import Any


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
    drafting = {name: way["acceptance"] for name, way in ways.items() if way["acceptance"] and name != "fast"}
    num_heads = max(map(len, drafting.values()))
    return _markdown(
        ["accepted, of what the head drafted", *(f"head {place}" for place in range(1, num_heads + 1))],
        [
            [name, *(f"{share:.2f}" for share in shares), *[""] * (num_heads - len(shares))]
            for name, shares in drafting.items()
        ],
    )


def _costs(cost_ms: list[float]) -> str:
    return _markdown(
        ["drafts in a pass", *map(str, range(len(cost_ms)))],
        [
            ["c(k), ms", *(f"{cost:.2f}" for cost in cost_ms)],
            ["over c(0)", *(f"{cost / cost_ms[0]:.2f}" for cost in cost_ms)],
        ],
    )


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
