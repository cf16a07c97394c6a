"""What the page on limits says of training is so."""

import pytest
import torch
from peft import MoELoraConfig, get_peft_model
from tiny_models import tiny_model

IDS = torch.arange(3, 19)[None]


@pytest.mark.parametrize(("selection", "learns"), [("top_k", False), ("hybrid", True)])
def test_one_expert_a_token_teaches_the_router_nothing_unless_training_weighs_all(selection, learns):
    config = MoELoraConfig(
        num_experts=3,
        top_k=1,
        router_selection=selection,
        router_balance_coef=0.0,
        target_modules=["q_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_model(num_hidden_layers=1), config).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [gate.weight.grad for gate in model.base_model.moe_router.gates.values()]
    largest = max(gradient.abs().max().item() if gradient is not None else 0.0 for gradient in gradients)
    assert (largest > 1e-5) == learns, largest
