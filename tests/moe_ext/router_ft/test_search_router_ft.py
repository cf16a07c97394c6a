"""The search for the settings of router finetuning: every objective gets a bracketed rate, and nothing is redone."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")
pytest.importorskip("scipy", reason="needs the extra 'quant'")

from moe_ext.router_ft import study

SCRIPT = Path(__file__).parents[3] / "scripts" / "search_router_ft.py"
spec = importlib.util.spec_from_file_location("search_router_ft", SCRIPT)
search_router_ft = importlib.util.module_from_spec(spec)
spec.loader.exec_module(search_router_ft)


@pytest.fixture
def argv(tiny_folder, tiny_sources, tmp_path):
    sizes = {"nsamples": 8, "seqlen": 16, "max_blocks": 4, "lr": 0.1}
    named = {"model": tiny_folder, "dataset": tiny_sources, "output": tmp_path / "search", "objectives": "align,ce"}
    return [f"--{name}={value}" for name, value in (sizes | named).items()]


def test_every_objective_has_a_bracketed_rate_and_a_second_call_measures_nothing(argv, capsys, monkeypatch):
    assert search_router_ft.main(argv) == 0
    told = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if "%" in line]
    assert {row[0] for row in rows} == {"align", "ce"}
    for objective in ("align", "ce"):
        losses = [float(row[2]) for row in rows if row[0] == objective]
        assert len(losses) >= 3
        assert min(losses[1:-1]) <= min(losses[0], losses[-1])
    assert "best: --objective " in told
    monkeypatch.setattr(study, "losses_by_source", lambda *_: pytest.fail("measured again"))
    assert search_router_ft.main(argv) == 0
    assert capsys.readouterr().out == told
    assert search_router_ft.main([*argv, "--objectives", "ce"]) == 0
    fewer = capsys.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("| ce ")] == [
        line for line in fewer.splitlines() if line.startswith("| ce ")
    ]
    assert "| align " not in fewer


def test_an_unknown_objective_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        search_router_ft.main([*argv, "--objectives", "luck"])
    assert stopped.value.code == 2
    assert "There is no objective 'luck'. There are: ce, kl, align, blocks." in capsys.readouterr().err
