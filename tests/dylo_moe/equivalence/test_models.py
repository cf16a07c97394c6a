"""What the checks run on: random experts of a known size, and the experts that a checkpoint holds."""

import pytest
import torch
from moe_testing import spread_gates, tiny_base
from peft import MoELoraConfig, get_peft_model
from peft.tuners.lora.moe_router import SCOPES
from transformers import AutoModelForCausalLM

from dylo_moe.equivalence.loop import lora_layers
from dylo_moe.equivalence.models import RANDOM_EXPERTS, STRENGTH, open_checkpoint, open_model, scaled


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_base("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(base_folder):
    return open_model(str(base_folder))


@torch.no_grad()
def test_a_random_expert_changes_what_a_layer_puts_out_by_the_stated_share(source):
    model = source.plain()
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    shares = []
    for layer in lora_layers(model).values():
        if layer.in_features != 32:
            continue
        for name in RANDOM_EXPERTS:
            layer.set_adapter(name)
            base = layer.base_layer(x)
            shares.append(((layer(x) - base).square().mean() / base.square().mean()).sqrt().item())
    model.unload()
    assert len(shares) == 12 * 3
    assert sum(shares) / len(shares) == pytest.approx(STRENGTH, rel=0.1)
    assert all(share > STRENGTH / 4 for share in shares)


def test_the_experts_differ_in_rank_alpha_and_scaling_and_sit_on_every_linear_but_the_head(source):
    model = source.plain()
    layers = lora_layers(model)
    assert len(layers) == 14 and "lm_head" not in layers
    for layer in layers.values():
        assert layer.r == {"one": 4, "two": 8, "three": 2}
        assert len(set(layer.scaling.values())) == 3
    model.unload()


@torch.no_grad()
def test_every_router_lets_the_tokens_of_a_batch_choose_different_experts(source):
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    assert list(source.routed) == list(SCOPES)
    for build in source.routed.values():
        model = build(source.base)
        with model.base_model.record_routing() as recorded:
            model(input_ids=ids)
        for (weights,) in recorded.values():
            assert (weights > 0).sum(dim=-1).eq(2).all()
            assert len((weights > 0).flatten(0, -2).unique(dim=0)) > 1
        model.unload()


@torch.no_grad()
def test_the_experts_of_a_mixture_become_plain_adapters_with_the_same_weights(base_folder, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = MoELoraConfig(
        experts=["a", "b"], r=3, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    mixture = get_peft_model(base, config)
    spread_gates(mixture)
    mixture.save_pretrained(tmp_path)
    ids, weights = torch.arange(3, 13)[None], torch.tensor([0.7, -0.4])
    expected, routed = mixture(input_ids=ids, routing_weights=weights).logits, mixture(input_ids=ids).logits
    source = open_checkpoint(tmp_path)
    assert list(source.experts) == ["a", "b"] and list(source.routed) == ["layer"]
    plain = source.plain()
    assert torch.equal(plain(input_ids=ids, routing_weights=weights).logits, expected)
    plain.unload()
    assert torch.equal(source.routed["layer"](source.base)(input_ids=ids).logits, routed)


@torch.no_grad()
def test_scaled_multiplies_every_update_and_gives_it_back(source):
    model = source.plain()
    layer, x = next(iter(lora_layers(model).values())), torch.ones(1, 32)
    update = layer(x) - layer.base_layer(x)
    with scaled(model, 0.5):
        torch.testing.assert_close(layer(x) - layer.base_layer(x), update / 2, rtol=1e-4, atol=1e-6)
    assert torch.equal(layer(x) - layer.base_layer(x), update)
    model.unload()


def test_opening_leaves_the_base_model_bare(source, base_folder):
    fresh = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    held = source.base.state_dict()
    assert held.keys() == fresh.keys()
    assert all(torch.equal(held[name], fresh[name]) for name in fresh)
