"""`train.py` from its options to its files, on a tiny random base and small text files."""

import json
import re
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tiny_models import tiny_folder

import train
from dylo_moe import DyLoRA_MoE
from dylo_moe.training import comparison, comparison_report
from dylo_moe.training.trainer import TrainingConfig


@pytest.fixture(scope="module")
def finished(tiny_options, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    assert train.main(tiny_options(output)) == 0
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


@torch.no_grad()
def test_the_saved_mixture_is_a_dylora_moe_that_finds_its_base_and_can_grow(finished, tiny_base):
    model = DyLoRA_MoE.from_pretrained(finished / "mixture")
    plain = AutoPeftModelForCausalLM.from_pretrained(finished / "mixture")
    ids = torch.arange(3, 19)[None]
    logits = model(input_ids=ids).logits
    assert torch.equal(logits, plain(input_ids=ids).logits)
    assert (model.base_identity.name, len(model.skills)) == (str(tiny_base), 0)
    model.experts.create_expert("law")
    assert model.experts.get_all_adapter_names() == ["expert_0", "expert_1", "expert_2", "law"]
    for expert in ("expert_0", "expert_2"):
        kept = DyLoRA_MoE.from_pretrained(finished / "mixture")(input_ids=ids, expert_id=expert).logits
        # Four experts side by side make a wider product than three: a CPU may add it up in another order.
        torch.testing.assert_close(model(input_ids=ids, expert_id=expert).logits, kept)


@pytest.mark.parametrize("adapter", ["mixture", "lora"])
def test_the_card_of_an_adapter_tells_what_the_run_measured_and_how_to_load_it(adapter, finished, tiny_base):
    card = (finished / adapter / "README.md").read_text()
    results = json.loads((finished / "results.json").read_text())
    for system, found in results["perplexity"].items():
        name = {"base": "base", "lora": "one LoRA", "mixture": "mixture"}[system]
        figures = " | ".join(f"{perplexity:.2f}" for perplexity in found.values())
        assert f"| {name}{' (this)' * (system == adapter)} | {figures} |" in card
    assert f"`{tiny_base}` (llama, 2 layers, width 32" in card
    assert "4 steps; 2 x 1 rows of 16 tokens" in card and "the first 3 rows of the test split" in card
    assert f"{results['trained_parameters'][adapter]:,}" in card or adapter == "mixture"
    loaded = []
    for snippet in re.findall(r"```python\n(.*?)```", card, flags=re.S):
        names = {}
        exec(snippet.replace("this/folder", str(finished / adapter)), names)
        loaded.append(names["model"](input_ids=torch.arange(3, 19)[None]).logits)
    assert len(loaded) == {"mixture": 2, "lora": 1}[adapter]
    assert all(torch.equal(logits, loaded[0]) for logits in loaded)


def test_the_two_adapters_have_about_as_many_trained_parameters(finished):
    sizes = json.loads((finished / "results.json").read_text())["trained_parameters"]
    assert sizes["lora"] == pytest.approx(sizes["mixture"], rel=0.1)


def test_the_table_names_every_domain_and_where_everything_lies(finished):
    text = comparison_report.as_text(json.loads((finished / "results.json").read_text()), finished)
    for expected in (
        "one LoRA",
        "mixture",
        "3 separate passes",
        str(finished / "usage.png"),
        str(finished / "mixture"),
    ):
        assert expected in text


def test_a_finished_run_is_not_trained_again(finished, tiny_options, monkeypatch):
    monkeypatch.setattr(comparison, "train_adapter", lambda *args: pytest.fail("trained again"))
    assert train.main(tiny_options(finished)) == 0


def test_a_broken_run_continues_from_its_checkpoint_and_ends_the_same(
    finished, tiny_options, tmp_path, monkeypatch, capsys
):
    from transformers import Trainer

    step, calls = Trainer.training_step, []

    def breaks_at_the_fourth(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", breaks_at_the_fourth)
    assert train.main(tiny_options(tmp_path)) == 130
    assert "The same command goes on from what it has kept" in capsys.readouterr().err
    assert calls == [0, 1, 2, 3]
    assert train.main(tiny_options(tmp_path)) == 0
    assert calls[4] == 2  # the checkpoint of step 2
    whole, continued = (json.loads((run / "results.json").read_text()) for run in (finished, tmp_path))
    assert continued["perplexity"] == whole["perplexity"]


def test_other_settings_in_the_same_folder_are_refused_and_named(finished, tiny_options, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(tiny_options(finished, lora_r=3))
    assert stopped.value.code == 2
    assert "lora_r (2 there, 3 asked for)" in capsys.readouterr().err


def test_a_finished_run_that_was_moved_is_still_that_run(finished, tiny_options, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "moved")
    monkeypatch.setattr(comparison, "train_adapter", lambda *args: pytest.fail("trained again"))
    assert train.main(tiny_options(tmp_path / "moved")) == 0


def test_an_output_folder_that_is_a_file_is_refused(tiny_options, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        train.main(tiny_options(tmp_path / "notes"))
    assert stopped.value.code == 2
    assert "notes is a file, but must be a folder. Name a folder with --output_dir" in capsys.readouterr().err


def test_each_kind_of_row_is_measured_and_continued_as_it_was_trained(
    finished, tiny_options, tiny_sources, tiny_chats, tmp_path
):
    mixed = f"{tiny_sources},{tiny_chats}"
    assert train.main(tiny_options(tmp_path, datasets=mixed, compare=False, max_seq_length=64)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    perplexity = results["perplexity"]
    assert set(perplexity) == {"base", "mixture"}
    assert set(perplexity["mixture"]) == set(mixed.split(","))
    assert all(perplexity["mixture"][name] != perplexity["base"][name] for name in mixed.split(","))
    prompts = {name: " ".join(prompt.split()) for name, (prompt, _) in results["continuations"].items()}
    assert prompts.pop(tiny_chats) == "Question: What is 0 plus one? Answer:"  # without its answer
    assert all(prompt.startswith("test 0 ") for prompt in prompts.values())


def test_without_a_comparison_no_lora_is_trained_and_the_table_still_stands(tiny_options, tmp_path):
    assert train.main(tiny_options(tmp_path, compare=False)) == 0
    assert not (tmp_path / "lora").exists()
    text = comparison_report.as_text(json.loads((tmp_path / "results.json").read_text()), tmp_path)
    assert "one LoRA" not in text


def test_documents_are_kept_apart_unless_told_otherwise(tiny_base, caplog):
    from dylo_moe.training.data import DataConfig
    from moe_common.models.base_model import load_base_model

    base, _ = load_base_model(tiny_base)
    assert comparison._documents_kept_apart(base, DataConfig())
    assert not comparison._documents_kept_apart(base, DataConfig(separate_documents=False))
    assert not caplog.records


def test_a_base_that_cannot_keep_documents_apart_is_said(monkeypatch, tiny_base, caplog):
    from dylo_moe.training.data import DataConfig
    from moe_common.models.base_model import load_base_model

    base, _ = load_base_model(tiny_base)
    monkeypatch.setattr(comparison, "keeps_documents_apart", lambda model: False)
    assert not comparison._documents_kept_apart(base, DataConfig())
    assert "LlamaForCausalLM cannot keep the documents of one row apart" in caplog.text


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """As tiny_base, of a width that the 4-bit kernel for CPUs can multiply."""
    return tiny_folder(tmp_path_factory.mktemp("wide_base"), hidden_size=64, intermediate_size=64)


@pytest.mark.parametrize(("quant", "layer"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit"), ("none", "Linear")])
def test_the_frozen_base_is_held_in_the_format_that_is_asked_for(wide_base, quant, layer):
    config = comparison.RunConfig(model_name=str(wide_base), quant=quant)
    base, _ = comparison._load_base(config, TrainingConfig())
    assert type(base.model.layers[0].mlp.up_proj).__name__ == layer
    assert quant == "none" or not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_a_mixture_trains_on_a_quantised_base(tiny_options, wide_base, tmp_path, quant):
    assert train.main(tiny_options(tmp_path, model_name=wide_base, quant=quant, compare=False)) == 0
    perplexity = json.loads((tmp_path / "results.json").read_text())["perplexity"]
    assert all(perplexity["mixture"][name] != perplexity["base"][name] for name in perplexity["base"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel for GPUs multiplies any width")
def test_a_base_that_four_bits_on_a_cpu_cannot_multiply_is_refused(tiny_options, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(tiny_options(tmp_path / "run", quant="4bit"))
    assert "multiple of 64 numbers, and that of model.layers.0.self_attn.q_proj has 32" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
