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
"""Selection, `RouterConfig`, gates, where a router looks, and attaching one to plain adapters."""

import json
import math

import pytest
import torch
from moe_testing import (
    SCOPES,
    TARGETS,
    TOLERANCE,
    VOCAB,
    count_hooks,
    spread_gates,
    tiny_base,
    tokens,
    trainable_gradients,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.moe_router import Gate, RouterConfig, site_of
from peft.tuners.lora.moe_selection import select_experts


every_scope = pytest.mark.parametrize("scope", SCOPES)


def scores(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 2


def softmax_of_row(row, temperature):
    exponentials = [math.exp(score / temperature) for score in row]
    return [value / sum(exponentials) for value in exponentials]


def renormalised(probabilities, kept):
    total = sum(probabilities[i] for i in kept)
    return [p / total if i in kept else 0.0 for i, p in enumerate(probabilities)]


def best_k(probabilities, k):
    return sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:k]


def smallest_set_reaching(probabilities, top_p):
    kept, reached = [], 0.0
    for i in best_k(probabilities, len(probabilities)):
        if reached >= top_p:
            break
        kept.append(i)
        reached += probabilities[i]
    return kept


def rows(logits):
    return logits.reshape(-1, logits.shape[-1]).tolist()


class TestSelection:
    # From 32 tokens on, and up to 16 experts, the softmax runs along the tokens on a CPU.
    @pytest.mark.parametrize("shape", [(2, 5, 4), (2, 20, 4), (2, 20, 17)], ids=str)
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_dense_is_the_softmax_of_each_token(self, temperature, shape):
        logits = scores(*shape)
        routing = select_experts(logits, selection="dense", temperature=temperature)
        expected = torch.tensor([softmax_of_row(row, temperature) for row in rows(logits)]).reshape(shape)
        torch.testing.assert_close(routing.weights.float(), expected)

    @pytest.mark.parametrize("top_k", [1, 2, 3, 4])
    def test_top_k_keeps_the_k_largest_and_renormalises(self, top_k):
        logits = scores(2, 5, 4)
        routing = select_experts(logits, selection="top_k", top_k=top_k, temperature=0.7)
        expected = []
        for row in rows(logits):
            probabilities = softmax_of_row(row, 0.7)
            expected.append(renormalised(probabilities, best_k(probabilities, top_k)))
        torch.testing.assert_close(routing.weights.float(), torch.tensor(expected).reshape(2, 5, 4))

    @pytest.mark.parametrize("top_p", [0.1, 0.5, 0.8, 0.95, 1.0])
    def test_top_p_keeps_the_smallest_set_that_reaches_it(self, top_p):
        logits = scores(2, 5, 4)
        routing = select_experts(logits, selection="top_p", top_p=top_p)
        expected = []
        for row in rows(logits):
            probabilities = softmax_of_row(row, 1.0)
            expected.append(renormalised(probabilities, smallest_set_reaching(probabilities, top_p)))
        torch.testing.assert_close(routing.weights.float(), torch.tensor(expected).reshape(2, 5, 4))

    def test_top_p_keeps_one_expert_even_if_its_probability_exceeds_top_p(self):
        routing = select_experts(torch.tensor([[10.0, 0.0, 0.0]]), selection="top_p", top_p=0.01)
        assert routing.weights.tolist() == [[1.0, 0.0, 0.0]]

    def test_top_p_keeps_no_more_once_it_is_reached_exactly(self):
        routing = select_experts(torch.zeros(1, 4), selection="top_p", top_p=0.5)
        assert (routing.weights > 0).sum().item() == 2

    def test_hybrid_is_dense_in_training(self):
        logits = scores(6, 4)
        hybrid = select_experts(logits, selection="hybrid", top_k=2, training=True)
        assert torch.equal(hybrid.weights, select_experts(logits, selection="dense").weights)

    def test_hybrid_is_top_k_in_eval(self):
        logits = scores(6, 4)
        hybrid = select_experts(logits, selection="hybrid", top_k=2, training=False)
        assert torch.equal(hybrid.weights, select_experts(logits, selection="top_k", top_k=2).weights)

    def test_top_k_of_all_experts_is_dense(self):
        logits = scores(6, 4)
        routing = select_experts(logits, selection="top_k", top_k=4)
        torch.testing.assert_close(routing.weights, select_experts(logits, selection="dense").weights)

    def test_half_precision_scores_are_selected_in_float32(self):
        logits = torch.tensor([[1.0, 1.0078125, 1.015625]], dtype=torch.bfloat16)  # neighbours in bfloat16
        routing = select_experts(logits, selection="dense")
        assert routing.weights.dtype == torch.float32
        assert routing.weights.unique().numel() == 3

    def test_float64_scores_keep_their_precision(self):
        logits = scores(3, 4)
        routing = select_experts(logits, selection="dense")
        expected = torch.tensor([softmax_of_row(row, 1.0) for row in rows(logits)], dtype=torch.float64)
        torch.testing.assert_close(routing.weights, expected, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("selection", [{"selection": "top_k", "top_k": 2}, {"selection": "top_p", "top_p": 0.8}])
    def test_dropped_experts_share_the_gradient_of_the_renormalised_rest_only(self, selection):
        logits = scores(5, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: select_experts(x, **selection).weights, (logits,))
        routing = select_experts(logits, **selection)
        (gradient,) = torch.autograd.grad(routing.weights[..., 0].sum(), logits)
        assert (gradient[routing.weights == 0].abs() < 1e-15).all()


class TestRouterConfig:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"scope": "token"}, "scope is 'token', but must be one of 'layer', 'block', 'model', 'two_pass'"),
            ({"selection": "best"}, "selection is 'best', but must be one of 'dense', 'top_k', 'top_p', 'hybrid'"),
            ({"init": "ones"}, "init is 'ones', but must be one of 'normal', 'zeros', 'experts'"),
            ({"selection": "top_k"}, "selection='top_k' needs top_k"),
            ({"selection": "hybrid"}, "selection='hybrid' needs top_k"),
            ({"selection": "top_p"}, "selection='top_p' needs top_p"),
            ({"selection": "dense", "top_k": 2}, "top_k=2 is not used by selection='dense'"),
            ({"top_k": 2, "top_p": 0.5}, "top_p=0.5 is not used by selection='top_k'"),
            ({"top_k": 0}, "top_k is 0, but must be at least 1"),
            ({"top_k": 2.5}, "top_k is 2.5, but must be at least 1, a whole number"),
            ({"top_p": 0.0}, r"top_p is 0.0, but must lie in \(0, 1\]"),
            ({"top_p": 1.5}, r"top_p is 1.5, but must lie in \(0, 1\]"),
            ({"temperature": 0.0}, "temperature is 0.0, but must be positive"),
            ({"temperature": float("nan")}, "temperature is nan, but must be positive"),
            ({"temperature": float("inf")}, "temperature is inf, but must be positive and finite"),
            ({"jitter": 1.0}, r"jitter is 1.0, but must lie in \[0, 1\)"),
            ({"jitter": -0.1}, r"jitter is -0.1, but must lie in \[0, 1\)"),
            ({"block": 1}, "block=1 is only used by scope='model', not by scope='layer'"),
            ({"init": "experts", "scope": "block"}, "init='experts' needs scope='layer'"),
            ({"balance_coef": -1.0}, "balance_coef is -1.0, but must not be negative"),
            ({"z_coef": -1.0}, "z_coef is -1.0, but must not be negative"),
            ({"entropy_coef": -1.0}, "entropy_coef is -1.0, but must not be negative"),
        ],
    )
    def test_a_wrong_value_is_refused_and_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RouterConfig(**arguments)

    @pytest.mark.parametrize(
        "arguments, selection", [({}, "dense"), ({"top_k": 2}, "top_k"), ({"top_p": 0.5}, "top_p")]
    )
    def test_the_selection_follows_from_what_is_given(self, arguments, selection):
        assert RouterConfig(**arguments).selection == selection

    def test_more_kept_than_held_is_refused_and_names_both_counts(self):
        model = adapters("a", "b")
        with pytest.raises(ValueError, match=r"top_k is 3, but must lie between 1 and num_experts \(2\)"):
            model.attach_router(RouterConfig(top_k=3))


