"""Routers and experts of all families are found by structure, and what is no mixture is refused."""

import pytest
import torch
from tiny_models import MOE_KINDS, NUM_EXPERTS, tiny_model
from torch import nn

from moe_ext.routers import moe_layers, router_parameters


@pytest.fixture(params=MOE_KINDS)
def family(request):
    return request.param


def test_the_routers_found_are_those_whose_logits_the_model_returns(family):
    model = tiny_model(family)
    layers = moe_layers(model)
    seen = {}
    for layer in layers:
        layer.router.register_forward_hook(
            lambda _, __, output, name=layer.router_name: seen.update({name: output[0]})
        )
    recorded = model.model(torch.arange(12)[None], output_router_logits=True).router_logits
    assert len(recorded) == len(layers)
    for layer, logits in zip(layers, recorded, strict=True):
        assert torch.equal(seen[layer.router_name].reshape(-1, NUM_EXPERTS), logits.reshape(-1, NUM_EXPERTS))


def test_the_experts_of_a_layer_are_those_that_run_beside_its_router(family):
    model = tiny_model(family)
    for layer in moe_layers(model):
        assert layer.num_experts == NUM_EXPERTS == layer.experts.gate_up_proj.shape[0]
        assert model.get_submodule(layer.experts_name) is layer.experts
        assert model.get_submodule(layer.router_name) is layer.router
        assert model.get_submodule(layer.block_name) is layer.block


def test_only_the_routers_are_among_the_router_parameters(family):
    model = tiny_model(family)
    found = router_parameters(model)
    assert sum(parameter.numel() for parameter in found.values()) == len(moe_layers(model)) * NUM_EXPERTS * 32
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in found.items())
    # The name alone would also catch the experts' gate_up_proj and the gate of Qwen2's shared expert.
    assert len([name for name in own if "gate" in name]) > len(found)


def test_a_changed_router_changes_the_routing(family):
    model = tiny_model(family)
    tokens = torch.arange(12)[None]
    before = model(tokens).logits
    with torch.no_grad():
        for parameter in router_parameters(model).values():
            parameter.mul_(-5)
    assert not torch.equal(before, model(tokens).logits)


def test_the_layers_are_numbered_as_the_model_numbers_them():
    assert [layer.index for layer in moe_layers(tiny_model("olmoe"))] == [0, 1]
    assert [layer.index for layer in moe_layers(tiny_model("deepseek_v3"))] == [1]


def test_a_dense_model_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="LlamaForCausalLM.*dense"):
        moe_layers(model)


def test_a_mixture_all_of_whose_layers_are_dense_is_refused():
    with pytest.raises(ValueError, match="DeepseekV3TopkRouter.*dense"):
        moe_layers(tiny_model("deepseek_v3", first_k_dense_replace=2))


def test_a_class_that_records_from_several_kinds_of_modules_is_refused():
    model = tiny_model("JetMoeConfig", num_attention_heads=None, kv_channels=8)
    with pytest.raises(ValueError, match="JetMoeAttention.*JetMoeTopKGating"):
        moe_layers(model)


def test_a_recorded_module_that_is_more_than_a_router_is_refused():
    model = tiny_model("DogeConfig", is_moe=True, num_experts=16)
    with pytest.raises(ValueError, match="DogeCDMoE .*parameters"):
        moe_layers(model)


def test_a_router_without_fused_experts_beside_it_is_refused():
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(NUM_EXPERTS)])
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp .*\b4 experts.*ModuleList"):
        moe_layers(model)
