"""`train.py` from its options to its files, on a tiny random base and small text files."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM

import train
from dylo_moe import first_mixture
from dylo_moe.base_model import load_base_model

TEXTS = {
    "rain": "rain falls on the hills and runs to the sea again and again",
    "code": "def f(x):\n    return x + 1  # one more, and one more",
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A random model of the committed tokenizer's vocabulary: quick, and good enough to run through."""
    folder = tmp_path_factory.mktemp("base")
    _, tokenizer = load_base_model()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, text in TEXTS.items():
        for split, count in {"train": 60, "validation": 6, "test": 6}.items():
            (folder / name).mkdir(exist_ok=True)
            rows = [json.dumps({"text": f"{split} {i} {text}"}) for i in range(count)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows))
    return ",".join(str(folder / name) for name in TEXTS)


def options(base_folder, sources, output, **changed) -> list[str]:
    chosen = {
        "model_name": base_folder,
        "datasets": sources,
        "output_dir": output,
        "num_experts": 3,
        "lora_r": 2,
        "num_steps": 4,
        "train_batch_size": 2,
        "max_seq_length": 16,
        "save_steps": 2,
        "eval_blocks": 3,
        **changed,
    }
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(base_folder, sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    assert train.main(options(base_folder, sources, output)) == 0
    return output


def test_a_run_leaves_both_adapters_the_results_and_the_picture(finished):
    assert (finished / "mixture" / "adapter_model.safetensors").exists()
    assert (finished / "lora" / "adapter_model.safetensors").exists()
    assert (finished / "usage.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((finished / "results.json").read_text())
    assert set(results["perplexity"]) == {"base", "lora", "mixture"}
    assert not list(finished.rglob("*.partial"))


def test_the_saved_mixture_loads_from_its_folder_alone_and_was_trained(finished):
    model = AutoPeftModelForCausalLM.from_pretrained(finished / "mixture")
    ups = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert ups and all(p.any() for p in ups)  # B starts at zero


def test_the_two_adapters_have_about_as_many_trained_parameters(finished):
    sizes = json.loads((finished / "results.json").read_text())["trained_parameters"]
    assert sizes["lora"] == pytest.approx(sizes["mixture"], rel=0.1)


def test_the_table_names_every_domain_and_where_everything_lies(finished):
    text = first_mixture.as_text(json.loads((finished / "results.json").read_text()), finished)
    for expected in (
        "one LoRA",
        "mixture",
        "3 separate passes",
        str(finished / "usage.png"),
        str(finished / "mixture"),
    ):
        assert expected in text


def test_a_finished_run_is_not_trained_again(finished, base_folder, sources, monkeypatch):
    monkeypatch.setattr(first_mixture, "train_adapter", lambda *args: pytest.fail("trained again"))
    assert train.main(options(base_folder, sources, finished)) == 0


def test_a_broken_run_continues_from_its_checkpoint_and_ends_the_same(
    finished, base_folder, sources, tmp_path, monkeypatch
):
    from transformers import Trainer

    step, calls = Trainer.training_step, []

    def breaks_at_the_fourth(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", breaks_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train.main(options(base_folder, sources, tmp_path))
    assert calls == [0, 1, 2, 3]
    assert train.main(options(base_folder, sources, tmp_path)) == 0
    assert calls[4] == 2  # the checkpoint of step 2
    whole, continued = (json.loads((run / "results.json").read_text()) for run in (finished, tmp_path))
    assert continued["perplexity"] == whole["perplexity"]


def test_other_settings_in_the_same_folder_are_refused_and_named(finished, base_folder, sources, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(options(base_folder, sources, finished, lora_r=3))
    assert stopped.value.code == 2
    assert "lora_r (2 there, 3 asked for)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_experts", 0, "num_experts is 0"),
        ("datasets", "proze", "Unknown dataset 'proze'. Closest: 'prose'"),
        ("datasets", ",", "names no dataset"),
        ("model_name", "no/such/folder/here", "There is no model folder"),
        ("num_steps", 0, "num_steps is 0"),
        ("max_seq_length", 1, "max_seq_length is 1"),
        ("learning_rate", 0, "learning_rate is 0"),
        ("eval_blocks", 0, "eval_blocks is 0"),
    ],
)
def test_a_bad_option_is_one_line_and_writes_nothing(base_folder, sources, tmp_path, capsys, option, value, message):
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        train.main(options(base_folder, sources, output, **{option: value}))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (output / "mixture").exists()


def test_help_says_what_the_program_does(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    assert "Train a mixture of LoRA experts" in capsys.readouterr().out