def adapters(*names, family="llama", base=None, targets=None, **config):
    """Plain LoRA adapters on a tiny base, all active."""
    base = tiny_base(family) if base is None else base
    torch.manual_seed(1)
    targets = targets or TARGETS[family]
    config = {"r": 4, "init_lora_weights": False, "target_modules": targets, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(base, LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config))
    model.base_model.set_adapter(list(names))
    return model.eval()


class TestGate:
    def test_scores_do_not_depend_on_the_length_of_the_hidden_state(self):
        gate = Gate(8, 3)
        nn.init.normal_(gate.weight)
        x = torch.randn(5, 8)
        torch.testing.assert_close(gate(x * 100), gate(x), rtol=1e-4, atol=1e-5)

    def test_scores_are_the_products_with_the_normalised_hidden_state(self):
        gate = Gate(8, 3)
        nn.init.normal_(gate.weight)
        x = torch.randn(5, 8)
        expected = torch.stack([gate.weight @ (token / token.square().mean().sqrt()) for token in x])
        torch.testing.assert_close(gate(x), expected, rtol=1e-5, atol=1e-5)

    def test_an_absolute_gate_has_no_sign(self):
        gate = Gate(8, 3, absolute=True)
        nn.init.normal_(gate.weight)
        x = torch.randn(5, 8)
        assert torch.equal(gate(-x), gate(x)) and (gate(x) >= 0).all()

    def test_jitter_is_drawn_in_training(self):
        gate = Gate(8, 3, jitter=0.2).train()
        nn.init.normal_(gate.weight)
        x = torch.randn(5, 8)
        assert not torch.equal(gate(x), gate(x))

    def test_jitter_stays_within_its_bounds(self):
        gate = Gate(1, 1, jitter=0.2).train()
        nn.init.ones_(gate.weight)
        seen = []
        gate.register_forward_pre_hook(lambda module, args: None)
        original = torch.Tensor.uniform_

        def record(self, low, high):
            seen.append((low, high))
            return original(self, low, high)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", record)
            gate(torch.ones(4, 1))
        assert seen == [(0.8, 1.2)]

    def test_jitter_is_off_in_eval(self):
        gate = Gate(8, 3, jitter=0.2).eval()
        nn.init.normal_(gate.weight)
        x = torch.randn(5, 8)
        assert torch.equal(gate(x), gate(x))

    def test_a_gate_is_float32_under_a_bfloat16_base(self):
        model = adapters("a", "b", base=tiny_base("llama").bfloat16())
        router = model.attach_router(RouterConfig())
        assert {parameter.dtype for parameter in router.parameters()} == {torch.float32}

    def test_a_gate_is_float64_under_a_float64_base(self):
        model = adapters("a", "b", family="gpt2", fan_in_fan_out=True)
        router = model.attach_router(RouterConfig())
        assert {parameter.dtype for parameter in router.parameters()} == {torch.float64}


