import pytest
import torch
from moqe_testing import quantize_to
from torch import nn
from transformers import AutoModelForCausalLM

from moe_ext.moqe.experts.calibrate import body_linears, hessians_of, pack_linear_layers
from moe_ext.moqe.experts.group_quant import GroupFormat, PackedLinear

FORM = GroupFormat(bits=2, group_size=16)


@pytest.fixture
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


@pytest.fixture
def blocks():
    return torch.randint(2, 300, (20, 24), generator=torch.Generator().manual_seed(0))


def test_the_linear_layers_of_the_body_are_packed_and_nothing_else(model):
    head, embedding = model.lm_head.weight.clone(), model.model.embed_tokens.weight.clone()
    num_linears = len(list(body_linears(model)))
    pack_linear_layers(model, FORM)
    assert sum(isinstance(layer, PackedLinear) for layer in model.modules()) == num_linears == 2 * 7
    assert torch.equal(model.lm_head.weight, head) and torch.equal(model.model.embed_tokens.weight, embedding)
    assert type(model.lm_head) is nn.Linear


@torch.no_grad()
def test_the_hessian_is_that_of_what_a_layer_reads(model, blocks):
    block = model.model.layers[1]
    layers = {"mlp.down_proj": block.mlp.down_proj, "self_attn.q_proj": block.self_attn.q_proj}
    found = hessians_of(model, layers, block, blocks)
    for name, layer in layers.items():
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, inputs, kept=seen: kept.append(inputs[0]))
        model(blocks)
        hook.remove()
        inputs = seen[0].flatten(0, -2).double()
        torch.testing.assert_close(found[name], 2 * inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_calibration_brings_the_model_closer_on_its_text(tiny_base, model, blocks):
    expected = model(blocks).logits
    errors = {}
    for name, text in (("nearest", None), ("calibrated", blocks)):
        packed = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
        pack_linear_layers(packed, FORM, text)
        errors[name] = (packed(blocks).logits - expected).square().mean().item()
    assert errors["calibrated"] < 0.8 * errors["nearest"]


def test_two_texts_make_two_experts(tiny_base, tiny_sources, tmp_path):
    one, two = tiny_sources.split(",")
    folders = quantize_to(tmp_path, tiny_base, f"int2@{one},int2@{two}", calibration_blocks=4, calibration_length=16)
    assert [folder.name for folder in folders] == ["int2-rain", "int2-code"]
    weights = [(folder / "packed.safetensors").read_bytes() for folder in folders]
    assert weights[0] != weights[1]
