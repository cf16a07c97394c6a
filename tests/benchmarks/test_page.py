"""The table of docs/performance.md is the one that the committed run printed."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def table_below(heading: str, page: Path) -> list[str]:
    below = page.read_text(encoding="utf-8").split(f"\n{heading}\n\n")[1]
    return below.split("\n\n")[0].splitlines()


def test_the_table_of_targets_is_that_of_the_committed_run():
    printed = table_below("## Targets", ROOT / "benchmarks" / "results" / "cpu-float32" / "README.md")
    assert len(printed) > 10
    assert table_below("## Targets", ROOT / "docs" / "performance.md") == printed