class TestFieldsAreUsed:
    """Each field of `RouterConfig` changes what it is there to change."""

    def weights(self, *, training=False, seed=None, **config):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(**config))
        spread_gates(model)
        model.train(training)
        if seed is not None:
            torch.manual_seed(seed)
        with torch.no_grad(), model.record_routing() as recorded:
            model(input_ids=tokens(2, 6))
        return {site: weights[0] for site, weights in recorded.items()}

    def kept(self, weights):
        return {int(count) for site in weights.values() for count in (site > 0).sum(-1).flatten()}

    @every_scope
    def test_scope_decides_which_sites_there_are(self, scope):
        sites = list(self.weights(scope=scope))
        if scope == "layer":
            assert len(sites) == 2 * len(TARGETS["llama"]) and "model.layers.1.mlp.down_proj" in sites
        elif scope == "block":
            assert sites == ["model.layers.0", "model.layers.1"]
        else:
            assert sites == ["model"]

    def test_selection_and_top_k_decide_how_many_are_kept(self):
        assert self.kept(self.weights(selection="top_k", top_k=1)) == {1}
        assert self.kept(self.weights(selection="top_k", top_k=2)) == {2}
        assert self.kept(self.weights(selection="dense")) == {3}

    def test_top_p_decides_how_many_are_kept(self):
        assert self.kept(self.weights(top_p=0.05)) == {1}
        assert self.kept(self.weights(top_p=0.9)) > {1}

    def test_hybrid_keeps_all_in_training_and_top_k_in_eval(self):
        assert self.kept(self.weights(selection="hybrid", top_k=1, training=True)) == {3}
        assert self.kept(self.weights(selection="hybrid", top_k=1, training=False)) == {1}

    def test_temperature_flattens_the_weights(self):
        # Only the first site sees the same input whatever was routed before it.
        cold, warm = (next(iter(self.weights(temperature=t).values())) for t in (1.0, 10.0))
        scores = cold.log() - cold.log().mean(-1, keepdim=True)
        torch.testing.assert_close(warm, torch.softmax(scores / 10, dim=-1), rtol=1e-4, atol=1e-5)

    def test_jitter_is_drawn_in_training_only(self):
        first = "model.layers.0.self_attn.q_proj"
        draws = [self.weights(jitter=0.5, training=True, seed=seed)[first] for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        calm = [self.weights(jitter=0.5, training=False, seed=seed)[first] for seed in (1, 2)]
        assert torch.equal(calm[0], calm[1])

    @pytest.mark.parametrize("block", [0, 1])
    def test_block_decides_where_a_model_router_looks(self, block):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(scope="model", block=block))
        spread_gates(model)
        entering = []
        looked_at = model.base_model.model.model.layers[block]
        looked_at.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        with torch.no_grad(), model.record_routing() as recorded:
            model(input_ids=tokens(2, 6))
        gate = model.base_model.moe_router.gates["model"]
        expected = torch.softmax(gate(entering[0]), dim=-1)
        torch.testing.assert_close(recorded["model"][0], expected)

    def test_layers_before_the_block_of_a_model_router_are_not_adapted(self):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(scope="model", block=1))
        spread_gates(model)
        ids = tokens(2, 6)
        outputs = []
        model.base_model.model.model.layers[0].register_forward_hook(lambda m, args, output: outputs.append(output))
        with torch.no_grad():
            routed = model(input_ids=ids).logits
            with model.disable_adapter():
                base = model(input_ids=ids).logits
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.allclose(routed, base, atol=1e-3)

    def test_a_model_router_looks_a_quarter_of_the_way_up_by_default(self):
        model = adapters("a", "b", base=tiny_base("llama", num_hidden_layers=4))
        model.attach_router(RouterConfig(scope="model"))
        hooked = [len(block._forward_pre_hooks) for block in model.base_model.model.model.layers]
        assert hooked == [0, 1, 0, 0]

    @pytest.mark.parametrize("init", ["normal", "zeros"])
    def test_init_decides_the_first_weights(self, init):
        model = adapters("a", "b", "c")
        router = model.attach_router(RouterConfig(init=init))
        weights = torch.cat([gate.weight.flatten() for gate in router.gates.values()])
        if init == "zeros":
            assert not weights.any()
        else:
            assert weights.std().item() == pytest.approx(0.02, rel=0.1)

    @pytest.mark.parametrize(
        "field, loss",
        [("balance_coef", "router_balance_loss"), ("z_coef", "router_z_loss"), ("entropy_coef", "router_entropy")],
    )
    def test_each_coefficient_weighs_its_loss(self, field, loss):
        off = {"balance_coef": 0.0, "z_coef": 0.0, "entropy_coef": 0.0}
        totals = []
        for coefficient in (0.0, 2.0):
            model = adapters("a", "b", "c")
            model.attach_router(RouterConfig(**{**off, field: coefficient}))
            spread_gates(model)
            model.train()
            ids = tokens(2, 6)
            output = model(input_ids=ids, labels=ids)
            totals.append(output.loss)
        torch.testing.assert_close(totals[1] - totals[0], 2.0 * output[loss], rtol=1e-5, atol=1e-5)


class TestInitFromExperts:
    def test_each_row_is_the_direction_its_expert_responds_to_most(self):
        model = adapters("a", "b", "c")
        router = model.attach_router(RouterConfig(init="experts"))
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        rows = router.gates["model/layers/1/mlp/down_proj"].weight
        for row, name in zip(rows, ["a", "b", "c"]):
            update = (layer.lora_B[name].weight @ layer.lora_A[name].weight).detach()
            assert row.norm().item() == pytest.approx(1.0, abs=1e-5)
            assert (update @ row).norm().item() == pytest.approx(torch.linalg.matrix_norm(update, 2).item(), rel=1e-4)

    def test_the_scores_have_no_sign(self):
        model = adapters("a", "b", "c")
        router = model.attach_router(RouterConfig(init="experts"))
        gate = router.gates["model/layers/0/self_attn/q_proj"]
        x = torch.randn(4, 32)
        assert torch.equal(gate(x), gate(-x))

    def test_the_direction_is_that_of_a_transposed_layer_too(self):
        model = adapters("a", "b", family="gpt2", fan_in_fan_out=True)
        router = model.attach_router(RouterConfig(init="experts"))
        layer = model.base_model.model.transformer.h[0].attn.c_attn
        update = (layer.lora_B["a"].weight @ layer.lora_A["a"].weight).detach()
        row = router.gates["transformer/h/0/attn/c_attn"].weight[0]
        assert (update @ row).norm().item() == pytest.approx(torch.linalg.matrix_norm(update, 2).item(), rel=1e-4)

    def test_untrained_experts_are_refused(self):
        model = adapters("a", "b", init_lora_weights=True)
        with pytest.raises(ValueError, match="Expert 'a' has an untrained .zero. B in layer 'model.layers.0"):
            model.attach_router(RouterConfig(init="experts"))

    def test_a_refused_init_leaves_no_router_behind(self):
        model = adapters("a", "b", init_lora_weights=True)
        hooks = count_hooks(model)
        with pytest.raises(ValueError, match="untrained"):
            model.attach_router(RouterConfig(init="experts"))
        assert count_hooks(model) == hooks
        model.attach_router(RouterConfig())


