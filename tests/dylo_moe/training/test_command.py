"""`dylo-moe-train` as a user meets it: every option acts, bad input is one line, a killed run goes on as if not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftConfig
from tiny_models import tiny_folder

from dylo_moe.continual import run as continual
from dylo_moe.training import command, comparison

ROOT = Path(__file__).parents[3]


@pytest.fixture
def quick(monkeypatch):
    """Leave out what comes after training; it is tested in test_comparison.py."""
    monkeypatch.setattr(comparison, "_perplexities", lambda *args: {"base": {}, "mixture": {}})
    monkeypatch.setattr(comparison, "_speeds", lambda *args: {"base": 1.0, "routed": 1.0, "separate": 1.0})
    monkeypatch.setattr(comparison, "_continuations", lambda *args: {})
    monkeypatch.setattr(comparison, "draw_usage", lambda *args: None)


def history(run: Path) -> list[dict]:
    return json.loads((run / "mixture" / "finished.json").read_text())["history"]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in history(run) if "loss" in line}


def refused(argv: list[str], capsys) -> str:
    """The one line that the command answers bad input with."""
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1
    return said[0]


@pytest.mark.usefixtures("quick")
def test_the_options_of_the_experts_and_the_router_are_those_of_what_is_saved(tiny_options, tmp_path):
    chosen = {"num_experts": 5, "lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "balance_coefficient": 0.125}
    chosen |= {"top_k": 1, "router_scope": "layer", "dense_training": True}
    assert command.main(tiny_options(tmp_path, compare=False, num_steps=1, **chosen)) == 0
    saved = PeftConfig.from_pretrained(tmp_path / "mixture")
    assert len(saved.expert_names) == 5
    assert (saved.r, saved.lora_alpha, saved.lora_dropout) == (3, 7, 0.25)
    assert (saved.router_balance_coef, saved.top_k, saved.router_scope) == (0.125, 1, "layer")
    assert saved.router_selection == "hybrid"


@pytest.mark.usefixtures("quick")
def test_epochs_batch_and_accumulation_give_the_number_of_steps(tiny_options, tmp_path):
    chosen = {"num_steps": None, "num_epochs": 2, "train_batch_size": 3, "gradient_accumulation_steps": 4}
    argv = tiny_options(tmp_path, compare=False, training_subset=20, **chosen)
    assert command.main(argv) == 0
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["training"]["num_epochs"] == 2
    data = comparison.DataConfig(**settings["data"])
    _, tokenizer = comparison.load_base_model(settings["run"]["model_name"])
    rows = sum(
        len(comparison.prepare(name, "train", tokenizer, data, seed=0, apart=True).rows) for name in data.domains
    )
    batches = -(-rows // 3)
    assert history(tmp_path)[-1]["step"] == 2 * -(-batches // 4)


@pytest.mark.usefixtures("quick")
def test_dropout_acts_in_training(tiny_options, tmp_path):
    for name, dropout in {"with": 0.5, "without": 0.0}.items():
        argv = tiny_options(tmp_path / name, compare=False, logging_steps=1, lora_dropout=dropout)
        assert command.main(argv) == 0
    # B is zero at first, so that dropout before A cannot be seen in the first loss
    assert losses(tmp_path / "with")[1] == losses(tmp_path / "without")[1]
    assert losses(tmp_path / "with")[4] != losses(tmp_path / "without")[4]


@pytest.mark.usefixtures("quick")
def test_the_routing_of_every_layer_is_in_the_history(tiny_options, tmp_path):
    assert command.main(tiny_options(tmp_path, compare=False, logging_steps=2)) == 0
    first = history(tmp_path)[0]
    assert {"router_balance", "router_entropy"} <= first.keys()
    for block in (0, 1):
        usage = [value for name, value in first.items() if f"layers.{block}/usage/" in name]
        assert len(usage) == 3
        assert sum(usage) == pytest.approx(1)


@pytest.mark.usefixtures("quick")
def test_training_stops_early_and_keeps_the_best(tiny_options, tmp_path):
    chosen = {"early_stopping_patience": 2, "learning_rate": 5.0, "num_steps": 40, "save_steps": 1}
    assert command.main(tiny_options(tmp_path, compare=False, **chosen)) == 0
    validation = {line["step"]: line["eval_loss"] for line in history(tmp_path) if "eval_loss" in line}
    best = min(validation, key=validation.get)
    assert max(validation) == best + 2 < 40


def test_data_prep_only_prints_counts_and_writes_nothing(tiny_options, tiny_chats, tmp_path, capsys):
    output = tmp_path / "run"
    argv = tiny_options(output, datasets=tiny_chats, max_seq_length=64)
    assert command.main([*argv, "--data_prep_only"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if " train " in line)
    assert line.split()[1:3] == ["train", "instruction"]
    assert [int(cell.replace(",", "")) for cell in line.split()[3:]][0::2] == [40, 32, 8]  # examples, rows, left out
    assert not output.exists()


def test_continual_runs_with_its_own_options(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(continual, "run", lambda config: asked.append(config) or {"found": 1})
    monkeypatch.setattr(continual, "as_text", lambda results, output: f"{results} in {output}", raising=False)
    assert command.main(["--continual", "prose", "code", "--output_dir", str(tmp_path), "--lora_r", "3"]) == 0
    assert (asked[0].continual, asked[0].lora_r) == (["prose", "code"], 3)
    assert capsys.readouterr().out == f"{{'found': 1}} in {tmp_path}\n"


def test_continual_can_stand_in_the_file_of_options(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(continual, "run", lambda config: asked.append(config) or {})
    monkeypatch.setattr(continual, "as_text", lambda results, output: "", raising=False)
    (tmp_path / "grow.yaml").write_text("continual: [code, math]\n")
    assert command.main(["--config", str(tmp_path / "grow.yaml")]) == 0
    assert asked[0].continual == ["code", "math"]


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0, but must be at least 1"),
        ({"datasets": "proze"}, "Unknown dataset 'proze'. Closest: 'prose'"),
        ({"datasets": ","}, "names no dataset"),
        ({"datasets": "no/such/file.jsonl"}, "There is no file or folder no/such/file.jsonl"),
        ({"model_name": "no/such/folder/here"}, "There is no model folder"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"max_seq_length": 1}, "max_seq_length is 1"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"eval_blocks": 0}, "eval_blocks is 0"),
        ({"training_subset": 0}, "training_subset is 0.0, but must be a percentage"),
        ({"eval_subset": 101}, "eval_subset is 101.0, but must be a percentage"),
        ({"label_smoothing": 1}, "label_smoothing is 1.0"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both set"),
        ({"report_to": "stdout"}, "report_to names 'stdout', but must be none or some of tensorboard, wandb, trackio"),
        ({"quant": "3bit"}, "invalid choice: '3bit'"),
        ({"lr_strategy": "up"}, "invalid choice: 'up'"),
        ({"resume_from_checkpoint": True}, "holds no whole checkpoint of a run to continue"),
        ({"num_expert": 3}, "--num_expert=3"),
    ],
)
def test_bad_input_is_one_line_with_code_2_and_writes_nothing(tiny_options, tmp_path, capsys, changed, message):
    output = tmp_path / "run"
    assert message in refused(tiny_options(output, **changed), capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty. Give a file with at least one document"),
        ('{"text": "fine"}\n{"text": "cut o\n', "line 2 is not JSON"),
        ('{"text": "fine"}\n[1]\n', "line 2 holds a JSON list"),
        ('{"question": "a", "reply": "b"}\n', "has no column 'text'; its columns are question, reply"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n' * 40, "has no message of the role 'assistant'"),
        (
            '{"messages": [{"from": "user", "value": "a"}]}\n' * 40,
            "line 1: message 1 holds from, value, but must hold a role and a content",
        ),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tiny_options, tmp_path, capsys, content, message):
    (tmp_path / "train.jsonl").write_text(content)
    output = tmp_path / "run"
    said = refused(tiny_options(output, datasets=tmp_path / "train.jsonl"), capsys)
    assert message in said
    assert not output.exists()


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_of_another_base_is_refused_and_both_are_named(tiny_options, tiny_base, tmp_path, capsys):
    assert command.main(tiny_options(tmp_path / "run", compare=False, num_steps=2)) == 0
    tiny_folder(tmp_path / "other", hidden_size=48)
    said = refused(tiny_options(tmp_path / "run", compare=False, num_steps=2, model_name=tmp_path / "other"), capsys)
    assert f"model_name ({tiny_base} there, {tmp_path / 'other'} asked for)" in said
    # the same name, but another model behind it
    noted = json.loads((tmp_path / "run" / "run.json").read_text())
    noted["settings"]["run"]["model_name"] = str(tmp_path / "other")
    (tmp_path / "run" / "run.json").write_text(json.dumps(noted))
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "mixture" / "finished.json").unlink()
    said = refused(tiny_options(tmp_path / "run", compare=False, num_steps=2, model_name=tmp_path / "other"), capsys)
    assert str(tiny_base) in said and "hidden_size 32 against 48" in said


# -- interrupted -----------------------------------------------------------------------------------------------------


def start(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stderr=subprocess.DEVNULL)


@pytest.mark.usefixtures("quick")
def test_a_killed_run_continues_with_the_losses_of_one_that_was_not(tiny_options, tmp_path):
    chosen = {"num_steps": 60, "save_steps": 5, "logging_steps": 1, "lora_dropout": 0.1, "compare": False}
    assert command.main(tiny_options(tmp_path / "whole", **chosen)) == 0

    killed = start(tiny_options(tmp_path / "killed", **chosen))
    checkpoints = tmp_path / "killed" / "mixture" / "checkpoints"
    while not list(checkpoints.glob("*0/complete.json")):
        assert killed.poll() is None
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "mixture" / "finished.json").exists()

    assert command.main([*tiny_options(tmp_path / "killed", **chosen), "--resume_from_checkpoint"]) == 0
    whole, continued = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert len(whole) == 60
    assert continued == whole
    tensors = [(tmp_path / run / "mixture" / "adapter_model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert tensors[0] == tensors[1]


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_that_was_cut_off_is_passed_over(tiny_options, tmp_path, caplog):
    caplog.set_level("INFO")
    chosen = {"num_steps": 8, "save_steps": 2, "logging_steps": 1, "compare": False}
    assert command.main(tiny_options(tmp_path, **chosen)) == 0
    whole = losses(tmp_path)
    (tmp_path / "mixture" / "finished.json").unlink()
    (tmp_path / "results.json").unlink()
    newest = tmp_path / "mixture" / "checkpoints" / "checkpoint-8"
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    assert command.main([*tiny_options(tmp_path, **chosen), "--resume_from_checkpoint"]) == 0
    assert f"{newest} is damaged or was cut off while it was written" in caplog.text
    assert f"continuing from {newest.with_name('checkpoint-6')}" in caplog.text
    assert losses(tmp_path) == whole


@pytest.mark.usefixtures("quick")
def test_with_resume_false_a_finished_run_begins_anew(tiny_options, tmp_path):
    assert command.main(tiny_options(tmp_path, compare=False)) == 0
    before = (tmp_path / "mixture" / "finished.json").stat().st_mtime_ns
    assert command.main(tiny_options(tmp_path, compare=False)) == 0
    assert (tmp_path / "mixture" / "finished.json").stat().st_mtime_ns == before
    assert command.main([*tiny_options(tmp_path, compare=False), "--resume_from_checkpoint", "false"]) == 0
    assert (tmp_path / "mixture" / "finished.json").stat().st_mtime_ns > before


@pytest.mark.usefixtures("quick")
def test_begun_anew_and_stopped_nothing_of_the_run_before_passes_for_trained(tiny_options, tmp_path, monkeypatch):
    assert command.main(tiny_options(tmp_path)) == 0

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "train_adapter", stop)
    assert command.main([*tiny_options(tmp_path), "--resume_from_checkpoint", "false"]) == 130
    for name in ("mixture", "lora"):
        assert not (tmp_path / name / "finished.json").exists()
        assert not list((tmp_path / name).glob("checkpoints/*"))


@pytest.mark.parametrize("asked", [["--datasets", "notes.txt"], ["--continual", "notes.txt"]])
def test_without_matplotlib_a_run_is_refused_before_anything_is_read(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        command.main([*asked, "--output_dir", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "Drawing needs matplotlib. Install it with: pip install '.[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_names_every_option_of_the_issue(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "Train a mixture of LoRA experts" in said
    options = "model_name num_experts lora_r lora_alpha lora_dropout datasets training_subset eval_subset num_epochs"
    options += " bf16 fp16 train_batch_size eval_batch_size gradient_accumulation_steps max_seq_length keep_truncated"
    options += " balance_coefficient weight_decay label_smoothing lr_strategy interleaved_sampling quant report_to"
    options += " early_stopping_patience resume_from_checkpoint gradient_checkpointing data_prep_only config continual"
    assert [name for name in options.split() if f"--{name}" not in said] == []
