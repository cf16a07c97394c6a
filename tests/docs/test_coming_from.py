"""What the page on other methods says of their routing is so."""

import pytest
import torch
from peft import LoraConfig, MoELoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from tiny_models import tiny_model

IDS = torch.arange(3, 19)[None]


def base():
    return tiny_model(num_hidden_layers=1)


@pytest.fixture
def adapters(tmp_path) -> dict[str, str]:
    """Three adapters whose first singular value stands well above the second, so that power iteration finds it."""
    for seed in range(3):
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(seed)
        model = get_peft_model(base(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
                parameter.data[:, 1] *= 0.1
        model.save_pretrained(tmp_path / f"a{seed}")
    return {f"a{seed}": str(tmp_path / f"a{seed}") for seed in range(3)}


@torch.no_grad()
def test_a_router_that_starts_from_the_experts_routes_as_arrow_does(adapters):
    arrow = create_arrow_model(base(), list(adapters.values()), ArrowConfig(top_k=2, rng_seed=0)).eval()
    config = MoELoraConfig(
        experts=adapters, train_experts=False, top_k=2, router_init="experts", task_type="CAUSAL_LM"
    )
    ours = get_peft_model(base(), config).eval()
    expected = arrow(input_ids=IDS).logits
    assert not torch.allclose(expected, base()(input_ids=IDS).logits, atol=1e-2)
    torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
