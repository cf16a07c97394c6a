"""The commands from end to end on a tiny mixture; bad input is one line, exit code 2, and nothing is written."""

import json
import shutil
import sys

import pyarrow.parquet
import pytest
from tiny_models import lora_mixture, tiny_folder
from transformers import AutoModelForCausalLM

pytest.importorskip("plotly", reason="needs the extra 'study'")
pytest.importorskip("matplotlib", reason="needs the extra 'study'")

from moe_common.models.base_model import COMMITTED_FOLDER
from moe_common.runs.commands import STOPPED
from moe_ext.router_study.__main__ import COMMANDS, main

TEXT = {"max_tokens": 256, "row_tokens": 32, "split": "all"}


@pytest.fixture
def say(tiny_folder, sources, tmp_path, monkeypatch, capsys):
    """A function that runs a command in an empty folder, and returns its exit code, output and last line of error."""
    monkeypatch.chdir(tmp_path)

    def run(command, *words, **options):
        options = {"model": tiny_folder, "data": sources, **TEXT, **options}
        flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
        capsys.readouterr()
        try:
            code = main([*command.split(), *flags, *words])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out, said.err.strip().splitlines()[-1] if said.err.strip() else ""

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of a run's time; one test draws them."""
    monkeypatch.setattr("moe_ext.router_study.report.folder.write_pictures", lambda drawings, folder: [])


def test_run_writes_json_parquet_a_page_and_pictures(say, tmp_path):
    code, told, _ = say("run", "--as_in_script", "--save_logits", out="study", replicates=10, least_seen=3)
    assert code == 0
    assert told == "The report lies in study/report.html\n"
    page = (tmp_path / "study/report.html").read_text()
    assert "http" not in page.split('<script type="application/gzip"')[0]
    assert page.count('class="plot') > 15
    assert len(page) < 2_500_000
    study = json.loads((tmp_path / "study/study.json").read_text())
    assert study["about"]["tokens"] == {"letters": 256, "numbers": 256, "words": 256}
    assert (study["experts"], study["chosen"], study["layers"]) == (4, 2, ["0", "1"])
    figure = study["routing"]["coactivation.strongest_as_in_script"]
    assert all(len(figure[name]) == 2 for name in ("value", "low", "high", "chance", "shuffled"))
    assert {"weights.cosine", "experts.alignment"} <= set(study["weights"])
    table = pyarrow.parquet.read_table(tmp_path / "study/figures.parquet").to_pylist()
    place = ("domains.rate", "words", "1")
    rates = [row for row in table if (row["figure"], row["domain"], row["layer"]) == place]
    assert sum(row["value"] for row in rates) == pytest.approx(2)
    assert {row["kind"] for row in pyarrow.parquet.read_table(tmp_path / "study/favourites.parquet").to_pylist()} == {
        "input",
        "next",
        "predicted",
    }
    pictures = {path.name for path in (tmp_path / "study/pictures").iterdir()}
    assert pictures == {f"{name}.png" for name in [*study["sentences"], "overview"]}
    judged = ("chance", "shuffle", "random")
    assert all(any(word in sentence for word in judged) for sentence in study["sentences"].values())
    assert (tmp_path / "study/findings.md").read_text().count("\n- **") == len(study["sentences"])
    assert len(list((tmp_path / "study/logits").iterdir())) == 3
    assert not (tmp_path / "study.unfinished").exists()


def test_several_revisions_get_a_folder_each(say, undrawn, revisions_folder):
    code, told, _ = say(
        "run", "--revision", "step5-tokens1K", "main", model=revisions_folder, out="both", replicates=3
    )
    assert code == 0
    assert told == "The reports lie in both/step5-tokens1K/report.html, both/main/report.html\n"


def test_revisions_of_one_name_are_refused_before_the_first_is_read(say, tmp_path, revisions_folder):
    shutil.copytree(revisions_folder / "main", tmp_path / "other/main")
    code, told, error = say("run", "--revision", "main", "other/main", model=revisions_folder, out="both")
    assert (code, told) == (2, "")
    assert "Two revisions would be written to both/main" in error
    assert not (tmp_path / "both").exists()


def test_evolution_compares_revisions_with_the_last(say, undrawn, tmp_path, revisions_folder):
    code, told, _ = say(
        "evolution", "--revisions", "main", "step40-tokens8K", "step5-tokens1K", model=revisions_folder, out="grown"
    )
    assert code == 0
    assert "at step40-tokens8K 100%; by chance 50.0%" in told
    held = json.loads((tmp_path / "grown/saturation.json").read_text())
    assert [one["revision"] for one in held["saturation"]] == ["step5-tokens1K", "step40-tokens8K"]
    held = {path.name for path in (tmp_path / "grown").iterdir()}
    assert held == {"pictures", "report.html", "run.json", "saturation.json"}
    words = ["evolution", "--revisions", "main", "step40-tokens8K", "step5-tokens1K"]
    code, told, _ = say(*words, model=revisions_folder, out="grown")
    assert (code, told) == (0, "grown is there already, made with the same options.\n")


@pytest.mark.parametrize("to", ["nowhere", "next", "1"])
def test_intervene_measures_every_expert_in_every_domain(say, undrawn, tmp_path, to):
    code, told, _ = say("intervene", "--experts", "0", "2", out="changed", to=to, max_tokens=64)
    assert code == 0
    assert "chance" in told or "at random" in told
    held = json.loads((tmp_path / "changed/effects.json").read_text())["effects"]
    assert len(held) == 2 * 2 * 3
    assert {effect["expert"] for effect in held} == {0, 2}


