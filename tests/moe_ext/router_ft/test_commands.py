"""The commands from end to end on a tiny mixture, and bad input: one line, exit code 2, nothing half written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")
pytest.importorskip("scipy", reason="needs the extra 'quant'")

from moe_common.models.base_model import COMMITTED_FOLDER
from moe_ext.router_ft.__main__ import COMMANDS, main
from moe_ext.router_ft.load import load, read_tensors
from moe_ext.routers import router_parameters

TEXT = {"nsamples": 6, "seqlen": 16}


@pytest.fixture
def say(tiny_folder, tiny_sources, tmp_path, monkeypatch, capsys):
    """A function that runs a step in an empty folder, and returns its exit code, output and error."""
    monkeypatch.chdir(tmp_path)

    def run(step, **options):
        takes_text = {"dataset": tiny_sources, **TEXT} if step in ("quantize", "finetune", "run") else {}
        model = {} if step in ("evaluate", "export") else {"model": tiny_folder}
        words = [
            f"--{name}={value}" for name, value in {**model, **takes_text, **options}.items() if value is not None
        ]
        capsys.readouterr()
        try:
            code = main([step, *words])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out, said.err.strip().splitlines()[-1] if said.err.strip() else ""

    return run


@pytest.fixture
def planned(say, tmp_path):
    """An alpha table and a plan in the working folder."""
    assert say("alpha", output="alpha.csv")[0] == 0
    assert say("allocate", alpha_csv="alpha.csv", budget_bits=4.2, output="plan.json")[0] == 0
    return tmp_path


def test_the_steps_lead_from_a_model_to_finetuned_routers(say, planned, tiny_sources):
    code, told, _ = say("quantize", config="plan.json", save="out")
    assert code == 0
    assert "bits a quantised weight" in told
    assert "calibration tokens an expert" in told
    code, told, _ = say("finetune", checkpoint="out", save="out2", lr=1e-3, num_epochs=2)
    assert code == 0
    assert "256 router weights in 10 steps; ce on text that was not trained on" in told
    before, after = read_tensors(planned / "out"), read_tensors(planned / "out2")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == set(router_parameters(load("out").model))
    assert set(load("out2").record) == {"versions", "quantize", "finetune"}
    for checkpoint in ("out2", "out"):
        code, told, _ = say(
            "evaluate", checkpoint=checkpoint, dataset=tiny_sources, seqlen=16, output=f"{checkpoint}.json"
        )
        assert code == 0
        assert "perplexity" in told
    perplexities = [json.loads((planned / f"{name}.json").read_text())["perplexity"] for name in ("out", "out2")]
    assert perplexities[0] != perplexities[1]


def test_steps_that_are_done_say_so_and_where_and_other_options_are_refused(say, planned, tiny_sources):
    steps = {
        "allocate": {"alpha_csv": "alpha.csv", "budget_bits": 4.2, "output": "plan.json"},
        "quantize": {"config": "plan.json", "save": "out", "method": "round"},
        "finetune": {"checkpoint": "out", "save": "out2"},
        "evaluate": {"checkpoint": "out2", "dataset": tiny_sources, "seqlen": 16, "output": "found.json"},
    }
    for step, options in steps.items():
        assert say(step, **options)[0] == 0
    held = {path: path.read_bytes() for path in planned.rglob("*") if path.is_file()}
    for step, options in steps.items():
        code, told, _ = say(step, **options)
        assert code == 0
        assert f"{options.get('save', options.get('output'))} is there already" in told
        other = {"seqlen": 8} if step == "evaluate" else {"seed": 7}
        code, _, error = say(step, **{**options, **other})
        assert code == 2
        assert f"{[*other][0]} (" in error
    assert {path: path.read_bytes() for path in planned.rglob("*") if path.is_file()} == held


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_output_over_the_model_is_refused_and_the_model_kept(say, tiny_folder, tiny_sources, name):
    place = Path(tiny_folder) / name
    held = place.read_bytes()
    for step, options in {
        "alpha": {"output": place},
        "allocate": {"alpha_csv": place, "output": place, "budget_bits": 4},
        "evaluate": {"checkpoint": tiny_folder, "dataset": tiny_sources, "output": place},
    }.items():
        code, _, error = say(step, **options)
        assert (code, place.read_bytes()) == (2, held)
        assert str(place) in error


def test_a_checkpoint_is_exported_and_refused_a_second_time(say, planned):
    assert say("quantize", config="plan.json", save="out", method="round")[0] == 0
    assert say("export", checkpoint="out", save="out.pt", format="pt")[0] == 0
    assert load("out.pt").plan == load("out").plan
    assert say("export", checkpoint="out", save="out.pt")[0] == 2


def test_finetuning_towards_the_full_precision_model_reads_it(say, planned):
    assert say("quantize", config="plan.json", save="out", method="round")[0] == 0
    code, told, _ = say("finetune", checkpoint="out", save="out2", objective="kl", gradient_checkpointing=True)
    assert code == 0
    assert "kl on text" in told


def test_a_ratio_of_mxfp4_is_that_part_of_the_weights(say, planned):
    code, told, _ = say("allocate", alpha_csv="alpha.csv", mxfp4_ratio=0.25, output="ratio.json")
    assert code == 0
    assert "7.2500 bits a quantised weight" in told
    formats = [entry["format"] for entry in json.loads((planned / "ratio.json").read_text())["matrices"].values()]
    assert (formats.count("MXFP4"), formats.count("MXFP8"), formats.count("BF16")) == (6, 18, 8)


def test_the_plan_says_what_it_costs_and_how_it_was_made(say, planned):
    plan = json.loads((planned / "plan.json").read_text())
    assert 4.0 < plan["bits_per_weight"] <= 4.2
    assert plan["made_by"]["sensitivity"] == "lower_alpha"


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        ("alpha", {"model": str(COMMITTED_FOLDER)}, "is a dense model"),
        ("alpha", {"model": "no/such/folder"}, "There is no model folder"),
        ("alpha", {"estimate": "best"}, "invalid choice: 'best'"),
        ("allocate", {"alpha_csv": "alpha.csv"}, "either budget_bits or mxfp4_ratio"),
        ("allocate", {"alpha_csv": "alpha.csv", "mxfp4_ratio": 2}, "mxfp4_ratio is 2.0"),
        (
            "allocate",
            {"output": "p", "alpha_csv": "none.csv", "budget_bits": 4},
            "There is no alpha table none.csv",
        ),
        ("allocate", {"output": "p", "alpha_csv": "short.csv", "budget_bits": 4}, "has no row for"),
        (
            "allocate",
            {"output": "p", "alpha_csv": "alpha.csv", "budget_bits": 4, "formats": "INT4,INT5"},
            "Unknown format 'INT5'",
        ),
        ("allocate", {"output": "p", "alpha_csv": "alpha.csv", "budget_bits": 3}, "The budget is 3.0 bits"),
        ("quantize", {"config": "unknown.json", "save": "x"}, "Unknown format 'INT5'"),
        ("quantize", {"config": "other.json", "save": "x"}, "was made for another model"),
        ("quantize", {"config": "plan.json", "save": "x", "nsamples": 5000}, "but 2500 are needed"),
        ("quantize", {"config": "plan.json", "save": "x", "seqlen": 4096}, "the model's context has 64 tokens"),
        ("quantize", {"config": "plan.json", "save": "x", "dataset": "prosa"}, "Unknown dataset 'prosa'"),
        ("quantize", {"config": "plan.json", "save": "taken"}, "taken is there already"),
        ("finetune", {"checkpoint": "none", "save": "x"}, "There is no checkpoint folder none"),
        ("finetune", {"checkpoint": "cut", "save": "x"}, "truncated or damaged"),
        ("finetune", {"checkpoint": "taken", "save": "x"}, "has no router_ft.json"),
        ("finetune", {"checkpoint": "cut", "save": "x", "lr": -1}, "lr is -1.0"),
        ("evaluate", {"checkpoint": "cut"}, "truncated or damaged"),
        ("evaluate", {"checkpoint": "cut", "max_blocks": 0}, "max_blocks is 0, but must be at least 1"),
        ("run", {"plans": "INT9"}, "'INT9' is no plan"),
        ("run", {"max_blocks": -1}, "max_blocks is -1, but must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(say, planned, step, options, message):
    shutil.copy("alpha.csv", "short.csv")
    lines = (planned / "short.csv").read_text().splitlines()
    (planned / "short.csv").write_text("\n".join(lines[:-12]) + "\n")
    text = (planned / "plan.json").read_text()
    (planned / "unknown.json").write_text(text.replace('"INT3",\n', '"INT5",\n'))
    (planned / "other.json").write_text(text.replace("layers.0.mlp.experts.0.up", "layers.9.mlp.experts.0.up"))
    (planned / "taken").mkdir()
    (planned / "taken" / "config.json").write_text("{}")
    if "cut" in options.values():
        assert say("quantize", config="plan.json", save="cut", method="round")[0] == 0
        file = planned / "cut" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
    before = sorted(planned.rglob("*"))
    code, told, error = say(step, **options)
    assert code == 2
    assert told == ""
    assert message in error
    assert error.startswith(f"python -m moe_ext.router_ft {step}: error: ")
    assert sorted(planned.rglob("*")) == before


def test_an_unknown_step_is_refused_and_help_is_given(capsys):
    assert main(["prune"]) == 2
    assert "'prune' is no command. Give one of alpha, allocate" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    for step in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([step, "--help"])
        assert ended.value.code == 0
