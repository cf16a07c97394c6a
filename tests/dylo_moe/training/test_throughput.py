import time

import pytest
import torch
from peft import MoELoraConfig, get_peft_model
from tiny_models import tiny_model

from dylo_moe.training.throughput import time_in_turns, tokens_per_second


def test_ways_are_timed_in_turns_and_in_alternating_order():
    called = []
    ways = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    time_in_turns(ways, rounds=2)
    assert called == ["a", "b", "a", "b", "b", "a"]  # one warm-up, then there and back


def test_the_slower_way_takes_longer():
    seconds = time_in_turns({"fast": lambda: None, "slow": lambda: time.sleep(0.02)}, rounds=3)
    assert min(seconds["slow"]) >= 0.02 > max(seconds["fast"])


@pytest.fixture
def routed():
    config = MoELoraConfig(num_experts=3, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), config)


def test_measuring_leaves_the_mixture_active_and_trainable_as_it_was(routed):
    routed.train()
    frozen = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.expert_1.weight"
    dict(routed.named_parameters())[frozen].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in routed.named_parameters()}
    input_ids = torch.zeros(1, 4, dtype=torch.long)
    expected = routed.eval()(input_ids=input_ids).logits
    routed.train()
    speeds = tokens_per_second(routed, ["expert_0", "expert_1", "expert_2"], input_ids, rounds=1)
    assert set(speeds) == {"base", "routed", "separate"} and all(speed > 0 for speed in speeds.values())
    assert {name: parameter.requires_grad for name, parameter in routed.named_parameters()} == before
    assert routed.training and routed.active_adapter == "default"
    assert torch.equal(routed.eval()(input_ids=input_ids).logits, expected)
