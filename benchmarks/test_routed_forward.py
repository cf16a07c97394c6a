"""What routing costs: a routed forward against one plain LoRA of the same arithmetic, measured in turns.

    make bench

8 experts of rank 16 do the matrix products of one LoRA of rank 128, so the ratio of the two is what routing itself
costs: the gates and the weighting. Two Llama-type decoder blocks of hidden size 1024, 512 tokens.
"""

import statistics

import pytest
import torch
from peft import LoraConfig, MoELoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dylo_moe.allocator import keep_freed_memory
from dylo_moe.throughput import time_in_turns

NUM_EXPERTS, RANK, TOKENS, ROUNDS = 8, 16, 512, 15


@pytest.fixture(scope="module", autouse=True)
def allocator():
    keep_freed_memory()


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=1024,
    )
    return LlamaForCausalLM(config)


def plain_lora():
    config = LoraConfig(
        r=NUM_EXPERTS * RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(base_model(), config)


def routed_lora(scope: str, top_k: int | None):
    config = MoELoraConfig(
        num_experts=NUM_EXPERTS,
        top_k=top_k,
        r=RANK,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        router_scope=scope,
        router_block=0 if scope == "model" else None,
        init_lora_weights=False,
    )
    return get_peft_model(base_model(), config)


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(0, 1024, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_k", [None, 2], ids=["dense", "top-2"])
@pytest.mark.parametrize("scope", ["layer", "block", "model"])
@pytest.mark.benchmark(group="routed forward, 8 experts of rank 16, over one LoRA of rank 128")
def test_routed_forward_against_one_lora(benchmark, scope, top_k, input_ids):
    routed, plain = routed_lora(scope, top_k).eval(), plain_lora().eval()
    with torch.no_grad():
        ways = {"plain": lambda: plain(input_ids=input_ids), "routed": lambda: routed(input_ids=input_ids)}
        seconds = time_in_turns(ways, rounds=ROUNDS)
        ratios = [new / old for new, old in zip(seconds["routed"], seconds["plain"], strict=True)]
        benchmark.extra_info["times_slower_median"] = round(statistics.median(ratios), 3)
        benchmark.pedantic(ways["routed"], rounds=3, warmup_rounds=1)
        check_against_the_loop(routed, input_ids)
    print(f"\n{scope} {top_k or 'dense'}: {statistics.median(ratios):.3f} times one LoRA of rank {NUM_EXPERTS * RANK}")


@pytest.mark.benchmark(group="routed training step, 8 experts of rank 16, over one LoRA of rank 128")
@pytest.mark.parametrize("scope", ["layer", "block", "model"])
def test_routed_training_step_against_one_lora(benchmark, scope, input_ids):
    routed, plain = routed_lora(scope, 2).train(), plain_lora().train()

    def step(model):
        model.zero_grad(set_to_none=True)
        model(input_ids=input_ids, labels=input_ids).loss.backward()

    seconds = time_in_turns({"plain": lambda: step(plain), "routed": lambda: step(routed)}, rounds=ROUNDS)
    ratios = [new / old for new, old in zip(seconds["routed"], seconds["plain"], strict=True)]
    benchmark.extra_info["times_slower_median"] = round(statistics.median(ratios), 3)
    benchmark.pedantic(step, args=(routed,), rounds=3, warmup_rounds=1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in routed.parameters() if p.requires_grad)
    print(f"\n{scope}: {statistics.median(ratios):.3f} times the step of one LoRA of rank {NUM_EXPERTS * RANK}")


def check_against_the_loop(routed, input_ids) -> None:
    """The routed layers' outputs equal a loop over the experts, with the weights that the router gave."""
    layer = routed.base_model.model.model.layers[1].mlp.down_proj
    seen = {}
    handle = layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    with routed.record_routing() as weights:
        routed(input_ids=input_ids)
    handle.remove()
    site = layer.routing_port.site
    expected = layer.base_layer(seen["x"])
    for column, name in enumerate(layer.active_adapters):
        update = layer.lora_B[name](layer.lora_A[name](seen["x"])) * layer.scaling[name]
        expected = expected + weights[site][0][..., column : column + 1] * update
    # float32, sums of up to 2816 products in another order
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)
