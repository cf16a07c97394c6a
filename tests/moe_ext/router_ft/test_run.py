"""The command that does all steps: its table, its controls, and that it goes on where it was broken off."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")
pytest.importorskip("scipy", reason="needs the extra 'quant'")

from moe_common.runs.options import OptionParser, split_names
from moe_common.runs.whole_files import read_json, write_json
from moe_ext.router_ft import study
from moe_ext.router_ft.run import RunOptions, run
from moe_ext.router_ft.study import parse_plan

CONFIG = Path(__file__).parents[3] / "configs" / "router_ft.yaml"


@pytest.fixture
def options(tiny_folder, tiny_sources, tmp_path):
    return RunOptions(
        model=tiny_folder,
        dataset=tiny_sources,
        output=str(tmp_path / "run"),
        plans="INT2,lower_alpha@3",
        allocations="random@3#1,none@3",
        nsamples=8,
        seqlen=16,
        max_blocks=4,
        lr=1e-3,
        objective="kl",
    )


def test_the_table_has_a_line_for_every_plan_and_a_control(options, tmp_path, monkeypatch):
    told = run(options)
    table = (tmp_path / "run" / "table.md").read_text()
    assert table in told
    lines = table.splitlines()
    assert lines[0].startswith("Full precision: ")
    assert "The control" in lines[0]
    cells = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert set(cells) == {"plan", "---", "INT2", "lower_alpha@3", "random@3#1", "none@3"}
    assert "| 2.500 |" in cells["INT2"]
    # All is kept: a second run measures nothing.
    monkeypatch.setattr(study, "losses_by_source", lambda *_: pytest.fail("measured again"))
    assert run(options) == told


def test_results_of_other_options_are_not_taken_for_ones_own(options, tmp_path):
    run(replace(options, plans="INT2", allocations=""))
    with pytest.raises(ValueError, match=r"lr \(0.001 there, 0.002 asked for\)"):
        run(replace(options, lr=2e-3))
    noted = read_json(tmp_path / "run" / "run.json")
    noted["settings"]["weights"] += 1
    write_json(tmp_path / "run" / "run.json", noted)
    with pytest.raises(ValueError, match="weights"):
        run(options)


def test_a_plan_is_a_format_or_a_sensitivity_with_its_bits():
    assert parse_plan("INT3") == ("INT3", None, 0)
    assert parse_plan("random@3.125#2") == ("random", 3.125, 2)
    with pytest.raises(ValueError, match="'INT3@'"):
        parse_plan("INT3@")


def test_the_committed_configuration_is_read():
    (options,) = OptionParser((RunOptions,)).parse(["--config", str(CONFIG)])
    assert split_names(options.plans) == ["INT4", "INT3", "INT2", "lower_alpha@2.625"]
    assert (options.objective, options.lr, options.split) == ("ce", 3e-3, "test")