class TestSites:
    def test_a_layer_outside_of_all_blocks_gates_for_itself_under_block_scope(self):
        model = adapters("a", "b", targets=["q_proj", "lm_head"])
        router = model.attach_router(RouterConfig(scope="block"))
        assert sorted(router.gates) == ["lm_head", "model/layers/0", "model/layers/1"]

    def test_layers_may_have_the_names_of_a_dicts_methods(self):
        class Attending(nn.Module):
            def __init__(self):
                super().__init__()
                self.keys, self.values = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.keys(x) @ self.values(x).mT

        model = adapters("a", "b", base=Attending(), targets=["keys", "values"], task_type=None).base_model
        router = model.attach_router(RouterConfig())
        model(torch.rand(2, 3, 4))
        assert sorted(router.gates) == ["keys/", "values/"]
        assert [site_of(key) for key in sorted(router.gates)] == ["keys", "values"]
        assert sorted(model.routing_summary()) == ["keys", "values"]

    def test_all_layers_of_a_block_share_its_weights(self):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(scope="block"))
        spread_gates(model)
        block = model.base_model.model.model.layers[1]
        asked = {}
        for name in ("q_proj", "v_proj", "o_proj"):
            layer = getattr(block.self_attn, name)
            layer.base_layer.register_forward_pre_hook(
                lambda module, args, layer=layer, name=name: asked.update(
                    {name: layer.routing_port.weights_for(layer, args[0])}
                )
            )
        with torch.no_grad(), model.record_routing() as recorded:
            model(input_ids=tokens(2, 6))
        for weights in asked.values():
            assert torch.equal(weights, recorded["model.layers.1"][0])

    def test_a_block_knows_its_own_weights_alone(self):
        """What a checkpointed block takes and keeps, and what a deep model would otherwise add up to."""
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(scope="block"))
        context, known = model.base_model._routing_context(), []
        for block in model.base_model.model.model.layers:
            block.mlp.register_forward_pre_hook(lambda *args: known.append(list(context.frame.weights)))
        model(input_ids=tokens(2, 6))
        assert known == [["model.layers.0"], ["model.layers.1"]]

    def test_a_block_that_does_not_exist_is_refused(self):
        model = adapters("a", "b")
        with pytest.raises(ValueError, match="block is 7, but 'model.layers' has blocks 0 to 1"):
            model.attach_router(RouterConfig(scope="model", block=7))

    def test_a_block_without_hidden_states_as_its_first_argument_is_refused(self):
        model = adapters("a", "b")
        model.attach_router(RouterConfig(scope="block"))
        context = model.base_model._routing_context()
        block = model.base_model.model.model.layers[0]
        with pytest.raises(ValueError, match="'model.layers.0' .LlamaDecoderLayer. does not take its hidden states"):
            context.enter_block("model.layers.0", block, (), {"states": torch.zeros(1, 2, 32)})

    @pytest.mark.parametrize("scope", ["block", "model"])
    def test_a_model_without_blocks_is_refused(self, scope):
        model = adapters("a", "b", targets=["lm_head"])
        with pytest.raises(
            ValueError, match="None of the adapted layers of LlamaForCausalLM lies in a numbered decoder"
        ):
            model.attach_router(RouterConfig(scope=scope))

    def test_two_stacks_of_blocks_are_refused_by_a_model_router(self):
        stacks = nn.ModuleDict({name: nn.Sequential(nn.Sequential(nn.Linear(4, 4))) for name in ("text", "image")})
        model = adapters("a", "b", base=stacks, targets=["0.0"], task_type=None)
        with pytest.raises(
            ValueError, match=r"adapted layers lie in \['image', 'text'\]. Use scope 'layer' or 'block'"
        ):
            model.base_model.attach_router(RouterConfig(scope="model"))

    def test_a_convolution_cannot_gate_for_itself(self):
        base = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU())
        model = adapters("a", "b", base=base, targets=["0"], task_type=None)
        with pytest.raises(ValueError, match="Layer '0' is a convolution.*Use router scope 'block' or 'model'"):
            model.base_model.attach_router(RouterConfig())

    def test_a_model_whose_width_is_unknown_is_refused_and_told_what_works(self):
        blocks = nn.ModuleDict({"blocks": nn.Sequential(nn.Sequential(nn.Linear(4, 4)))})
        model = adapters("a", "b", base=blocks, targets=["0.0"], task_type=None)
        with pytest.raises(ValueError, match="Cannot tell the hidden size of ModuleDict.*Use router scope 'layer'"):
            model.base_model.attach_router(RouterConfig(scope="block"))


