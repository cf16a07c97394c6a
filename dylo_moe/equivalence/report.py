"""The results of the equivalence checks as a table for a person and as JSON for a program."""

import json
import math
import platform
from dataclasses import asdict

import peft
import torch
import transformers

from dylo_moe.equivalence.case import BATCH, LENGTH, Result
from dylo_moe.equivalence.models import Source

# Worst first: a row that stands for several routers shows the worst of them.
ORDER = ("fail", "skipped", "measured", "pass")
LEGEND = """\
measured rounding: what it does to the result to move each module's output by one unit in the last place, at random
rounding bound: of a sum of n products, u half the machine epsilon (Higham and Mary 2019); layers run in float32
"""


def as_table(results: list[Result]) -> str:
    """One row for each check; where several routers ran it, the worst of them is shown and named."""
    by_check: dict[str, list[Result]] = {}
    for result in results:
        by_check.setdefault(result.check, []).append(result)
    rows = [("check", "largest difference", "tolerance and why", "verdict")]
    faults = []
    for check, group in by_check.items():
        rows.append(_row(check, group))
        faults += [
            f"FAIL {check}{f', router of scope {r.router}' if r.router else ''}: {r.where or r.why}"
            for r in group
            if r.verdict == "fail"
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    rows.insert(1, tuple("-" * width for width in widths))
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in reversed(ORDER)}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return "\n".join([*lines, "", LEGEND, *faults, f"{len(results)} checks: {told}"])


def _row(check: str, group: list[Result]) -> tuple[str, str, str, str]:
    worst = min(group, key=lambda r: (ORDER.index(r.verdict), -_share(r)))
    judged = [r for r in group if r.verdict != "skipped"]
    if worst.verdict == "skipped" and judged:
        worst = min(judged, key=lambda r: (ORDER.index(r.verdict), -_share(r)))
    verdict = worst.verdict
    if worst.router:
        same = [r.router for r in group if r.verdict == verdict]
        others = [f"{r.router} {r.verdict}" for r in group if r.verdict != verdict]
        verdict = f"{verdict}: " + ", ".join(same) + "".join(f"; {other}" for other in others)
    difference = "" if worst.difference is None else f"{worst.difference:.1e} {worst.unit}"
    tolerance = worst.why if worst.tolerance is None else f"{worst.tolerance:.1e}: {worst.why}"
    return check, difference, tolerance, verdict


def _share(result: Result) -> float:
    """How much of its tolerance a result uses."""
    if result.difference is None or not result.tolerance:
        return float(bool(result.difference))
    return result.difference / result.tolerance


def as_json(source: Source, results: list[Result], benchmark: object | None = None) -> str:
    """Results, versions and settings; a figure that is not finite is written as null."""
    content = {
        "model": source.name,
        "settings": {
            **source.settings,
            "base_class": type(source.base).__name__,
            "base_parameters": source.base.num_parameters(),
            "dtype": str(source.base.dtype).removeprefix("torch."),
            "device": str(source.base.device),
            "batch": BATCH,
            "length": LENGTH,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (torch, transformers, peft)},
        },
        "failed": sum(result.verdict == "fail" for result in results),
        "results": [_finite(asdict(result)) for result in results],
    }
    if benchmark is not None:
        content["benchmark"] = benchmark
    return json.dumps(content, indent=2, allow_nan=False)


def _finite(row: dict) -> dict:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
