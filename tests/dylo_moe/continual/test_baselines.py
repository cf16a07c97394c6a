"""The LoRA that the mixture is compared with has its number of parameters."""

import pytest
from peft.tuners.lora.layer import LoraLayer
from tiny_models import tiny_model

from dylo_moe.continual.baselines import add_lora_of
from dylo_moe.target_modules import find_target_modules


@pytest.mark.parametrize("num_parameters", [2000, 5000, 12345, 40000])
def test_it_has_the_parameters_asked_for_to_one_layers_rank(num_parameters):
    base = tiny_model()
    targets = find_target_modules(base)
    largest = max(sum(module.weight.shape) for name, module in base.named_modules() if name.split(".")[-1] in targets)
    model = add_lora_of(base, num_parameters, alpha_over_r=2.0, dropout=0.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert num_parameters - largest < trained <= num_parameters


def test_the_scaling_is_the_same_in_every_layer_whatever_its_rank():
    model = add_lora_of(tiny_model(), 5000, alpha_over_r=2.0, dropout=0.0)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {2.0}
    assert len({layer.r["default"] for layer in layers}) == 2


def test_fewer_parameters_than_rank_one_has_give_rank_one():
    model = add_lora_of(tiny_model(), 10, alpha_over_r=2.0, dropout=0.0)
    assert model.peft_config["default"].r == 1
