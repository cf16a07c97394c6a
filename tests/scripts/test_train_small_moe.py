"""The script that trains the small mixture: its loss, its balance, and that a run can be broken off."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import committed_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe_ext.moe_models import SMALL_MOE_FOLDER

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def load_script(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch):
    load_script("train_base", monkeypatch)  # which it imports, as scripts of one folder do
    return load_script("train_small_moe", monkeypatch)


@pytest.fixture
def small(script, monkeypatch, tmp_path):
    """A config maker for runs of a tiny mixture on a few short documents, into a folder of their own."""
    texts = {"prose": "The cat sat. ", "code": "def f(x):\n    return x\n", "math": "Question: 1 + 1?\nAnswer: 2\n"}
    read = {domain: lambda _, text=text: [{"text": text * 40}] for domain, text in texts.items()}
    monkeypatch.setattr(script, "SHAPE", TINY)
    monkeypatch.setattr(script, "DOMAINS", read)
    monkeypatch.setattr(sys.modules["train_base"], "DOMAINS", read)

    def make(name, **options):
        sizes = {"block_size": 16, "blocks_per_step": 4, "blocks_at_once": 2, "warmup_steps": 2, "log_every": 1}
        return script.SmallMoeTrainingConfig(
            run_folder=str(tmp_path / name), output=str(tmp_path / f"{name}-model"), **{**sizes, "steps": 4, **options}
        )

    return make


def test_a_run_writes_a_bf16_mixture_with_its_tokenizer_and_report(script, small):
    config = small("run")
    report = script.train_small_moe(config)
    stored = AutoModelForCausalLM.from_pretrained(config.output)
    assert stored.dtype == torch.bfloat16
    assert stored.num_parameters() == report["parameters"]
    assert len(AutoTokenizer.from_pretrained(config.output)) == stored.config.vocab_size
    assert json.loads((Path(config.output) / "training_report.json").read_text()) == report
    shares = report["expert_shares_of_validation_tokens"]
    assert [round(sum(layer), 2) for layer in shares] == [1.0, 1.0]


def test_a_run_that_is_broken_off_and_continued_ends_like_one_in_one_piece(script, small, monkeypatch):
    whole, parts = small("whole"), small("parts")
    script.train_small_moe(whole)
    train_base = sys.modules["train_base"]
    one_step = train_base.one_step

    def stop_after_two(*arguments):
        if arguments[-1]["step"] == 1:
            signal.raise_signal(signal.SIGTERM)
        return one_step(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(train_base, "one_step", stop_after_two)
        assert script.train_small_moe(parts) == {"steps": 2, "finished": False}
    script.train_small_moe(parts)
    expected, found = (AutoModelForCausalLM.from_pretrained(c.output).state_dict() for c in (whole, parts))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_balanced_routing_has_a_balance_loss_of_one(script):
    eight_tokens = torch.eye(4).repeat(2, 1) * 50 + torch.eye(4).roll(1, 0).repeat(2, 1) * 50
    assert script.balance_loss(eight_tokens, top_k=2).item() == pytest.approx(1)


def test_two_favoured_experts_of_four_have_a_balance_loss_of_two(script):
    favoured = torch.tensor([[50.0, 50.0, 0.0, 0.0]]).repeat(6, 1)
    assert script.balance_loss(favoured, top_k=2).item() == pytest.approx(2)


def test_the_loss_is_next_token_and_the_mean_balance_of_the_layers(script, monkeypatch):
    monkeypatch.setattr(script, "SHAPE", TINY)
    torch.manual_seed(0)
    model = script.build_model(committed_tokenizer(), context=16).eval()
    tokens = torch.arange(32).view(2, 16)
    outputs = model(tokens, labels=tokens, output_router_logits=True)
    plain = model(tokens, labels=tokens).loss
    torch.testing.assert_close(outputs.loss, plain)  # transformers' own balance loss stays out
    balance = sum(script.balance_loss(logits, top_k=2) for logits in outputs.router_logits) / 2
    torch.testing.assert_close(script.balanced_loss(model, tokens, coefficient=0.5), plain + 0.5 * balance)


def test_the_mixture_that_is_built_has_the_committed_shape(script):
    model = script.build_model(committed_tokenizer(), context=512)
    committed = AutoConfig.from_pretrained(SMALL_MOE_FOLDER)
    assert {name: getattr(committed, name) for name in script.SHAPE} == script.SHAPE
    assert model.num_parameters() == 2_365_568
    assert model.config._experts_implementation == "grouped_mm"


def test_an_optimizer_that_is_not_there_is_refused(script, tmp_path, capsys):
    folders = ["--run_folder", str(tmp_path), "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        script.main([*folders, "--steps", "1", "--optimizer", "sgd"])
    assert stopped.value.code == 2
    assert "invalid choice: 'sgd'" in capsys.readouterr().err
