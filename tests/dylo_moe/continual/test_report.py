"""Forgetting by hand, the comparison, and what the table and the picture hold."""

import math
from pathlib import Path

import pytest

from dylo_moe.continual.report import as_text, compare, draw, forgetting

# nats a token after each visit
GROWN = [{"a": 1.0}, {"a": 1.1, "b": 2.0}, {"a": 1.3, "b": 1.9, "c": 3.0}]
SEQUENCE = [{"a": 1.0}, {"a": 1.5, "b": 2.0}, {"a": 2.0, "b": 3.0, "c": 2.9}]


def results_of(**changed):
    results = {
        "skills": ["a", "b", "c"],
        "visits": ["a", "b", "c"],
        "base": {"a": 1.2, "b": 2.2, "c": 4.0},
        "mean_nll": {"mixture": GROWN, "sequential": SEQUENCE, "joint": {"a": 1.1, "b": 2.1, "c": 2.8}},
        "trained_parameters": {"mixture": 1234, "sequential": 1230, "joint": 1230},
        "decisions": [
            {
                "skill": "a",
                "expert": "expert_0",
                "is_novel": True,
                "nearest": None,
                "similarity": None,
                "threshold": None,
            },
            {
                "skill": "b",
                "expert": "expert_1",
                "is_novel": True,
                "nearest": "a",
                "similarity": 0.5,
                "threshold": 0.9,
            },
            {
                "skill": "c",
                "expert": "expert_0",
                "is_novel": False,
                "nearest": "a",
                "similarity": 0.95,
                "threshold": 0.9,
            },
        ],
        "experts": ["expert_0", "expert_1"],
        "usage": {name: {"expert_0": 0.25, "expert_1": 0.75} for name in "abc"},
        "replay_bytes": 4096,
        "seconds": 12.0,
        "cpu_seconds": 9.6,
        "settings": {"eval_split": "test"},
        **changed,
    }
    results["comparison"] = compare(results)
    return results


def test_forgetting_is_how_far_each_old_skill_is_from_its_best():
    first, second, third = forgetting(GROWN, ["a", "b", "c"])
    assert first is None
    assert second == pytest.approx({"nats": 0.1, "perplexity": math.e**1.1 - math.e})
    # a: 1.3 against its best 1.0; b: 1.9 against 2.0, a gain
    assert third["nats"] == pytest.approx((0.3 - 0.1) / 2)
    assert third["perplexity"] == pytest.approx((math.exp(1.3) - math.exp(1.0) + math.exp(1.9) - math.exp(2.0)) / 2)


def test_a_skill_that_is_visited_again_is_not_forgotten_meanwhile():
    measured = [{"a": 1.0}, {"a": 1.5, "b": 2.0}, {"a": 1.2, "b": 2.5}]
    assert forgetting(measured, ["a", "b", "a"])[2]["nats"] == pytest.approx(0.5)  # b alone
    assert forgetting([{"a": 1.0}, {"a": 0.9}], ["a", "a"]) == [None, None]


def test_the_comparison_holds_both_ratios():
    compared = compare(results_of())
    lost = ((2.0 - 1.0) + (3.0 - 2.0)) / 2
    assert compared["forgetting_over_sequential"] == pytest.approx(0.1 / lost)
    ours, bound = (sum(math.exp(x) for x in xs) / 3 for xs in ((1.3, 1.9, 3.0), (1.1, 2.1, 2.8)))
    assert compared["mean_perplexity_over_joint"] == pytest.approx(ours / bound)


def test_without_baselines_there_are_no_ratios():
    compared = compare(results_of(mean_nll={"mixture": GROWN}))
    assert "forgetting_over_sequential" not in compared and "mean_perplexity_over_joint" not in compared


def test_the_table_holds_every_figure_and_says_where_the_files_lie():
    text = as_text(results_of(), Path("runs/x"))
    assert "| growing mixture | c | 3.67 | 6.69 | 20.09 | 10.15 | +0.100 | +0.12 | 1,234 |" in text
    assert "| one LoRA in sequence | b | 4.48 | 7.39 |  |  | +0.500 | +1.76 |  |" in text
    assert "| one LoRA on all at once | all | 3.00 | 8.17 | 16.44 | 9.20 |  |  | 1,230 |" in text
    assert "| c | a | 0.950 | 0.900 | known | expert_0 |" in text
    assert "| a | none |  |  | new | expert_0 |" in text
    assert "| b | 25.0 % | 75.0 % |" in text
    assert "(test documents; lower is better)" in text
    assert "seconds of this call: 12, processor time 10\n" in text
    for path in ("runs/x/mixture/03", "runs/x/results.json", "runs/x/table.md", "runs/x/forgetting.png"):
        assert path in text


def test_every_table_is_rectangular():
    widths = []
    for part in as_text(results_of(), Path("runs/x")).split("\n\n"):
        rows = [line.count("|") for line in part.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1
        widths += rows[:1]
    assert len(widths) == 3


@pytest.mark.parametrize("mean_nll", [{"mixture": GROWN}, None])
def test_the_picture_is_written_whole(tmp_path, mean_nll):
    draw(results_of(**({"mean_nll": mean_nll} if mean_nll else {})), tmp_path / "forgetting.png")
    assert (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["forgetting.png"]
