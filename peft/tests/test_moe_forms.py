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
"""Which form a routed model computes in, and that the forms give the same: stacked, sparse, with the gate or apart."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft import MoELoraConfig, get_peft_model
from peft.tuners.lora import moe_layer
from peft.tuners.lora.moe_product import NORM_EPSILON
from peft.tuners.lora.moe_selection import select_experts


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
    """Counts the calls of the sparse form."""
    calls, run = [], moe_layer.add_sparse
    monkeypatch.setattr(moe_layer, "add_sparse", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scope", ["layer", "block"])
def test_a_model_of_many_experts_takes_it_and_gives_what_the_stacked_form_gives(scope, training, taken, monkeypatch):
    model = routed_model(64, top_k=2, router_scope=scope).double().train(training)
    ids = torch.arange(12).reshape(2, 6)
    sparse = model(input_ids=ids, labels=ids)
    assert len(taken) == 4  # two adapted layers in each of two blocks
    monkeypatch.setattr(moe_layer, "sparse_pays", lambda *args: False)
    stacked = model(input_ids=ids, labels=ids)
    assert len(taken) == 4
    # Llama's RMSNorm computes in float32
    torch.testing.assert_close(sparse.logits, stacked.logits, rtol=1e-5, atol=1e-6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for got, want in zip(*(torch.autograd.grad(output.loss, trained) for output in (sparse, stacked))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_dropout_runs_in_the_sparse_form(taken):
    model = routed_model(64, top_k=2, lora_dropout=0.5).train()
    ids = torch.arange(12).reshape(2, 6)
    torch.manual_seed(0)
    first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert len(taken) == 8
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(input_ids=ids).logits, first)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_experts", [4, 64])
@pytest.mark.parametrize("listened_to", [False, True])
def test_a_layer_that_no_token_reaches_runs(num_experts, training, listened_to):
    model = routed_model(num_experts, top_k=2).train(training)
    if listened_to:  # then the gate is called by itself
        for gate in model.base_model.moe_router.gates.values():
            gate.register_forward_hook(lambda *args: None)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for shape in [(0, 32), (0, 3, 32), (2, 0, 32)]:
        assert layer(torch.zeros(shape)).shape == shape


def test_every_expert_gets_a_gradient_even_if_no_token_chose_it(taken):
    model = routed_model(32, top_k=1)
    model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    assert taken
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "changes", [{"top_k": 2, "num_experts": 63}, {"num_experts": 128}, {"top_p": 0.5, "num_experts": 128}]
)
def test_few_experts_and_selections_without_a_fixed_k_use_the_stacked_form(changes, taken):
    routed_model(**changes)(input_ids=torch.arange(4)[None])
    assert not taken


def test_a_hybrid_router_is_sparse_only_in_eval(taken):
    model = routed_model(64, top_k=2, router_selection="hybrid")
    model.train()(input_ids=torch.arange(4)[None])
    assert not taken
    model.eval()(input_ids=torch.arange(4)[None])
    assert taken


# -- the gate in the experts' product --------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["nothing", "experts", "gates", "both"])
@pytest.mark.parametrize("training", [False, True])
def test_a_gate_scored_with_its_experts_gives_what_a_gate_called_by_itself_gives(training, frozen):
    model = routed_model(4, top_k=2).train(training)
    gates = model.base_model.moe_router.gates
    for name, parameter in model.named_parameters():
        is_gate = "moe_router" in name
        parameter.requires_grad_(
            ("lora_" in name or is_gate) and frozen not in ("both", "gates" if is_gate else "experts")
        )
    ids = torch.arange(12).reshape(2, 6)

    def run():
        output = model(input_ids=ids, labels=ids)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return output.logits, torch.autograd.grad(output.loss, trained) if trained else ()

    calls = []
    together = run()
    handles = [gate.register_forward_hook(lambda *args: calls.append(1)) for gate in gates.values()]
    apart = run()
    assert len(calls) == len(gates) == 4  # a gate that somebody listens to is called
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)  # float32, in another order


@pytest.mark.parametrize("autocast", [False, True])
def test_a_gate_stays_float32_where_its_experts_are_bfloat16(autocast):
    model = routed_model(16, top_k=2).eval()
    model = model if autocast else model.to(torch.bfloat16)
    for gate in model.base_model.moe_router.gates.values():
        gate.float()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0]))
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast), model.record_routing() as recorded:
        model(input_ids=torch.arange(48).reshape(2, 24))
    site = layer.routing_port.site
    gate = model.base_model.moe_router.gates[site.replace(".", "/")]
    x = seen["x"].float()
    scores = (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPSILON)) @ gate.weight.t()
    expected = select_experts(scores, selection="top_k", top_k=2).weights
    torch.testing.assert_close(recorded[site][0], expected, rtol=0, atol=1e-2 if seen["x"].dtype != x.dtype else 1e-5)
    assert torch.equal(recorded[site][0] > 0, expected > 0)


def test_one_product_serves_experts_and_gate():
    model = routed_model(4, top_k=2).eval()
    ids = torch.arange(6)[None]
    model(input_ids=ids)  # stacks the factors

    def num_products():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids)
        counts = counter.get_flop_counts()["Global"]
        return sum(counts.values())

    together = num_products()
    hidden, tokens, rank = 32, 6, 8
    base = 2 * tokens * (4 * hidden * hidden + 3 * hidden * 48) * 2 + 2 * tokens * hidden * 64
    attention = num_attention_flops(model, ids)
    update = 2 * tokens * ((rank + 4) * hidden + rank * hidden + (rank + 4) * hidden + rank * 48) * 2
    assert together == base + attention + update


def num_attention_flops(model, ids):
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.disable_adapter():
        model(input_ids=ids)
    return counter.get_total_flops() - (2 * 6 * (4 * 32 * 32 + 3 * 32 * 48) * 2 + 2 * 6 * 32 * 64)
