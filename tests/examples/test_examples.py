"""Each example runs from its options to its files, on small models and text, and does what it says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_folder
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
LONGEST = 80  # lines


def example(name: str):
    """The module of an example, which lies in no package."""
    specification = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_source(tiny_sources):
    return tiny_sources.split(",")[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_is_run_here(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST
    assert f'example("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")


def card(folder: str) -> str:
    """The model card of what an example saved, which holds no form to fill in."""
    text = (Path(folder) / "README.md").read_text()
    assert "More Information Needed" not in text
    assert "AutoPeftModelForCausalLM" in text and "| base | " in text and "| this adapter | " in text
    return text


def test_sft_trains_a_mixture_that_loads_and_writes(tiny_base, one_source, tmp_path, capsys):
    options = ["--model", str(tiny_base), "--data", one_source, "--steps", "2", "--max_length", "16"]
    example("train_mixture").main([*options, "--num_experts", "3", "--output", "mixture"])
    said = capsys.readouterr().out
    assert "model.layers.0 {'expert_0': " in said and "The mixture lies in mixture" in said
    assert "# Mixture of 3 LoRA experts" in card("mixture")
    saved = load_file(tmp_path / "mixture" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in saved.items() if "lora_B.expert_2" in name)  # B starts at zero


def test_adapters_are_composed_and_the_router_alone_is_trained(tiny_base, tiny_sources, tmp_path, capsys):
    folders = {}
    for name, rank, targets in (("first", 2, ["q_proj"]), ("second", 3, ["q_proj", "up_proj"])):
        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        folders[name] = tmp_path / name
        get_peft_model(base, config).save_pretrained(folders[name])
    named = [f"{name}={folder}" for name, folder in folders.items()]
    options = ["--model", str(tiny_base), "--data", tiny_sources, "--steps", "2", "--output", "composed"]
    example("compose_adapters").main(["--experts", *named, *options])
    assert "The mixture, with its experts, lies in composed" in capsys.readouterr().out
    assert "| second | 3 | 8 | q_proj, up_proj |" in card("composed")
    saved = load_file("composed/adapter_model.safetensors")
    for name, folder in folders.items():
        given = load_file(folder / "adapter_model.safetensors")
        held = {key.replace(f".{name}", ""): tensor for key, tensor in saved.items() if f".{name}." in key}
        assert held.keys() == given.keys()
        assert all(torch.equal(held[key], given[key]) for key in given)


def test_without_adapters_the_example_makes_one_for_each_dataset(tiny_base, tiny_sources):
    options = ["--model", str(tiny_base), "--data", tiny_sources, "--steps", "1", "--output", "out"]
    example("compose_adapters").main(options)
    ranks = {key: len(tensor) for key, tensor in load_file("out/adapter_model.safetensors").items()}
    assert {rank for key, rank in ranks.items() if "lora_A.rain" in key} == {4}
    assert {rank for key, rank in ranks.items() if "lora_A.code" in key} == {5}
    assert "# LoRA of rank 5" in Path("out/experts/code/README.md").read_text()


@pytest.fixture(scope="module")
def base_of_width_64(tmp_path_factory):
    """The CPU kernel of 4-bit weights takes layers whose width is a multiple of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    return tiny_folder(tmp_path_factory.mktemp("base64"), num_hidden_layers=1, **sizes)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_mixture_is_trained_on_a_quantised_base_and_loads_onto_the_full_one(bits, base_of_width_64, one_source):
    options = ["--model", str(base_of_width_64), "--data", one_source, "--steps", "2", "--bits", str(bits)]
    example("quantized_base").main([*options, "--output", "quantized"])
    assert f"| quantised base | {bits}bit |" in card("quantized")
    full = AutoModelForCausalLM.from_pretrained(base_of_width_64)
    ids = torch.arange(3, 19)[None]
    bare = full(input_ids=ids).logits
    model = PeftModel.from_pretrained(full, "quantized")
    assert not torch.equal(model(input_ids=ids).logits, bare)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, bare)
