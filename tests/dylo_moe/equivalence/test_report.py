"""The table shows the worst of what several routers gave, and the JSON is JSON whatever the figures are."""

import json
from types import SimpleNamespace

import torch

from dylo_moe.equivalence.case import Result
from dylo_moe.equivalence.report import as_json, as_table


def result(verdict="pass", difference=1e-6, router=None, **changed):
    given = {"check": "causality", "tolerance": 1e-5, "why": "16 x measured rounding", **changed}
    return Result(verdict=verdict, difference=difference, router=router, **given)


def row_of(table):
    (row,) = [line for line in table.splitlines() if line.startswith("| causality")]
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_of_several_routers_the_largest_difference_is_shown():
    table = as_table([result(router="layer"), result(difference=4e-6, router="block")])
    assert row_of(table) == ["causality", "4.0e-06 logits", "1.0e-05: 16 x measured rounding", "pass: layer, block"]


def test_a_failure_is_shown_before_larger_figures_that_pass_and_says_where():
    failed = result("fail", 3e-5, "block", where="first in layer.7")
    table = as_table([result(router="layer", difference=1.0, tolerance=2.0), failed])
    assert row_of(table)[1:] == ["3.0e-05 logits", "1.0e-05: 16 x measured rounding", "fail: block; layer pass"]
    assert "FAIL causality, router of scope block: first in layer.7" in table
    assert table.endswith("2 checks: 1 pass, 1 fail")


def test_a_skipped_check_is_never_shown_as_passed():
    skipped = result("skipped", None, "two_pass", tolerance=None, why="no KV cache")
    assert row_of(as_table([skipped])) == ["causality", "", "no KV cache", "skipped: two_pass"]
    assert row_of(as_table([result(router="layer"), skipped]))[3] == "pass: layer; two_pass skipped"


def test_a_measured_figure_has_no_tolerance():
    table = as_table([result("measured", 0.2, tolerance=None, why="two functions, not one")])
    assert row_of(table) == ["causality", "2.0e-01 logits", "two functions, not one", "measured"]


def test_figures_that_are_not_finite_become_null():
    source = SimpleNamespace(
        name="base",
        settings={},
        base=SimpleNamespace(num_parameters=lambda: 3, dtype=torch.float32, device="cpu"),
    )
    content = json.loads(as_json(source, [result("fail", float("inf"))]))
    assert content["results"][0]["difference"] is None
    assert content["failed"] == 1
