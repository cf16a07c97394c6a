"""Checkpoints: bit-equal when they come back, for every family and mix of formats; broken ones are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")

from moe_ext.router_ft.checkpoint import RECORD, save_checkpoint, save_with_routers
from moe_ext.router_ft.load import export_pt, load
from moe_ext.router_ft.matrices import find_matrices
from moe_ext.router_ft.plan import uniform_plan
from moe_ext.router_ft.quantize import quantize_model
from moe_ext.routers import router_parameters

TOKENS = torch.arange(3, 40)[None]


def write(folder, model, plan, tokenizer):
    quantized = quantize_model(model, plan, method="round")
    save_checkpoint(folder, model, tokenizer, plan, quantized.packed, {"quantize": quantized.to_dict()})
    return model


@pytest.fixture
def written(model_of, mixed_plan, tokenizer, tmp_path):
    """A checkpoint of a tiny OLMoE in all formats, and the model it was made of."""
    model = model_of("olmoe")
    folder = tmp_path / "out"
    return folder, write(folder, model, mixed_plan(model), tokenizer)


def test_the_model_comes_back_bit_by_bit(family, model_of, mixed_plan, tokenizer, tmp_path):
    model = model_of(family)
    plan = mixed_plan(model)
    write(tmp_path / "out", model, plan, tokenizer)
    loaded = load(tmp_path / "out", dtype=torch.float32)
    expected, found = model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(model(TOKENS).logits, loaded.model(TOKENS).logits)
    assert loaded.plan == plan
    assert len(loaded.tokenizer) == len(tokenizer)


@pytest.mark.parametrize("name", ["INT4", "INT3", "MXFP4"])
def test_plain_from_pretrained_reads_the_same_where_a_plan_is_uniform(name, family, model_of, tokenizer, tmp_path):
    if name != "INT4" and family not in ("olmoe", "mixtral"):
        pytest.skip("one format for every family, all formats for two")
    model = model_of(family)
    write(tmp_path / "out", model, uniform_plan(find_matrices(model), name), tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(plain[key], tensor) for key, tensor in model.state_dict().items())


def test_plain_from_pretrained_misreads_mxfp8_and_load_does_not(model_of, tokenizer, tmp_path):
    # transformers 5.23 multiplies by the stored exponents. When this fails, docs/router_ft.md may say otherwise.
    model = model_of("olmoe")
    write(tmp_path / "out", model, uniform_plan(find_matrices(model), "MXFP8"), tokenizer)
    expected = model.model.layers[0].mlp.experts.down_proj
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not torch.equal(plain.model.layers[0].mlp.experts.down_proj, expected)
    assert torch.equal(load(tmp_path / "out").model.model.layers[0].mlp.experts.down_proj, expected)


def test_plain_from_pretrained_is_no_judge_of_mixed_formats(written):
    folder, _ = written
    with pytest.raises((AttributeError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_quantised_matrices_are_packed_and_nothing_is_stored_wider_than_it_was(written):
    folder, model = written
    plan, tensors = load(folder).plan, load_file(folder / "model.safetensors")
    for matrix in find_matrices(model):
        bits = sum(
            8 * tensor.nbytes
            for name, tensor in tensors.items()
            if name.startswith(f"{matrix.name}.") and not name.endswith("weight_shape")
        )
        expected = {"BF16": 16, "MXFP8": 8.25, "MXFP4": 4.25, "INT4": 4.5, "INT3": 3.5, "INT2": 2.5}
        assert bits / matrix.num_weights == expected[plan.formats[matrix.name]]
    assert torch.float32 not in {tensor.dtype for tensor in tensors.values()}


def test_the_record_holds_plan_steps_and_versions(written):
    record = json.loads((written[0] / RECORD).read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) == {"torch", "transformers", "compressed-tensors", "safetensors"}
    assert set(record) >= {"plan", "quantize", "versions"}
    assert len(record["quantize"]["matrices"]) == len(record["plan"]["matrices"])


def test_new_routers_are_all_that_changes(written, tmp_path):
    folder, _ = written
    loaded = load(folder)
    routers = router_parameters(loaded.model)
    with torch.no_grad():
        for parameter in routers.values():
            parameter.add_(1e-4)  # less than bfloat16 can hold beside these weights
    save_with_routers(tmp_path / "new", folder, loaded.model, loaded.plan, loaded.record)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "new"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == set(routers)
    again = load(tmp_path / "new").model
    assert torch.equal(again(TOKENS).logits, loaded.model(TOKENS).logits)


def test_an_exported_file_is_read_without_running_anything(written, tmp_path):
    folder, model = written
    export_pt(load(folder), tmp_path / "old.pt")
    content = torch.load(tmp_path / "old.pt", weights_only=True)
    assert set(content) == {"model_state_dict", "config", "plan", "router_finetuning"}
    loaded = load(tmp_path / "old.pt")
    assert torch.equal(loaded.model(TOKENS).logits, model(TOKENS).logits)
    assert loaded.plan == load(folder).plan


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / RECORD).unlink(), r"\bno\b.*router_ft\.json"),
        (lambda folder: (folder / RECORD).write_text("{"), "is not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"lacks.*model\.safetensors"),
        (lambda folder: cut(folder / "model.safetensors"), "truncated or damaged"),
        (lambda folder: drop(folder, "mlp.experts.1.up_proj.weight_scale"), "tensor.*weight_scale"),
        (lambda folder: drop(folder, "model.norm.weight"), r"\b1 missing.*model\.norm\.weight"),
        (lambda folder: drop(folder, "mlp.gate.weight"), r"missing.*model\.layers\.0\.mlp\.gate\.weight"),
    ],
)
def test_a_broken_checkpoint_is_refused(written, break_it, message):
    break_it(written[0])
    with pytest.raises(ValueError, match=message):
        load(written[0])


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def drop(folder, ending):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}, folder / "model.safetensors"
    )


def test_a_checkpoint_with_another_config_is_refused(written, tmp_path):
    folder, _ = written
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 6}))
    with pytest.raises(ValueError, match="does not fit its config|do not fit its config"):
        load(folder)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "x.pt").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot be read as a .pt of tensors"):
        load(tmp_path / "x.pt")
    torch.save({"model_state_dict": {}}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="model_state_dict.*config"):
        load(tmp_path / "y.pt")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load(tmp_path / "z.pt")


def test_a_folder_that_holds_something_is_not_overwritten(written, tokenizer):
    folder, model = written
    with pytest.raises(FileExistsError, match="is there already"):
        save_checkpoint(folder, model, tokenizer, load(folder).plan, {}, {})
