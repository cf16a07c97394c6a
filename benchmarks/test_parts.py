"""`make bench`: every part in every number format that the machine multiplies.

pytest-benchmark shows how long a part takes. What the part found (each ratio measured in turns, with its quartiles
and the ratio of the operations) is in `extra_info` of its JSON, and in the report that is written beside the results.
"""

import pytest

from benchmarks.engine import PARTS
from benchmarks.measure import ratio
from benchmarks.report import reference_of

HOUR = 3600  # seconds


@pytest.mark.timeout(HOUR)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.benchmark(group="parts")
def test_part(benchmark, run, part, dtype):
    result = benchmark.pedantic(run, args=(part, dtype), rounds=1, iterations=1)
    for group in result["groups"]:
        benchmark.extra_info[group["title"]] = [found(row, group) for row in group["rows"]]


def found(row: dict, group: dict) -> dict:
    """What a row says: over the row of reference if it was timed, otherwise itself."""
    if "seconds" not in row:
        return row
    reference = reference_of(row, group)
    times = ratio(row["seconds"], reference["seconds"])
    return {
        "way": row["label"],
        "x": row.get("x"),
        "times": times.median,
        "quartiles": [times.low, times.high],
        "operations": row["flops"] / reference["flops"],
    }
