"""`DynamicHybridRouter`: dense in training, sparse at inference, and growth that keeps what was said of the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import MoELoraConfig, get_peft_model
from tiny_models import tiny_mixture, tiny_model

from dylo_moe.router import DynamicHybridRouter, HybridRouterConfig

SITE = "model.layers.1"
STATES = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))


def by_hand(weight_EI, states, temperature, top_k=None):
    """Scores of normalised states, a softmax, and for each token by itself the best few of it."""
    probabilities = []
    for state in states.reshape(-1, states.shape[-1]):
        scores = (weight_EI @ state) / state.square().mean().sqrt() / temperature
        p = scores.exp() / scores.exp().sum()
        if top_k is not None:
            best = p.sort(descending=True).indices[:top_k].tolist()
            p = torch.tensor([p[e] if e in best else 0.0 for e in range(len(p))])
            p = p / p.sum()
        probabilities.append(p)
    return torch.stack(probabilities).reshape(*states.shape[:-1], -1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_it_weighs_all_experts_in_training_and_the_best_at_inference(temperature):
    model = tiny_mixture(4, top_k=2, router_temperature=temperature)
    weight = model.router.attached.gates[SITE.replace(".", "/")].weight
    torch.testing.assert_close(model.router(SITE, STATES), by_hand(weight, STATES, temperature, top_k=2))
    model.train()
    torch.testing.assert_close(model.router(SITE, STATES), by_hand(weight, STATES, temperature))


@torch.no_grad()
@settings(deadline=None, max_examples=10)
@given(num_experts=st.integers(1, 5), added=st.integers(1, 3))
def test_growing_keeps_the_old_logits_bit_for_bit_and_the_ratios_of_the_old_weights(num_experts, added):
    model = tiny_mixture(num_experts).train()
    logits, weights = model.router.logits(SITE, STATES), model.router(SITE, STATES)
    columns = {key: gate.weight.clone() for key, gate in model.router.attached.gates.items()}
    for _ in range(added):
        model.experts.create_expert()
    for key, gate in model.router.attached.gates.items():
        assert gate.weight.shape[0] == num_experts + added
        assert torch.equal(gate.weight[:num_experts], columns[key])
    grown = model.router.logits(SITE, STATES)
    # One column more may take another kernel of the matrix product, whose sums run in another order.
    torch.testing.assert_close(grown[..., :num_experts], logits, rtol=1e-6, atol=1e-6)
    kept = model.router(SITE, STATES)[..., :num_experts]
    torch.testing.assert_close(kept / kept.sum(-1, keepdim=True), weights)


@torch.no_grad()
def test_shrinking_takes_out_one_column_alone():
    model = tiny_mixture(4)
    logits = model.router.logits(SITE, STATES)
    model.experts.remove_expert("expert_1")
    torch.testing.assert_close(model.router.logits(SITE, STATES), logits[..., [0, 2, 3]], rtol=1e-6, atol=1e-6)


def test_top_k_follows_the_number_of_experts_up_to_what_was_asked_for():
    model = tiny_mixture(1, top_k=3)
    followed = []
    for _ in range(3):
        followed.append((model.router.num_experts, model.router.top_k, model.base_model.mixture_config.top_k))
        model.experts.create_expert()
    assert followed == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert model.router.top_k == 3
    model.experts.remove_expert("expert_0")
    model.experts.remove_expert("expert_1")
    assert model.router.top_k == 2


def test_sites_are_the_blocks_in_order_and_one_that_is_none_is_refused():
    router = tiny_mixture().router
    assert router.sites == ["model.layers.0", "model.layers.1"]
    with pytest.raises(ValueError, match=r"'model\.layers\.7'.*model\.layers\.0, "):
        router.logits("model.layers.7", STATES)


@torch.no_grad()
def test_the_temperature_can_be_changed_and_is_saved(tmp_path):
    model = tiny_mixture().train()
    before = model.router(SITE, STATES)
    model.router.temperature = 4.0
    after = model.router(SITE, STATES)
    assert after.max() < before.max()
    torch.testing.assert_close(after.log() - after.log()[..., :1], (before.log() - before.log()[..., :1]) / 4)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, tiny_model()).router.temperature == 4.0
    with pytest.raises(ValueError, match=r"temperature.*\b0\b.*positive"):
        model.router.temperature = 0


def test_a_mixture_that_selects_otherwise_is_refused():
    model = get_peft_model(tiny_model(), MoELoraConfig(num_experts=2, target_modules=["q_proj"], top_p=0.5))
    with pytest.raises(ValueError, match="'top_p'.*DynamicHybridRouter.*'hybrid'.*'top_k'"):
        DynamicHybridRouter(model, top_k=1)


def test_the_config_says_the_same_to_peft():
    arguments = HybridRouterConfig(top_k=3, router_jitter=0.1, router_scope="layer").as_peft_arguments(2)
    config = MoELoraConfig(num_experts=2, **arguments).router_config()
    assert (config.selection, config.top_k, config.jitter, config.scope) == ("hybrid", 2, 0.1, "layer")