def test_reproduce_holds_a_model_against_the_paper(say, undrawn, tmp_path, revisions_folder):
    shutil.copytree(revisions_folder, "three")
    (tmp_path / "three/step5-tokens1K").rename(tmp_path / "three/step12000-tokens50B")
    (tmp_path / "three/step40-tokens8K").rename(tmp_path / "three/step490000-tokens2055B")
    code, told, _ = say(
        "reproduce olmoe",
        "--revisions",
        "step12000-tokens50B",
        "step490000-tokens2055B",
        "main",
        model="three",
        out="held",
    )
    assert code == 0
    assert "| top-2 saturation at 1% of training | about 60% (chance 12.5%)" in told
    checks = json.loads((tmp_path / "held/reproduction.json").read_text())["checks"]
    assert [check["holds"] for check in checks[:2]] == [None, False] or checks[1]["measured"].startswith("100.0%")
    assert (tmp_path / "held/table.md").read_text().count("|\n") == len(checks) + 2


def test_overhead_is_a_ratio_of_both_times(capsys, tiny_folder):
    assert main(["overhead", f"--model={tiny_folder}", "--rounds=2", "--batch_size=1", "--row_tokens=16"]) == 0
    told = capsys.readouterr().out
    assert "a pass that collects takes" in told
    assert "of 2 rounds in turns; 16 tokens" in told


def test_a_lora_mixture_is_studied_from_its_folder(say, undrawn, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path / "base", num_hidden_layers=3))
    lora_mixture(base).save_pretrained(tmp_path / "mixture")
    code, told, error = say("run", model="mixture", out="study", replicates=5)
    assert code == 0, error
    study = json.loads((tmp_path / "study/study.json").read_text())
    assert study["layers"][:2] == ["0.q_proj", "0.down_proj"]
    assert study["experts"] == 4


def test_a_run_without_a_tracker_refuses_before_it_reads(say, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, error = say("run", out="study", report_to="wandb")
    assert code == 2
    assert "report_to is wandb, but it is not installed. Install it with: pip install '.[track]'" in error


def test_scalars_go_to_tensorboard(say, undrawn, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra 'track'")
    assert say("run", out="study", replicates=3, report_to="tensorboard")[0] == 0
    assert list((tmp_path / "study/tensorboard").glob("events.*"))


def test_without_plotly_the_extra_is_named_before_anything_is_read(say, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, _, error = say("run", out="study")
    assert code == 2
    assert "plotly, which is not installed. Install it with: pip install '.[study]'" in error


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("run", {"model": COMMITTED_FOLDER}, "is a dense model: its class records no router logits"),
        ("run", {"model": "no/such/folder"}, "There is no model folder"),
        ("run", {"revision": "step6"}, "has no revision 'step6'. It holds none"),
        ("run", {"data": "prosa"}, "Unknown dataset 'prosa'. Closest: 'prose'"),
        ("run", {"data": "notes=empty.txt"}, "empty.txt is empty"),
        ("run", {"data": "notes=short.txt"}, "has 4 tokens, but 256 are needed"),
        ("run", {"data": "a=b=,"}, "is no list of domains"),
        ("run", {"row_tokens": 100, "max_tokens": 200}, "model's context has 64 tokens"),
        ("run", {"layers": 7}, "There is no layer 7: the model has 2 layers with a router, 0 to 1"),
        ("run", {"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ("run", {"max_tokens": 10}, "max_tokens is 10, but must be at least 32"),
        ("run", {"replicates": 1}, "replicates is 1, but must be at least 2"),
        ("run", {"out": "taken"}, "taken is there already"),
        ("run", {"report_to": "paper"}, "invalid choice: 'paper'"),
        ("evolution", {"revisions": "main"}, "1 revision was given, but two are needed"),
        ("intervene", {"experts": 9}, "There is no expert 9: a gate has 4, 0 to 3"),
        ("intervene", {"to": "away"}, "to is 'away'"),
        ("overhead", {"data": None, "max_tokens": None, "split": None, "rounds": 0}, "rounds is 0"),
        ("reproduce olmoe", {"model": "allenai/OLMoE-1B-7B-0924"}, "could not be read from the hub"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(say, tmp_path, command, options, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("kept")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("three words")
    before = sorted(tmp_path.rglob("*"))
    out = {} if command == "overhead" else {"out": "study"}
    code, told, error = say(command, **{**out, **options})
    assert (code, told) == (2, "")
    assert message in error
    assert error.startswith(f"python -m moe_ext.router_study {command}: error: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [[], ["walk"], ["reproduce"], ["reproduce", "mixtral"]])
def test_an_unknown_command_is_refused(words, capsys):
    assert main(words) == 2
    assert "Give one of run, evolution, intervene, reproduce olmoe, overhead." in capsys.readouterr().err


def test_help_names_every_command_and_every_command_helps(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        assert "--" in capsys.readouterr().out


def test_a_run_that_is_interrupted_says_how_to_go_on(say, undrawn, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("moe_ext.router_study.commands.run.write_study", stop)
        code, _, error = say("run", out="study", replicates=3)
    assert (code, error) == (130, STOPPED)
    assert not (tmp_path / "study").exists()
    assert list((tmp_path / "study.unfinished").glob("checkpoint-*/state.pt"))
    assert say("run", out="study", replicates=3)[0] == 0
    assert not (tmp_path / "study.unfinished").exists()
