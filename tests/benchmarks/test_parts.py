import json

import pytest

from benchmarks import forms, operators, parts
from benchmarks.engine import PARTS
from benchmarks.generation import check_against_full_passes
from benchmarks.models import SIZES, Setting, make_base, random_tokens
from benchmarks.report import as_markdown, reference_of
from benchmarks.ways import base_alone, lora, routed, xlora

TINY = Setting(size=SIZES["tiny"])
MACHINE = dict.fromkeys(("processor", "system", "python", "torch", "transformers", "peft", "commit"), "")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(parts, "EXPERTS", (2, 4))
    monkeypatch.setattr(forms, "EXPERTS", (2, 4))
    monkeypatch.setattr(forms, "TOKENS", (4,))
    monkeypatch.setattr(parts, "TOKENS", (1, 4))
    monkeypatch.setattr(parts, "RANKS", (2, 4))
    monkeypatch.setattr(operators, "TURNS", 1)
    monkeypatch.setattr(
        parts, "all_ways", lambda rank: [base_alone(), lora(rank), lora(2 * rank), routed(2, rank=rank)]
    )
    monkeypatch.setattr(parts, "check_against_the_loop", lambda way, outputs, dtype: {})


@pytest.mark.parametrize("part", ["forward", "training", "memory", "scaling", "operators"])
def test_every_part_gives_rows_that_a_page_can_show(part, monkeypatch):
    monkeypatch.setattr("benchmarks.report.targets", lambda results, rank: [])
    result = PARTS[part](TINY, 2)
    result |= {"took": 1.0, "made_with": {"setting": TINY.to_dict(), "rounds": 2, "code": "", "machine": MACHINE}}
    held = json.loads(json.dumps(result | {"part": part, "checks": []}))
    page = as_markdown({part: held}, "x", [])
    for group in held["groups"]:
        assert f"## {group['title']}" in page
        assert group["rows"]


def test_memory_of_a_larger_adapter_is_larger():
    rows = {row["way"]: row for row in parts.memory(TINY, 2)["groups"][0]["rows"]}
    assert "training_peak" not in rows["base"]
    assert rows["lora-r4"]["training_peak"] < rows["lora-r8"]["training_peak"]
    assert 0 < rows["lora-r4"]["saved"] < rows["lora-r4"]["training_peak"]


def test_a_row_is_divided_by_the_reference_of_its_own_size():
    rows = parts.scaling(TINY, 2)["groups"][2]
    for row in rows["rows"]:
        assert reference_of(row, rows)["x"] == row["x"]


def test_a_cached_generation_is_checked_against_full_passes():
    run = routed(2, rank=4).build(make_base(TINY), training=False)
    prompt = random_tokens(64, 4, "cpu")
    assert check_against_full_passes(run, prompt, 3, "float32")["difference"] < 1e-4
    run.generate = lambda prompt, new: random_tokens(64, prompt.shape[1] + new, "cpu")
    with pytest.raises(RuntimeError, match="below the likeliest"):
        check_against_full_passes(run, prompt, 3, "float32")


def test_xlora_generates_without_a_cache():
    run = xlora(2, rank=4).build(make_base(TINY), training=False)
    assert run.generate(random_tokens(64, 4, "cpu"), 2).shape == (1, 6)


def test_an_unknown_way_is_refused_with_those_that_are_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        operators.main(["--way", "routed-7"])
    assert "there is no way 'routed-7'; known are base, lora-r16" in capsys.readouterr().err
