"""`dylo-moe-validate` from its options to its table, its JSON and its exit code, on tiny random models."""

import contextlib
import io
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from moe_testing import spread_gates, tiny_base
from peft import LoraConfig, MoELoraConfig, get_peft_model
from peft.tuners.lora import moe_layer
from peft.tuners.lora.moe_router import SCOPES, RouterConfig
from transformers import AutoModelForCausalLM

import validate_moe_modifications
from dylo_moe.equivalence import command

ROOT = Path(__file__).parents[3]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A random model of two blocks; no tokenizer beside it."""
    folder = tmp_path_factory.mktemp("base")
    tiny_base("llama").save_pretrained(folder)
    return folder


def run(*options) -> tuple[int, str]:
    """Exit code and standard output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = validate_moe_modifications.main([str(option) for option in options])
    return code, printed.getvalue()


def refused(capsys, *options) -> str:
    """The error line of a run that must end with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        validate_moe_modifications.main([str(option) for option in options])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1 and lines[-1] == errors[0]
    return errors[0]


def random_mixture(base_folder, **config):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    settings = {"num_experts": 2, "r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(base, MoELoraConfig(init_lora_weights=False, **settings))
    spread_gates(model)
    return model


def random_adapters(base_folder, names=("default", "other"), **config):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    settings = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", "init_lora_weights": False, **config}
    model = get_peft_model(base, LoraConfig(r=2, **settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=4, **settings))
    model.base_model.set_adapter(list(names))
    return model


@pytest.fixture(scope="module")
def validated(base_folder, tmp_path_factory):
    """Exit code, table and JSON of a run on the tiny model."""
    file = tmp_path_factory.mktemp("results") / "validation.json"
    code, table = run("--model", base_folder, "--json", file)
    assert [path.name for path in file.parent.iterdir()] == ["validation.json"]
    return code, table, json.loads(file.read_text())


def test_a_sound_model_passes_with_exit_code_0(validated):
    code, table, results = validated
    assert code == 0
    assert results["failed"] == 0
    assert "FAIL" not in table
    assert {row["verdict"] for row in results["results"]} == {"pass", "measured", "skipped"}


def test_the_table_has_the_four_columns_and_a_row_for_each_check(validated):
    _, table, results = validated
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == ["check", "largest difference", "tolerance and why", "verdict"]
    assert {row[0] for row in rows[2:]} == {row["check"] for row in results["results"]}
    assert len(rows) - 2 == len({row["check"] for row in results["results"]})


def test_every_exact_oracle_was_run(validated):
    checks = {row["check"]: row for row in validated[2]["results"]}
    for start in (
        "all weights zero = disable_adapter()",
        "one-hot rows = adapter_names",
        "constant weights = add_weighted_adapter",
        "weights for each token = float64 loop",
        "one pass for each expert, one-hot weights",
        "one pass for each expert, only the last linear",
    ):
        (found,) = [row for check, row in checks.items() if check.startswith(start)]
        assert found["verdict"] == "pass"
        assert 0 <= found["difference"] <= found["tolerance"]


def test_every_router_scope_was_checked_and_what_it_cannot_do_is_skipped_with_the_reason(validated):
    rows = [row for row in validated[2]["results"] if row["router"]]
    assert {row["router"] for row in rows} == set(SCOPES)
    skipped = {(row["router"], row["check"].split(":")[0]): row["why"] for row in rows if row["verdict"] == "skipped"}
    assert skipped[("two_pass", "KV cache")] == "a two_pass router has no KV cache, and says so"


def test_the_gap_to_mixed_logits_is_measured_and_not_called_zero(validated):
    rows = {row["check"]: row for row in validated[2]["results"]}
    gap = rows["mixing in the layers against mixing logits"]
    assert gap["verdict"] == "measured" and gap["tolerance"] is None
    assert gap["difference"] > 1e-4
    ratios = rows["that gap, update halved: the ratio of gaps nears 4"]
    assert 3.6 <= float(ratios["why"].rsplit(" ", 1)[1]) <= 4.4


def test_the_oracle_that_is_itself_wrong_for_rslora_says_what_it_left_out(validated):
    (row,) = [row for row in validated[2]["results"] if '"cat"' in row["check"]]
    assert row["why"].endswith("weight 0 for three: cat is wrong for rsLoRA")


def test_the_json_names_versions_model_and_settings(validated, base_folder):
    results = validated[2]
    expected = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    assert results["versions"].items() >= expected.items()
    assert results["model"] == str(base_folder)
    settings = {"base_class": "LlamaForCausalLM", "dtype": "float32", "batch": 2, "length": 12}
    assert results["settings"].items() >= settings.items()
    assert results["settings"]["experts"]["two"] == {"r": 8, "lora_alpha": 4}


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_a_saved_mixture_is_checked_with_its_own_experts_and_router(base_folder, tmp_path, scope):
    model = random_mixture(base_folder, router_scope=scope, top_k=1)
    model.save_pretrained(tmp_path / "mixture")
    (tmp_path / "mixture" / "checkpoint-3").mkdir()  # as a Trainer leaves it
    model.save_pretrained(tmp_path / "mixture" / "checkpoint-3")
    code, _ = run("--checkpoint", tmp_path / "mixture", "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert code == 0
    assert {row["router"] for row in results["results"]} == {None, scope}
    assert results["settings"]["experts"] == ["expert_0", "expert_1"]
    assert results["settings"]["base"] == str(base_folder)


def test_a_folder_of_plain_adapters_is_checked_with_the_router_saved_beside_them(base_folder, tmp_path):
    model = random_adapters(base_folder)
    model.base_model.attach_router(RouterConfig(scope="model"))
    model.save_pretrained(tmp_path)
    code, _ = run("--checkpoint", tmp_path, "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert code == 0
    assert {row["router"] for row in results["results"]} == {None, "model"}
    assert results["settings"]["experts"] == ["default", "other"]


def test_a_single_adapter_is_checked_with_routers_of_every_scope_and_has_nothing_to_mix(base_folder, tmp_path):
    random_adapters(base_folder, ["default"], use_rslora=True).save_pretrained(tmp_path)
    code, table = run("--checkpoint", tmp_path)
    assert code == 0
    assert "| there is one expert: nothing to mix" in table
    assert "PEFT's cat is no oracle for these experts (default: cat is wrong for rsLoRA)" in table


def test_a_broken_layer_ends_with_exit_code_1_and_is_named(base_folder, tmp_path, monkeypatch):
    right = moe_layer.routed_forward

    def wrong(layer, x, **kwargs):
        result = right(layer, x, **kwargs)
        return result * 1.01 if layer.routing_port.layer_name == "model.layers.1.self_attn.v_proj" else result

    random_mixture(base_folder, router_scope="block").save_pretrained(tmp_path / "mixture")
    monkeypatch.setattr(moe_layer, "routed_forward", wrong)
    code, table = run("--checkpoint", tmp_path / "mixture", "--json", tmp_path / "results.json")
    assert code == 1
    results = json.loads((tmp_path / "results.json").read_text())
    failed = [row for row in results["results"] if row["verdict"] == "fail"]
    assert results["failed"] == len(failed) > 5
    named = [row["where"] for row in failed if row["where"]]
    assert len(named) > 5 and all("first in model.layers.1.self_attn.v_proj" in where for where in named)
    assert "FAIL weights for each token = float64 loop" in table
    assert "first in model.layers.1.self_attn.v_proj" in table


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_refused(capsys, tmp_path):
    assert "There is no folder" in refused(capsys, "--checkpoint", tmp_path / "none")


def test_a_folder_without_an_adapter_is_refused(capsys, base_folder):
    assert "has no adapter_config.json" in refused(capsys, "--checkpoint", base_folder)


def test_an_adapter_config_that_is_no_json_is_refused(capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused(capsys, "--checkpoint", tmp_path)


def test_adapters_of_another_kind_are_refused(capsys, base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert "but must be LORA or MOE_LORA" in refused(capsys, "--checkpoint", tmp_path)


def test_adapters_that_cannot_be_routed_are_refused(capsys, base_folder, tmp_path):
    random_adapters(base_folder, ["default"], use_dora=True).save_pretrained(tmp_path)
    assert "Dora" in refused(capsys, "--checkpoint", tmp_path)


def test_a_checkpoint_whose_base_is_gone_is_refused(capsys, base_folder, tmp_path):
    random_adapters(base_folder).save_pretrained(tmp_path)
    for file in tmp_path.rglob("adapter_config.json"):
        file.write_text(file.read_text().replace(str(base_folder), str(tmp_path / "gone")))
    assert "gone" in refused(capsys, "--checkpoint", tmp_path)


def test_a_checkpoint_that_does_not_name_its_base_is_refused(capsys, base_folder, tmp_path):
    random_adapters(base_folder, ["default"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    assert "Set base_model_name_or_path" in refused(capsys, "--checkpoint", tmp_path)


def test_a_damaged_weights_file_is_refused(capsys, base_folder, tmp_path):
    random_mixture(base_folder).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no weights")
    assert "cannot be loaded onto its base model" in refused(capsys, "--checkpoint", tmp_path)


def test_two_mixtures_in_one_folder_are_refused(capsys, base_folder, tmp_path):
    for name in "ab":
        random_mixture(base_folder).save_pretrained(tmp_path / name)
    assert "among them the mixtures ['a', 'b']" in refused(capsys, "--checkpoint", tmp_path)


def test_an_unknown_model_is_refused(capsys):
    assert "Unknown model 'bases'. Closest: 'base'" in refused(capsys, "--model", "bases")


def test_a_model_folder_without_weights_is_refused(capsys, base_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    assert str(tmp_path) in refused(capsys, "--model", tmp_path)


def test_a_model_that_is_no_causal_language_model_is_refused(capsys, tmp_path):
    transformers.CLIPVisionConfig().save_pretrained(tmp_path)
    assert "CLIPVisionConfig" in refused(capsys, "--model", tmp_path)


def test_checkpoint_and_model_together_are_refused(capsys, base_folder):
    assert "not allowed with argument" in refused(capsys, "--model", base_folder, "--checkpoint", base_folder)


def test_a_json_file_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "open_model", lambda name: pytest.fail("a model was loaded"))
    assert "which is not there. Make it first" in refused(capsys, "--json", tmp_path / "none" / "results.json")
    assert "is a folder. Give the name of a file" in refused(capsys, "--json", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_refused(capsys):
    assert "unrecognized arguments: --modle" in refused(capsys, "--modle", "base")


# -- the speed table, and the program itself -------------------------------------------------------------------------


@dataclass
class Row:
    way: str
    ratio: float


@pytest.fixture
def unchecked(monkeypatch):
    """No check is run."""
    monkeypatch.setattr(command, "validate", lambda source: [])


def test_benchmark_adds_the_speed_table_of_the_base_model(base_folder, tmp_path, monkeypatch, unchecked):
    table = types.ModuleType("benchmarks.table")

    def speed_table(make_base, *, num_tokens):
        base = make_base()
        assert (type(base).__name__, num_tokens) == ("LlamaForCausalLM", 512)
        assert not any("lora" in name for name, _ in base.named_parameters())
        return [Row("routed", 1.04)]

    table.speed_table, table.as_markdown = speed_table, lambda rows: f"| {rows[0].way} | {rows[0].ratio} |"
    monkeypatch.setitem(sys.modules, "benchmarks.table", table)
    code, printed = run("--model", base_folder, "--benchmark", "--json", tmp_path / "results.json")
    assert code == 0
    assert "| routed | 1.04 |" in printed
    assert json.loads((tmp_path / "results.json").read_text())["benchmark"] == [{"way": "routed", "ratio": 1.04}]


def test_without_benchmark_no_speed_is_measured(base_folder, tmp_path, monkeypatch, unchecked):
    monkeypatch.setitem(sys.modules, "benchmarks.table", None)  # importing it would fail
    assert run("--model", base_folder, "--json", tmp_path / "results.json")[0] == 0
    assert "benchmark" not in json.loads((tmp_path / "results.json").read_text())


def test_benchmark_without_the_benchmarks_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(validate_moe_modifications, "main", command.main)  # as dylo-moe-validate, outside a checkout
    assert "needs benchmarks/ of the repository" in refused(capsys, "--benchmark")


def test_a_package_that_the_model_needs_is_named_and_no_benchmark_blamed(capsys, monkeypatch):
    def quantised(name):
        raise ImportError("Loading it needs the package bitsandbytes")

    monkeypatch.setattr(command, "open_model", quantised)
    said = refused(capsys, "--model", "base")
    assert "needs the package bitsandbytes" in said and "benchmark" not in said


@pytest.mark.parametrize("while_it", ["open_model", "validate", "as_table"])
def test_ctrl_c_is_a_line_and_leaves_no_file(capsys, monkeypatch, tmp_path, while_it):
    def stop(given):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "open_model", lambda name: None)
    monkeypatch.setattr(command, "validate", lambda source: [])
    monkeypatch.setattr(command, while_it, stop)
    assert validate_moe_modifications.main(["--json", str(tmp_path / "results.json")]) == 130
    assert capsys.readouterr().err.endswith("Stopped; nothing was written.\n")
    assert not list(tmp_path.iterdir())


def test_help_shows_each_flag_its_default_and_ends_with_an_example():
    words = [sys.executable, "validate_moe_modifications.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  -")}
    assert {"--model", "--checkpoint", "--benchmark", "--json"} <= set(lines)
    assert lines["--model"].endswith("[base]")
    assert done.stdout.splitlines()[-1].startswith("dylo-moe-validate --model")
