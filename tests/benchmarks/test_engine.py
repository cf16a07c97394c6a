import json
import xml.etree.ElementTree as ET

import pytest

from benchmarks import engine
from benchmarks.__main__ import command_of, main, part_names, setting_of
from benchmarks.engine import held_parts, run_part
from benchmarks.machine import machine, measured_code, supports
from benchmarks.models import SIZES, Setting
from benchmarks.report import as_markdown, write_report
from benchmarks.targets import targets

TINY = Setting(size=SIZES["tiny"])
WAYS = {
    "base": (1.0, 100, None),
    "lora-r4": (1.1, 102, None),
    "lora-r32": (2.0, 110, None),
    "routed-2-dense": (1.2, 103, None),
    "routed-4-dense": (1.3, 104, None),
    "routed-8-dense": (2.06, 111, "lora-r32"),
    "routed-8-top2": (2.2, 111, "lora-r32"),
    "passes-2": (2.3, 204, None),
    "passes-4": (4.6, 408, None),
    "passes-8": (9.0, 816, None),
    "xlora-4": (3.9, 220, None),
    "xlora-8": (5.0, 220, None),
}


def timed(name: str, reference: str, **more) -> dict:
    rows = [
        {"way": way, "label": way, "limit": limit, "seconds": [seconds, 2 * seconds], "flops": flops, **more}
        for way, (seconds, flops, limit) in WAYS.items()
    ]
    return {"name": name, "title": f"Title of {name}", "reference": reference, "rows": rows}


def weighed() -> dict:
    rows = [
        {
            "way": way,
            "label": way,
            "limit": limit,
            "forward_peak": 2**20,
            "training_peak": flops * 2**20,
            "saved": 2**19,
        }
        for way, (_, flops, limit) in WAYS.items()
    ]
    return {"name": "memory", "title": "Title of memory", "reference": "lora-r4", "rows": rows}


@pytest.fixture
def quick(monkeypatch):
    """Parts that take no time; how often each was run."""
    runs = {}

    def part(name, groups, checks=()):
        def run(setting, rounds):
            runs[name] = runs.get(name, 0) + 1
            return {"groups": groups, "checks": list(checks)}

        return run

    check = {"check": "routed = loop", "difference": 2e-6, "tolerance": 1e-3}
    parts = {
        "forward": part("forward", [timed("forward", "base")], [check]),
        "training": part("training", [timed("training", "lora-r4")]),
        "memory": part("memory", [weighed()]),
        "generation": part("generation", [timed("generation", "lora-r4", tokens=3)]),
    }
    monkeypatch.setattr(engine, "PARTS", parts)
    monkeypatch.setattr("benchmarks.__main__.PARTS", parts)
    monkeypatch.setattr(engine, "keep_freed_memory", lambda: None)
    return runs


def test_a_part_that_is_done_is_not_run_again(quick, tmp_path):
    first = run_part("forward", TINY, 2, tmp_path)
    assert run_part("forward", TINY, 2, tmp_path) == json.loads(json.dumps(first))
    assert quick == {"forward": 1}


def test_a_part_is_run_again_when_asked_or_when_something_changed(quick, tmp_path, monkeypatch):
    run_part("forward", TINY, 2, tmp_path)
    run_part("forward", TINY, 2, tmp_path, again=True)
    run_part("forward", TINY, 3, tmp_path)
    run_part("forward", Setting(dtype="bfloat16", size=SIZES["tiny"]), 3, tmp_path)
    monkeypatch.setattr(engine, "measured_code", lambda: "other")
    run_part("forward", TINY, 3, tmp_path)
    assert quick == {"forward": 5}


def test_another_commit_alone_measures_nothing_again(quick, tmp_path, monkeypatch):
    run_part("forward", TINY, 2, tmp_path)
    monkeypatch.setattr(engine, "machine", lambda device: machine(device) | {"commit": "another"})
    run_part("forward", TINY, 2, tmp_path)
    assert quick == {"forward": 1}


