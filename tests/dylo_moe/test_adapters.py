import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dylo_moe.adapters import MixtureConfig, add_lora_of_size, add_mixture, num_trained


def tiny_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
    )


def test_the_lora_has_the_rank_that_comes_closest_to_the_mixtures_size():
    config = MixtureConfig(num_experts=4, lora_r=3)
    size = num_trained(add_mixture(tiny_base(), config))
    lora = add_lora_of_size(tiny_base(), size, config)
    rank = lora.peft_config["default"].r
    of_one_rank = num_trained(lora) // rank
    assert abs(num_trained(lora) - size) <= of_one_rank / 2


def test_the_lora_scales_its_update_as_an_expert_does():
    config = MixtureConfig(num_experts=4, lora_r=4, lora_alpha=12)
    lora = add_lora_of_size(tiny_base(), 20_000, config)
    assert lora.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("option", "value", "read"),
    [
        ("num_experts", 3, lambda c: c.num_experts),
        ("lora_r", 5, lambda c: c.r),
        ("lora_alpha", 7, lambda c: c.lora_alpha),
        ("lora_dropout", 0.25, lambda c: c.lora_dropout),
        ("top_k", 1, lambda c: c.top_k),
        ("router_scope", "layer", lambda c: c.router_scope),
        ("balance_coefficient", 0.5, lambda c: c.router_balance_coef),
    ],
)
def test_each_option_reaches_the_config_of_the_mixture(option, value, read):
    assert read(MixtureConfig(**{option: value}).peft_config()) == value


def test_dense_training_weighs_all_experts_while_training_and_top_k_in_use():
    config = MixtureConfig(num_experts=4, top_k=1, dense_training=True).peft_config().router_config()
    assert (config.selection, config.top_k) == ("hybrid", 1)
    with pytest.raises(ValueError, match="dense_training is set, but top_k keeps all experts anyway"):
        MixtureConfig(top_k=0, dense_training=True)


def test_the_layers_of_gpt2_count_too():
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
    lora = add_lora_of_size(GPT2LMHeadModel(GPT2Config(**shape)), 3000, MixtureConfig())
    rank = lora.peft_config["default"].r
    assert abs(num_trained(lora) - 3000) <= num_trained(lora) / rank / 2


def test_a_top_k_of_zero_keeps_all_experts():
    assert MixtureConfig(top_k=0).peft_config().router_config().selection == "dense"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_experts", 0, "num_experts is 0"),
        ("lora_r", 0, "lora_r is 0"),
        ("top_k", 5, r"top_k is 5, but must lie between 0 \(all\) and num_experts \(4\)"),
        ("lora_dropout", 1.0, "lora_dropout is 1.0"),
        ("balance_coefficient", -1.0, "balance_coefficient is -1.0"),
    ],
)
def test_bad_options_are_refused_with_the_value_and_the_bound(option, value, message):
    with pytest.raises(ValueError, match=message):
        MixtureConfig(**{option: value})