class TestEncoderDecoder:
    def model(self):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        )  # fmt: skip
        return adapters(
            "a", "b", "c", base=T5ForConditionalGeneration(config), targets=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM"
        )

    @pytest.mark.parametrize("scope", ["layer", "block"])
    @torch.no_grad()
    def test_generate_gives_the_same_tokens_with_and_without_the_cache(self, scope):
        model = self.model()
        model.attach_router(RouterConfig(scope=scope, top_k=2))
        spread_gates(model)
        ids = tokens(2, 7)
        cached, uncached = (
            model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert cached.tolist() == uncached.tolist()

    @pytest.mark.parametrize("scope", ["layer", "block"])
    def test_router_and_experts_of_both_halves_get_gradients(self, scope):
        model = self.model()
        router = model.attach_router(RouterConfig(scope=scope))
        spread_gates(model)
        model.train()
        model(input_ids=tokens(2, 7), labels=tokens(2, 5)).loss.backward()
        assert any("encoder" in key for key in router.gates) and any("decoder" in key for key in router.gates)
        assert all(gate.weight.grad.any() for gate in router.gates.values())

    @pytest.mark.parametrize("scope", ["layer", "block"])
    @pytest.mark.parametrize("target_length", [5, 7], ids=["other_length", "same_length"])
    def test_padding_of_either_half_is_not_counted(self, scope, target_length):
        model = self.model()
        model.attach_router(RouterConfig(scope=scope))
        spread_gates(model)
        mask, decoder_mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, target_length, dtype=torch.long)
        mask[1, 4:] = 0
        decoder_mask[0, 2:] = 0
        with torch.no_grad():
            model(
                input_ids=tokens(2, 7),
                attention_mask=mask,
                decoder_input_ids=tokens(2, target_length),
                decoder_attention_mask=decoder_mask,
            )
        for site, measured in model.routing_summary().items():
            reads_encoder = site.startswith("encoder") or site.endswith("EncDecAttention.v")
            assert measured["tokens"] == (11 if reads_encoder else target_length + 2), site

    @pytest.mark.parametrize("scope", ["layer", "block"])
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
    def test_checkpointed_gradients_are_those_without(self, scope, use_reentrant):
        model = self.model()
        model.attach_router(RouterConfig(scope=scope, balance_coef=0.5, z_coef=0.1, entropy_coef=0.2))
        spread_gates(model)
        model.train()
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, 4:] = 0
        labels = tokens(2, 7, seed=8)
        labels[0, 5:] = -100

        def gradients():
            model.zero_grad()
            loss = model(input_ids=tokens(2, 7), attention_mask=mask, labels=labels).loss
            loss.backward()
            return loss.detach(), trainable_gradients(model)

        plain = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        torch.testing.assert_close(gradients(), plain, rtol=0, atol=1e-5)

    def test_decoder_tokens_without_a_label_are_not_counted(self):
        model = self.model()
        model.attach_router(RouterConfig())
        labels = tokens(2, 5)
        labels[0, 3:] = -100
        with torch.no_grad():
            model(input_ids=tokens(2, 7), labels=labels)
        assert model.routing_summary()["decoder.block.0.layer.0.SelfAttention.q"]["tokens"] == 8

    @pytest.mark.parametrize("scope", ["model", "two_pass"])
    def test_scopes_that_need_one_stack_are_refused(self, scope):
        with pytest.raises(ValueError, match="needs one stack of blocks, but T5ForConditionalGeneration"):
            self.model().attach_router(RouterConfig(scope=scope))


class TestHeadAndEmbeddings:
    TARGETS = ["embed_tokens", "q_proj", "lm_head"]

    @every_scope
    @torch.no_grad()
    def test_generate_gives_the_tokens_of_the_full_forward(self, scope):
        model = adapters("a", "b", "c", targets=self.TARGETS)
        model.attach_router(RouterConfig(scope=scope, top_k=2))
        spread_gates(model)
        ids = tokens(2, 5)
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [2]}
        generated = model.generate(input_ids=ids, use_cache=scope != "two_pass", **options)
        logits = model(input_ids=generated).logits
        logits[..., 2] = -float("inf")
        assert logits[:, 4:-1].argmax(-1).tolist() == generated[:, 5:].tolist()

    @every_scope
    @pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 2])], ids=["last", "last_three", "by_index"])
    @torch.no_grad()
    def test_logits_to_keep_gives_those_of_the_full_forward(self, scope, kept):
        model = adapters("a", "b", "c", targets=self.TARGETS)
        model.attach_router(RouterConfig(scope=scope, top_k=2))
        spread_gates(model)
        ids = tokens(2, 5)
        full = model(input_ids=ids).logits
        expected = full[:, -kept:] if isinstance(kept, int) else full[:, kept]
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=kept).logits, expected, **TOLERANCE["llama"])

    def test_padding_is_not_counted_at_the_head_when_logits_are_kept(self):
        model = adapters("a", "b", "c", targets=self.TARGETS)
        model.attach_router(RouterConfig())
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[0, :3] = 0
        with torch.no_grad():
            model(input_ids=tokens(2, 5), attention_mask=mask, logits_to_keep=4)
        assert model.routing_summary()["lm_head"]["tokens"] == 6

    @torch.no_grad()
    def test_an_embedding_is_gated_on_what_the_base_looks_up(self):
        model = adapters("a", "b", "c", targets=["embed_tokens"])
        model.attach_router(RouterConfig())
        spread_gates(model)
        ids = tokens(2, 5)
        with model.record_routing() as recorded:
            model(input_ids=ids)
        embedding = model.base_model.model.model.embed_tokens
        gate = model.base_model.moe_router.gates["model/embed_tokens"]
        expected = torch.softmax(gate(embedding.base_layer(ids)), dim=-1)
        torch.testing.assert_close(recorded["model.embed_tokens"][0], expected)


