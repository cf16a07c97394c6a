# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The sparse path of a routed layer: few of many experts, each token with its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft import MoELoraConfig, get_peft_model
from peft.tuners.lora import moe_layer, moe_sparse


def one_token_and_expert_at_a_time(x, weights, A, B, ranks):
    delta = []
    for token, row in zip(x, weights):
        total = torch.zeros(B.shape[0], dtype=x.dtype)
        for weight, A_e, B_e in zip(row, A.split(ranks, dim=0), B.split(ranks, dim=1)):
            total = total + weight * (B_e @ (A_e @ token))
        delta.append(total)
    return torch.stack(delta)


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=7),
    kept=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_values_and_all_gradients_equal_the_loop(num_tokens, ranks, kept, seed):
    kept = min(kept, len(ranks))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, A, B = random(num_tokens, 5), random(sum(ranks), 5), random(3, sum(ranks))
    scores = torch.rand(num_tokens, len(ranks), generator=generator, dtype=torch.float64)
    mask = torch.zeros_like(scores).scatter(-1, scores.topk(kept).indices, 1.0)
    weights = (scores * mask).requires_grad_()

    sparse = moe_sparse.sparse_update(x, weights, A, B, ranks, kept)
    looped = one_token_and_expert_at_a_time(x, weights, A, B, ranks)
    torch.testing.assert_close(sparse, looped)  # float64: only the order of the sums differs

    upstream = torch.randn(sparse.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad(sparse, (x, weights, A, B), upstream)
    want = torch.autograd.grad(looped, (x, weights, A, B), upstream)
    torch.testing.assert_close(got[0], want[0])
    # an expert that was not kept has no path to the output, so its weight has no gradient on the sparse path
    torch.testing.assert_close(got[1] * mask, want[1] * mask)
    torch.testing.assert_close(got[2], want[2])
    torch.testing.assert_close(got[3], want[3])


def routed_model(num_experts, **changes):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    )
    config = MoELoraConfig(
        num_experts=num_experts,
        r=2,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **changes,
    )
    return get_peft_model(base, config)


@pytest.fixture
def taken(monkeypatch):
    """Counts the calls of the sparse path."""
    calls, run = [], moe_layer.sparse_update
    monkeypatch.setattr(moe_layer, "sparse_update", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.mark.parametrize("scope", ["layer", "block"])
def test_a_model_with_many_experts_takes_the_path_and_gives_what_the_stacked_product_gives(scope, taken, monkeypatch):
    model = routed_model(128, top_k=2, router_scope=scope).double().eval()
    ids = torch.arange(12).reshape(2, 6)
    sparse = model(input_ids=ids).logits
    assert len(taken) == 4  # two adapted layers in each of two blocks
    monkeypatch.setattr(moe_layer, "pays", lambda *args: False)
    stacked = model(input_ids=ids).logits
    assert len(taken) == 4
    # Llama's RMSNorm computes in float32
    torch.testing.assert_close(sparse, stacked, rtol=1e-5, atol=1e-6)


def test_every_expert_gets_a_gradient_even_if_no_token_chose_it(taken):
    model = routed_model(64, top_k=1)
    model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    assert taken
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "changes", [{"top_k": 2, "num_experts": 127}, {"num_experts": 128}, {"top_p": 0.5, "num_experts": 128}]
)
def test_few_experts_and_selections_without_a_fixed_k_use_the_stacked_product(changes, taken):
    routed_model(**changes)(input_ids=torch.arange(4)[None])
    assert not taken


def test_a_hybrid_router_is_sparse_only_in_eval(taken):
    model = routed_model(128, top_k=2, router_selection="hybrid")
    model.train()(input_ids=torch.arange(4)[None])
    assert not taken
    model.eval()(input_ids=torch.arange(4)[None])
    assert taken


def test_the_arithmetic_does_not_grow_with_the_number_of_experts():
    def update_flops(num_experts):
        ranks = [2] * num_experts
        x, A, B = torch.randn(64, 16), torch.randn(2 * num_experts, 16), torch.randn(16, 2 * num_experts)
        weights = torch.rand(64, num_experts)
        weights = weights * torch.zeros_like(weights).scatter(-1, weights.topk(2).indices, 1.0)
        with FlopCounterMode(display=False) as counter:
            moe_sparse.sparse_update(x, weights, A, B, ranks, 2)
        return counter.get_total_flops()

    assert update_flops(64) == update_flops(4) == 64 * 2 * (2 * 16 * 2 + 2 * 2 * 16)
