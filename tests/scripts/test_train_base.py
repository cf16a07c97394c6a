"""The script that trains the committed base: its schedule, its order of data, and that a run can be broken off."""

import importlib.util
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import committed_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from moe_common.models.base_model import COMMITTED_FOLDER
from moe_common.runs.checkpoints import load_state

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_base.py"
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def load_script():
    spec = importlib.util.spec_from_file_location("train_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_base"] = module
    spec.loader.exec_module(module)
    return module


train_base = load_script()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A config maker for runs of a tiny model on a few short documents, into a folder of their own."""
    texts = {"prose": "The cat sat. ", "code": "def f(x):\n    return x\n", "math": "Question: 1 + 1?\nAnswer: 2\n"}
    read = {domain: lambda _, text=text: [{"text": text * 40}] for domain, text in texts.items()}
    monkeypatch.setattr(train_base, "DOMAINS", read)
    monkeypatch.setattr(train_base, "SHAPE", TINY)

    def make(name, **options):
        output = tmp_path / f"{name}-model"
        if not output.exists():
            output.mkdir(parents=True)
            for file in TOKENIZER_FILES:
                shutil.copy(COMMITTED_FOLDER / file, output)
        sizes = {"block_size": 16, "blocks_per_step": 4, "blocks_at_once": 2, "warmup_steps": 2, "log_every": 1}
        return train_base.BaseTrainingConfig(
            run_folder=str(tmp_path / name), output=str(output), **{**sizes, "steps": 4, **options}
        )

    return make


def test_a_run_writes_a_bf16_model_and_a_report(small):
    config = small("run")
    report = train_base.train(config)
    stored = AutoModelForCausalLM.from_pretrained(config.output)
    assert stored.dtype == torch.bfloat16
    assert stored.num_parameters() == report["parameters"]
    assert report["steps"] == 4
    assert report["tokens"] == sum(report["tokens_by_domain"].values()) == 4 * 4 * 16
    assert json.loads((Path(config.output) / "training_report.json").read_text()) == report
    assert [path for path in Path(config.output).parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("last", [1, 2, 3])  # 3: in the decay of the rate
def test_a_run_that_is_interrupted_and_continued_ends_like_one_in_one_piece(small, monkeypatch, last):
    whole, parts = small("whole", decay_fraction=0.5), small("parts", decay_fraction=0.5)
    train_base.train(whole)
    one_step = train_base.one_step

    def stop_behind_last(*arguments):
        if arguments[-1]["step"] == last - 1:
            signal.raise_signal(signal.SIGTERM)
        return one_step(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(train_base, "one_step", stop_behind_last)
        assert train_base.train(parts) == {"steps": last, "finished": False}
    assert not (Path(parts.output) / "model.safetensors").exists()
    train_base.train(parts)
    expected, found = (AutoModelForCausalLM.from_pretrained(c.output).state_dict() for c in (whole, parts))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with train_base.signals_noted() as noted:
        signal.raise_signal(signal.SIGTERM)
    assert noted == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_model_that_is_built_has_the_committed_shape():
    tokenizer = committed_tokenizer()
    built, committed = train_base.build_model(tokenizer, context=512), AutoConfig.from_pretrained(COMMITTED_FOLDER)
    assert built.num_parameters() == 5_721_344
    shape = ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "pad_token_id", *TINY)
    assert {name: getattr(built.config, name) for name in shape} == {name: getattr(committed, name) for name in shape}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_lowers_the_loss(small, optimizer):
    config = small(f"run_{optimizer}", steps=20, optimizer=optimizer)
    train_base.train(config)
    state = load_state(Path(config.run_folder))["state"]
    assert state["losses"][-1] < state["losses"][0] - 0.5


def test_the_rate_warms_up_stays_and_falls_to_zero():
    config = train_base.BaseTrainingConfig(run_folder="x", steps=100, warmup_steps=10, decay_fraction=0.2)
    rates = [train_base.rate_factor(step, config, first_of_decay=80) for step in range(100)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([n / 20 for n in range(20, 0, -1)])


def test_a_shorter_run_decays_from_where_it_is_continued():
    config = train_base.BaseTrainingConfig(run_folder="x", steps=60, warmup_steps=10, decay_fraction=0.5)
    rates = [train_base.rate_factor(step, config, first_of_decay=50) for step in range(50, 60)]
    assert rates == pytest.approx([n / 10 for n in range(10, 0, -1)])


def test_an_epoch_gives_every_token_once_in_an_order_of_its_own():
    sampler = train_base.BlockSampler(np.arange(165), block_size=16, seed=0)
    per_epoch = sampler.blocks_per_epoch
    epochs = [np.concatenate([sampler.block(e * per_epoch + n) for n in range(per_epoch)]) for e in range(2)]
    for tokens in epochs:
        assert len(tokens) == per_epoch * 16
        np.testing.assert_array_equal(np.sort(tokens), np.arange(tokens.min(), tokens.min() + len(tokens)))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_block_depends_on_its_number_alone():
    stream = np.arange(500)
    one, other = (train_base.BlockSampler(stream, block_size=16, seed=3) for _ in range(2))
    forwards = [one.block(n).tolist() for n in range(70)]
    assert [other.block(n).tolist() for n in reversed(range(70))] == forwards[::-1]


def test_shares_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"'math': -0\.2.*negative"):
        train_base.BaseTrainingConfig(run_folder="x", prose_share=0.7, code_share=0.5)


def test_blocks_at_once_must_divide_a_step():
    with pytest.raises(ValueError, match=r"blocks_at_once.*\b3\b.*blocks_per_step \(16\)"):
        train_base.BaseTrainingConfig(run_folder="x", blocks_at_once=3)


@pytest.mark.parametrize("option", ["steps", "blocks_at_once", "warmup_steps", "log_every"])
def test_a_count_of_zero_is_refused_before_anything_is_read(option):
    with pytest.raises(ValueError, match=rf"{option}.*\b0\b.*\b1\b"):
        train_base.BaseTrainingConfig(run_folder="x", **{option: 0})


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as ended:
        train_base.main(["--help"])
    assert ended.value.code == 0
    assert "--decay_fraction" in capsys.readouterr().out