class TestBackbone:
    """A base model without a head: `AutoModel`, as for embeddings."""

    @every_scope
    @torch.no_grad()
    def test_a_backbone_gives_the_hidden_states_it_gives_under_its_head(self, scope):
        whole = adapters("a", "b", "c")
        whole.attach_router(RouterConfig(scope=scope, top_k=2))
        spread_gates(whole)
        backbone = tiny_base("llama").model
        assert isinstance(backbone, LlamaModel)
        model = adapters("a", "b", "c", base=backbone, task_type="FEATURE_EXTRACTION")
        model.attach_router(RouterConfig(scope=scope, top_k=2))
        spread_gates(model)
        for (_, parameter), (_, other) in zip(lora_parameters(model), lora_parameters(whole)):
            parameter.copy_(other)
        ids = tokens(2, 6)
        expected = whole(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model(input_ids=ids).last_hidden_state, expected, **TOLERANCE["llama"])

    def test_calling_the_backbone_of_a_routed_model_is_routed(self):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(scope="block", top_k=2))
        spread_gates(model)
        ids = tokens(2, 6)
        with torch.no_grad():
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            got = model.base_model.model.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(got, expected)
        assert model.routing_summary()["model.layers.0"]["tokens"] == 12


def lora_parameters(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if "lora_" in name]


class TestAttaching:
    def test_the_router_is_a_submodule_that_optimizers_see(self):
        model = adapters("a", "b")
        router = model.attach_router(RouterConfig())
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert sum("moe_router" in name for name in names) == len(router.gates)

    def test_attaching_keeps_what_trains(self):
        model = adapters("a", "b")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A.a" in name)
        model.attach_router(RouterConfig(), experts=["a", "b"])
        trains = {name for name, p in model.named_parameters() if p.requires_grad and "moe_router" not in name}
        assert trains and all("lora_A.a" in name for name in trains)

    def test_attaching_activates_the_experts(self):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(), experts=["c", "a"])
        assert model.base_model.active_adapters == ["c", "a"]

    def test_experts_are_mixed_by_the_routers_columns(self):
        model = adapters("a", "b", "c")
        router = model.attach_router(RouterConfig(), experts=["c", "a"])
        with torch.no_grad():
            for gate in router.gates.values():
                gate.weight.zero_()
        ids = tokens(2, 5)
        with torch.no_grad():
            routed = model(input_ids=ids).logits
            explicit = model(input_ids=ids, routing_weights=torch.tensor([0.5, 0.5])).logits
        torch.testing.assert_close(routed, explicit)

    @torch.no_grad()
    def test_explicit_weights_override_the_attached_router(self):
        model = adapters("a", "b", "c")
        ids = tokens(2, 5)
        weights = torch.tensor([0.2, 0.5, 0.3])
        expected = model(input_ids=ids, routing_weights=weights).logits
        for scope in SCOPES:
            model.attach_router(RouterConfig(scope=scope))
            spread_gates(model)
            assert torch.equal(model(input_ids=ids, routing_weights=weights).logits, expected)
            assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
            model.detach_router()

    @pytest.mark.parametrize(
        "where", [{"scope": "model", "block": 0}, {"scope": "two_pass"}], ids=["model", "two_pass"]
    )
    @torch.no_grad()
    def test_routed_logits_are_those_of_the_recorded_weights_given_explicitly(self, where):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(**where))
        spread_gates(model)
        ids = tokens(2, 5)
        with model.record_routing() as recorded:
            routed = model(input_ids=ids).logits
        explicit = model(input_ids=ids, routing_weights=recorded["model"][0]).logits
        torch.testing.assert_close(routed, explicit)

    @torch.no_grad()
    def test_detaching_gives_plain_adapters_back(self):
        model = adapters("a", "b")
        ids = tokens(2, 5)
        before, names = model(input_ids=ids).logits, set(model.state_dict())
        model.attach_router(RouterConfig())
        spread_gates(model)
        assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-3)
        model.detach_router()
        assert torch.equal(model(input_ids=ids).logits, before)
        assert set(model.state_dict()) == names

    @torch.no_grad()
    def test_a_single_active_adapter_runs_as_plain_lora(self):
        model = adapters("a", "b", "c")
        model.base_model.set_adapter("b")
        expected = model(input_ids=tokens(2, 5)).logits
        for scope in SCOPES:
            model.attach_router(RouterConfig(scope=scope), experts=["a", "b", "c"])
            model.base_model.set_adapter("b")
            assert torch.equal(model(input_ids=tokens(2, 5)).logits, expected)
            model.detach_router()

    @every_scope
    @torch.no_grad()
    def test_disabled_adapters_leave_the_base_model(self, scope):
        model = adapters("a", "b", "c")
        expected = tiny_base("llama")(input_ids=tokens(2, 5)).logits
        model.attach_router(RouterConfig(scope=scope))
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens(2, 5)).logits, expected)

    @every_scope
    def test_only_some_experts_active_is_refused(self, scope):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(scope=scope))
        model.base_model.set_adapter(["a", "b"])
        with pytest.raises(ValueError, match=r"mixes \['a', 'b', 'c'\] but the active adapters are \['a', 'b'\]"):
            model(input_ids=tokens(1, 4))

    def test_a_second_router_is_refused(self):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        with pytest.raises(ValueError, match="already attached. Call detach_router"):
            model.attach_router(RouterConfig())

    def test_an_unknown_expert_is_refused(self):
        with pytest.raises(ValueError, match=r"Unknown experts \['x'\]; this model holds the adapters \['a', 'b'\]"):
            adapters("a", "b").attach_router(RouterConfig(), experts=["a", "x"])

    def test_an_expert_named_twice_is_refused(self):
        with pytest.raises(ValueError, match="Each expert can be mixed once"):
            adapters("a", "b").attach_router(RouterConfig(), experts=["a", "a"])

    def test_detaching_without_a_router_is_refused(self):
        with pytest.raises(ValueError, match="No router is attached"):
            adapters("a", "b").detach_router()

    def test_a_dora_adapter_is_refused(self):
        with pytest.raises(ValueError, match="uses the LoRA variant Dora"):
            adapters("a", "b", use_dora=True).attach_router(RouterConfig())

    def test_deleting_an_expert_of_an_attached_router_is_refused(self):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        with pytest.raises(ValueError, match="'a' is an expert of the attached router. Call detach_router"):
            model.delete_adapter("a")

    def test_an_adapter_that_is_no_expert_can_be_deleted_under_a_router(self):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(), experts=["a", "b"])
        expected = model(input_ids=tokens(1, 4)).logits
        model.delete_adapter("c")
        assert torch.equal(model(input_ids=tokens(1, 4)).logits, expected)

    def test_mixed_batches_under_a_router_are_refused(self):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        with pytest.raises(ValueError, match="adapter_names cannot be combined"):
            model(input_ids=tokens(2, 4), adapter_names=["a", "b"])

    def test_merging_under_a_router_is_refused(self):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match="routed model cannot be merged.*freeze_routing"):
                merge()

    @torch.no_grad()
    def test_attaching_unmerges_the_adapters(self):
        routed, unmerged = adapters("a", "b"), adapters("a", "b")
        routed.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging"):
            routed.attach_router(RouterConfig())
        unmerged.attach_router(RouterConfig())
        for model in (routed, unmerged):
            spread_gates(model)
        ids = tokens(2, 5)
        torch.testing.assert_close(routed(input_ids=ids).logits, unmerged(input_ids=ids).logits, **TOLERANCE["llama"])

    def test_a_layer_that_lacks_an_expert_skips_its_column(self):
        model = adapters("a", targets=["q_proj", "v_proj"])
        model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.attach_router(RouterConfig(scope="model", block=0), experts=["a", "b"])
        spread_gates(model)
        ids = tokens(2, 5)
        with torch.no_grad(), model.record_routing() as recorded:
            routed = model(input_ids=ids).logits
            explicit = model(input_ids=ids, routing_weights=recorded["model"][0]).logits
        torch.testing.assert_close(routed, explicit)

    def test_an_adapter_added_later_does_not_disturb_the_router(self):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        spread_gates(model)
        ids = tokens(2, 5)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            model.add_adapter("later", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
            assert torch.equal(model(input_ids=ids).logits, expected)


class SharedGate(nn.Module):
    def __init__(self, num_experts):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, num_experts))

    def forward(self, hidden_states):
        return self.net(hidden_states)