def test_a_part_that_fails_leaves_the_one_that_was_there(quick, tmp_path, monkeypatch):
    run_part("forward", TINY, 2, tmp_path)
    before = (tmp_path / "forward.json").read_bytes()

    def fails(setting, rounds):
        raise RuntimeError("no")

    monkeypatch.setitem(engine.PARTS, "forward", fails)
    with pytest.raises(RuntimeError, match="no"):
        run_part("forward", TINY, 2, tmp_path, again=True)
    assert (tmp_path / "forward.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["forward.json"]


def test_one_round_has_no_spread_and_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rounds.*\b1\b.*\b2\b"):
        run_part("forward", TINY, 1, tmp_path)


def test_the_report_holds_targets_tables_plots_and_what_it_ran_on(quick, tmp_path):
    for part in engine.PARTS:
        run_part(part, TINY, 2, tmp_path)
    written = write_report(tmp_path, "python -m benchmarks")
    assert {path.name for path in written} == {"README.md", "results.json", "speed.svg", "memory.svg"}
    page = (tmp_path / "README.md").read_text()
    assert "| passes-2 | 2300.0 |" not in page  # a median of two rounds, 2.3 s and 4.6 s
    assert "| passes-2 | 3450.0 | 2.30 (2.30-2.30) | 2.04 |  |" in page
    assert "| routed-8-dense | 3090.0 | 2.06 (2.06-2.06) | 1.11 | 1.03 (1.03-1.03) |" in page
    assert "| routed-8-dense | 1.0 | 111.0 | 1.09 | 1.009 | 0.5 |" in page
    assert "| routed = loop | 2.0e-06 | 1e-03 |" in page
    for fact in ("`python -m benchmarks`", "torch ", "hidden 32", "median of 2 rounds"):
        assert fact in page
    assert json.loads((tmp_path / "results.json").read_text()) == held_parts(tmp_path)
    for plot in ("speed.svg", "memory.svg"):
        assert ET.parse(tmp_path / plot).getroot().tag.endswith("svg")


def test_a_target_is_met_or_missed_by_the_median(quick, tmp_path):
    for part in engine.PARTS:
        run_part(part, TINY, 2, tmp_path)
    found = {target.what: target for target in targets(held_parts(tmp_path), rank=4)}
    forward = "forward pass, routed, {}, over one LoRA of the same arithmetic"
    assert found[forward.format("all of 8")].met  # 1.03
    assert not found[forward.format("top-2 of 8")].met  # 1.10
    passes = found["4 separate passes over one routed pass of 4, as a share of what the operations allow"]
    assert passes.measured.startswith("90 %: 3.54") and passes.met  # 4.6 / 1.3 of 408 / 104
    assert found["forward pass of X-LoRA, 4 adapters, over routed, all of 4"].met  # 3.0
    assert not found["generated tokens/s, routed, top-2 of 8, over lora-r4"].met  # 0.5
    assert not found["generated tokens/s, routed, top-2 of 8, over X-LoRA with 8 adapters"].met


def test_the_page_of_some_parts_has_only_their_targets(quick, tmp_path):
    run_part("memory", TINY, 2, tmp_path)
    page = as_markdown(held_parts(tmp_path), "x", [])
    assert "peak memory of the training step" in page
    assert "X-LoRA, 4 adapters" not in page


def test_the_command_writes_the_report_and_prints_it(quick, tmp_path, capsys):
    output = tmp_path / "results"
    assert main(["--size", "tiny", "--rounds", "2", "--parts", "memory,forward", "--output", str(output)]) == 0
    assert capsys.readouterr().out.startswith("# Benchmarks: float32 on CPU")
    assert quick == {"forward": 1, "memory": 1}
    assert {path.name for path in output.iterdir()} >= {"forward.json", "memory.json", "README.md", "results.json"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "forward,walk"], "no part is called 'walk'"),
        (["--rounds", "1"], "'1' is no number of rounds; it must be at least 2"),
        (["--rounds", "many"], "'many' is no number of rounds"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*flags, "--output", str(tmp_path / "none")])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none").exists()


def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cuda"])
    assert "this machine has no cuda that computes in float32" in capsys.readouterr().err
    assert not supports("cuda", "bfloat16")


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "file")])
    assert "is a file; --output takes a folder" in capsys.readouterr().err


def test_parts_run_in_their_own_order():
    assert part_names("scope,forward,memory") == ["forward", "memory", "scope"]


def test_the_command_that_is_told_repeats_the_run():
    assert command_of(setting_of("cpu", "bfloat16"), 15) == "python -m benchmarks --device cpu --dtype bfloat16"
    assert command_of(TINY, 7) == "python -m benchmarks --device cpu --dtype float32 --size tiny --rounds 7"
    assert setting_of("cuda", "bfloat16").size == SIZES["large"]


def test_the_machine_is_named_with_its_versions():
    facts = machine("cpu")
    assert facts.keys() == {"processor", "system", "python", "torch", "transformers", "peft", "commit"}
    assert "threads" in facts["processor"]
    assert len(measured_code()) == 16
