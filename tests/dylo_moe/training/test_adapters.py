import pytest
import torch
from tiny_models import tiny_model

from dylo_moe.training.adapters import MixtureConfig, add_lora_of_size, add_mixture, num_trained


def test_the_lora_has_the_rank_that_comes_closest_to_the_mixtures_size():
    config = MixtureConfig(num_experts=4, lora_r=3)
    size = num_trained(add_mixture(tiny_model(), config))
    lora = add_lora_of_size(tiny_model(), size, config)
    rank = lora.peft_config["default"].r
    of_one_rank = num_trained(lora) // rank
    assert abs(num_trained(lora) - size) <= of_one_rank / 2


def test_the_lora_scales_its_update_as_an_expert_does():
    config = MixtureConfig(num_experts=4, lora_r=4, lora_alpha=12)
    lora = add_lora_of_size(tiny_model(), 20_000, config)
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
    assert read(add_mixture(tiny_model(), MixtureConfig(**{option: value})).mixture_config) == value


@torch.no_grad()
def kept(**options) -> tuple[int, int]:
    """Experts that a token's weights are not zero for, in training and in use."""
    model = add_mixture(tiny_model(), MixtureConfig(num_experts=4, **options))
    ids = torch.arange(8)[None]
    counts = []
    for training in (True, False):
        model.train(training)(input_ids=ids)
        counts.append(int((model.last_routing_weights > 0).sum(dim=-1).max()))
    return tuple(counts)


def test_top_k_experts_are_weighed_in_training_too_unless_it_is_dense():
    assert kept(top_k=1, router_scope="model") == (1, 1)
    assert kept(top_k=1, router_scope="model", dense_training=True) == (4, 1)
    with pytest.raises(ValueError, match="dense_training.*top_k"):
        MixtureConfig(top_k=0, dense_training=True)


def test_the_layers_of_gpt2_count_too():
    lora = add_lora_of_size(tiny_model("gpt2", n_embd=16, n_layer=1), 3000, MixtureConfig())
    rank = lora.peft_config["default"].r
    assert abs(num_trained(lora) - 3000) <= num_trained(lora) / rank / 2


def test_a_top_k_of_zero_keeps_all_experts():
    assert kept(top_k=0, router_scope="model") == (4, 4)


def test_every_linear_layer_is_adapted_also_of_an_architecture_that_is_not_known():
    base = tiny_model()
    base.config.model_type = "unheard-of"
    adapted = {name.split(".")[-2] for name, _ in add_mixture(base, MixtureConfig()).named_modules() if
               name.endswith("lora_A")}  # fmt: skip
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_experts", 0, "num_experts is 0"),
        ("lora_r", 0, "lora_r is 0"),
        ("top_k", 5, r"top_k.*\b5\b.*\b0\b.*num_experts \(4\)"),
        ("lora_dropout", 1.0, "lora_dropout is 1.0"),
        ("balance_coefficient", -1.0, "balance_coefficient is -1.0"),
    ],
)
def test_bad_options_are_refused_with_the_value_and_the_bound(option, value, message):
    with pytest.raises(ValueError, match=message):
        MixtureConfig(**{option: value})