def gate_per_site(site, num_experts):
    return nn.Linear(site.in_features, num_experts)


class TestCustomGates:
    @every_scope
    def test_one_module_can_serve_all_sites(self, scope):
        model = adapters("a", "b", "c", targets=["q_proj", "v_proj"])
        torch.manual_seed(4)
        gate = SharedGate(3)
        model.attach_router(gate, config=RouterConfig(scope=scope))
        model.train()
        ids = tokens(2, 5)
        with model.record_routing() as recorded:
            model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad.any() for parameter in gate.parameters())
        if scope == "block":
            embedded = model.base_model.model.model.embed_tokens(ids)
            torch.testing.assert_close(recorded["model.layers.0"][0], torch.softmax(gate(embedded), -1))

    def test_a_module_that_serves_all_sites_is_counted_once(self):
        model = adapters("a", "b", "c", targets=["q_proj", "v_proj"])
        gate = SharedGate(3)
        router = model.attach_router(gate)
        assert len(list(router.parameters())) == len(list(gate.parameters()))

    def test_a_function_makes_a_gate_for_each_site(self):
        model = adapters("a", "b", "c")
        router = model.attach_router(gate_per_site, config=RouterConfig(top_k=1))
        assert router.gates["model/layers/0/mlp/down_proj"].in_features == 48
        with torch.no_grad(), model.record_routing() as recorded:
            model(input_ids=tokens(2, 5))
        assert all(((weights[0] > 0).sum(-1) == 1).all() for weights in recorded.values())

    @pytest.mark.parametrize("option", [{"jitter": 0.1}, {"init": "zeros"}, {"init": "experts"}], ids=str)
    def test_options_of_the_librarys_own_gates_are_refused_beside_a_custom_one(self, option):
        model = adapters("a", "b", "c")
        with pytest.raises(ValueError, match=rf"{next(iter(option))}=.*are for this library's own gates"):
            model.attach_router(SharedGate(3), config=RouterConfig(**option))
        assert not hasattr(model.base_model, "moe_router")

    def test_two_configs_are_refused(self):
        with pytest.raises(ValueError, match="Two RouterConfigs were passed. Pass one"):
            adapters("a", "b").attach_router(RouterConfig(top_k=1), config=RouterConfig())

    def test_a_gate_of_the_wrong_width_names_both_counts(self):
        model = adapters("a", "b", "c", targets=["q_proj"])
        model.attach_router(SharedGate(2))
        with pytest.raises(ValueError, match=r"scores 2 experts but the router mixes 3 \(\['a', 'b', 'c'\]\)"):
            model(input_ids=tokens(1, 4))

    @torch.no_grad()
    def test_a_saved_custom_router_loads_with_its_gate(self, tmp_path):
        model = adapters("a", "b", "c", targets=["q_proj", "v_proj"])
        torch.manual_seed(4)
        model.attach_router(SharedGate(3), config=RouterConfig(scope="block"))
        expected = model(input_ids=tokens(2, 5)).logits
        model.save_router(tmp_path)
        model.detach_router()
        model.load_router(tmp_path, gate=SharedGate(3))
        assert torch.equal(model(input_ids=tokens(2, 5)).logits, expected)


class TestSavedRouters:
    @every_scope
    @torch.no_grad()
    def test_save_pretrained_keeps_the_router_beside_the_adapters(self, scope, tmp_path):
        tiny_base("llama").save_pretrained(tmp_path / "base")
        model = adapters("a", "b", base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        model.attach_router(RouterConfig(scope=scope, top_k=1, temperature=2.0))
        spread_gates(model)
        ids = tokens(2, 5)
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "out")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "a", adapter_name="a")
        loaded.load_adapter(tmp_path / "out" / "b", "b")
        router = loaded.load_router(tmp_path / "out")
        assert (router.config.scope, router.config.top_k, router.config.temperature) == (scope, 1, 2.0)
        assert torch.equal(loaded(input_ids=ids).logits, expected)

    @torch.no_grad()
    @pytest.mark.parametrize("gate", [None, SharedGate(2)], ids=["own gates", "one module for all sites"])
    def test_a_state_dict_gathered_from_shards_is_saved_instead_of_the_shards(self, gate, tmp_path):
        """As the Trainer passes it under FSDP, where no process holds a whole parameter."""
        model = adapters("a", "b")
        router = model.attach_router(gate, config=RouterConfig(scope="block"))
        gathered = {key: torch.full_like(value, 0.25) for key, value in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=gathered)
        model.detach_router()
        loaded = model.load_router(tmp_path, gate=gate)
        assert list(loaded.state_dict()) == list(router.state_dict())
        assert all((parameter == 0.25).all() for parameter in loaded.parameters())

    def test_a_state_dict_without_the_router_does_not_leave_it_out(self, tmp_path):
        model = adapters("a", "b")
        router = model.attach_router(RouterConfig(scope="block"))
        model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "lora_" in k})
        saved = load_file(tmp_path / "router_model.safetensors")
        assert saved.keys() == router.state_dict().keys()

    def test_a_saved_adapter_does_not_hold_the_router(self, tmp_path):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        model.save_pretrained(tmp_path)
        assert not any("moe_router" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))

    @torch.no_grad()
    def test_a_router_initialised_from_experts_loads_with_its_sign_free_scores(self, tmp_path):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(init="experts"))
        expected = model(input_ids=tokens(2, 5)).logits
        model.save_router(tmp_path)
        model.detach_router()
        router = model.load_router(tmp_path)
        assert router.config.init == "experts"
        assert torch.equal(model(input_ids=tokens(2, 5)).logits, expected)

    def test_saving_without_a_router_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="No router is attached, so there is none to save"):
            adapters("a", "b").save_router(tmp_path)

    def test_a_folder_without_a_router_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="holds no router_config.json; pass a folder that save_router wrote"):
            adapters("a", "b").load_router(tmp_path)

    def test_a_config_without_its_weights_is_refused_and_leaves_no_router(self, tmp_path):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        model.save_router(tmp_path)
        (tmp_path / "router_model.safetensors").unlink()
        model.detach_router()
        with pytest.raises(ValueError, match="holds no router_model.safetensors"):
            model.load_router(tmp_path)
        model.attach_router(RouterConfig())

    def test_a_truncated_file_is_refused_and_leaves_no_router(self, tmp_path):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        model.save_router(tmp_path)
        file = tmp_path / "router_model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        model.detach_router()
        with pytest.raises(ValueError, match="its file is damaged"):
            model.load_router(tmp_path)
        model.attach_router(RouterConfig())

    @pytest.mark.parametrize("text", ["", '{"router": {}}', '{"router": {"newer": 1}, "expert_names": ["a", "b"]}'])
    def test_a_damaged_config_is_refused_and_leaves_no_router(self, tmp_path, text):
        model = adapters("a", "b")
        model.attach_router(RouterConfig())
        model.save_router(tmp_path)
        (tmp_path / "router_config.json").write_text(text)
        model.detach_router()
        with pytest.raises(ValueError, match="router_config.json in .* is damaged, or was written by another version"):
            model.load_router(tmp_path)
        model.attach_router(RouterConfig())

    def test_weights_of_other_layers_are_refused_and_leave_no_router(self, tmp_path):
        model = adapters("a", "b", targets=["q_proj"])
        model.attach_router(RouterConfig())
        model.save_router(tmp_path)
        other = adapters("a", "b", targets=["v_proj"])
        with pytest.raises(ValueError, match=r"(?s)does not fit these adapters.*q_proj"):
            other.load_router(tmp_path)
        other.attach_router(RouterConfig())

    def test_a_router_of_adapters_that_are_not_loaded_is_refused(self, tmp_path):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig())
        model.save_router(tmp_path)
        with pytest.raises(ValueError, match=r"Unknown experts \['c'\]"):
            adapters("a", "b").load_router(tmp_path)

    def test_the_config_file_names_the_experts_in_the_order_of_the_columns(self, tmp_path):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(), experts=["c", "a"])
        model.save_router(tmp_path)
        assert json.loads((tmp_path / "router_config.json").read_text())["expert_names"] == ["c", "a"]


class TestTwoPass:
    @torch.no_grad()
    def test_the_gate_looks_at_the_last_hidden_state_of_the_base_model(self):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(scope="two_pass"))
        spread_gates(model)
        ids = tokens(2, 6)
        with model.record_routing() as recorded:
            model(input_ids=ids)
        hidden = tiny_base("llama").model(input_ids=ids).last_hidden_state
        expected = torch.softmax(model.base_model.moe_router.gates["model"](hidden), dim=-1)
        torch.testing.assert_close(recorded["model"][0], expected)

    def test_the_first_pass_leaves_the_adapters_enabled_when_it_fails(self):
        model = adapters("a", "b", "c")
        model.attach_router(RouterConfig(scope="two_pass"))
        spread_gates(model)
        ids = tokens(2, 6)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            assert not torch.equal(expected, tiny_base("llama")(input_ids=ids).logits)
            handle = model.base_model.model.model.norm.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="made to fail"):
                model(input_ids=ids)
            handle.remove()
            assert torch.equal(model(input_ids=ids).logits, expected)


def fail(*_):
    raise RuntimeError("made to fail")
