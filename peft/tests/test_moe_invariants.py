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
"""What holds for every router: causality, cache, padding, gradient checkpointing, saving, compiling, renaming."""

import copy
import random

import pytest
import torch
from moe_testing import (
    FAMILIES,
    PAD,
    SCOPES,
    TOLERANCE,
    count_hooks,
    spread_gates,
    tiny_base,
    tiny_mixture,
    tokens,
    trainable_gradients,
)

from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.moe_router import RouterConfig


ONE_PASS = tuple(scope for scope in SCOPES if scope != "two_pass")
ALL_LOSSES = {"router_balance_coef": 0.5, "router_z_coef": 0.1, "router_entropy_coef": 0.2}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_scope = pytest.mark.parametrize("scope", SCOPES)
one_pass_scopes = pytest.mark.parametrize("scope", ONE_PASS)


def left_padded_positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.fixture(params=[(family, scope) for family in FAMILIES for scope in SCOPES], ids="-".join)
def routed(request):
    family, scope = request.param
    return family, scope, tiny_mixture(family, scope, top_k=2, **ALL_LOSSES)


class TestCausality:
    @torch.no_grad()
    def test_changing_a_token_changes_no_logit_before_it(self, routed):
        family, _, model = routed
        ids = tokens(2, 9)
        changed = ids.clone()
        changed[:, 5] = (changed[:, 5] - 3 + 7) % 61 + 3
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
        torch.testing.assert_close(after[:, :5], before[:, :5], **TOLERANCE[family])
        assert not torch.allclose(after[:, 5:], before[:, 5:], atol=1e-3)

    @torch.no_grad()
    def test_changing_a_token_changes_no_weight_before_it(self, routed):
        family, _, model = routed
        ids = tokens(2, 9)
        changed = ids.clone()
        changed[:, 5] = (changed[:, 5] - 3 + 7) % 61 + 3
        with model.record_routing() as before:
            model(input_ids=ids)
        with model.record_routing() as after:
            model(input_ids=changed)
        for site in before:
            torch.testing.assert_close(after[site][0][:, :5], before[site][0][:, :5], **TOLERANCE[family])
        assert any(not torch.allclose(after[site][0][:, 5], before[site][0][:, 5], atol=1e-2) for site in before)


class TestCache:
    @every_family
    @one_pass_scopes
    @torch.no_grad()
    def test_generate_gives_the_same_tokens_with_and_without_the_cache(self, family, scope):
        model = tiny_mixture(family, scope, top_k=2)
        ids = tokens(2, 6)
        cached = model.generate(input_ids=ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, use_cache=True)
        uncached = model.generate(
            input_ids=ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, use_cache=False
        )
        assert cached.tolist() == uncached.tolist()

    @every_family
    @one_pass_scopes
    @torch.no_grad()
    def test_prefill_and_decoding_give_the_logits_of_the_full_forward(self, family, scope):
        model = tiny_mixture(family, scope, top_k=2)
        ids = tokens(2, 9)
        full = model(input_ids=ids).logits
        output = model(input_ids=ids[:, :4], use_cache=True)
        steps = [output.logits]
        for t in range(4, 9):
            output = model(input_ids=ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), full, **TOLERANCE[family])

    @every_family
    @torch.no_grad()
    def test_a_two_pass_router_refuses_a_filled_cache(self, family):
        model = tiny_mixture(family, "two_pass")
        with pytest.raises(ValueError, match="two_pass router cannot use the KV cache.*use_cache=False"):
            model.generate(input_ids=tokens(1, 4), max_new_tokens=3, do_sample=False, use_cache=True)

    @every_family
    @torch.no_grad()
    def test_a_two_pass_router_generates_without_the_cache_what_its_full_forward_says(self, family):
        model = tiny_mixture(family, "two_pass", top_k=2)
        ids = tokens(1, 4)
        generated = model.generate(
            input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False, suppress_tokens=[2]
        )
        logits = model(input_ids=generated).logits
        logits[..., 2] = -float("inf")
        assert logits[0, 3:-1].argmax(-1).tolist() == generated[0, 4:].tolist()


class TestPadding:
    @pytest.fixture(params=["left", "right"])
    def padded(self, request):
        """Sequences of 9 and 6 tokens, padded to a length of 9, and the same with 3 more tokens of padding."""
        ids = tokens(2, 9)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        if request.param == "left":
            mask[1] = mask[1].flip(0)
        ids[mask == 0] = PAD
        wide_ids, wide_mask = (torch.zeros(2, 12, dtype=torch.long) for _ in range(2))
        where = slice(3, None) if request.param == "left" else slice(0, 9)
        wide_ids[:, where], wide_mask[:, where] = ids, mask
        wide_ids[wide_mask == 0] = tokens(2, 12, seed=8)[wide_mask == 0]  # what stands in the padding is no matter
        return (ids, mask), (wide_ids, wide_mask)

    def forward(self, model, ids, mask):
        # A first token is predicted from nothing, or from padding if there is some on its left: leave it out.
        labels = ids.masked_fill((mask == 0) | (mask.cumsum(-1) == 1), -100)
        return model(input_ids=ids, attention_mask=mask, position_ids=left_padded_positions(mask), labels=labels)

    def test_padding_changes_no_logit_of_a_real_token(self, routed, padded):
        family, _, model = routed
        ids, mask = padded[1]
        with torch.no_grad():
            batch = self.forward(model, ids, mask).logits
            for row in range(2):
                alone = model(input_ids=ids[row][mask[row] == 1][None]).logits[0]
                torch.testing.assert_close(batch[row][mask[row] == 1], alone, **TOLERANCE[family])

    def test_padding_changes_no_loss(self, routed, padded):
        family, _, model = routed
        model.train()
        narrow, wide = (self.forward(model, *batch) for batch in padded)
        torch.testing.assert_close(wide.loss, narrow.loss, rtol=1e-6, atol=0)  # float32 cross-entropy for any dtype
        for name in ("router_balance_loss", "router_z_loss", "router_entropy"):
            torch.testing.assert_close(wide[name], narrow[name], **TOLERANCE[family])

    def test_padding_changes_no_gradient(self, routed, padded):
        family, _, model = routed
        model.train()
        gradients = []
        for batch in padded:
            model.zero_grad()
            self.forward(model, *batch).loss.backward()
            gradients.append(trainable_gradients(model))
        # transformers computes the cross-entropy, and so its gradient, in float32 for any dtype of the model
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5 if family != "gpt2" else 1e-6)

    def test_padding_is_not_counted_in_the_summary(self, routed, padded):
        _, _, model = routed
        summaries = []
        for batch in padded:
            with torch.no_grad():
                self.forward(model, *batch)
            summaries.append(model.routing_summary())
        narrow, wide = summaries
        assert narrow.keys() == wide.keys()
        for site, measured in narrow.items():
            assert measured["tokens"] == wide[site]["tokens"] == 15
            for name in ("usage", "probability"):
                for expert, share in measured[name].items():
                    assert wide[site][name][expert] == pytest.approx(share, abs=1e-5)
            assert wide[site]["entropy"] == pytest.approx(measured["entropy"], abs=1e-5)
            assert wide[site]["balance"] == pytest.approx(measured["balance"], abs=1e-5)


class TestGradientCheckpointing:
    def run(self, model, **inputs):
        model.zero_grad()
        ids = tokens(2, 9)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        output = model(input_ids=ids, attention_mask=mask, labels=labels, **inputs)
        output.loss.backward()
        losses = {name: output[name].detach() for name in output if name == "loss" or name.startswith("router_")}
        return losses, trainable_gradients(model)

    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
    def test_losses_and_gradients_are_those_without_checkpointing(self, routed, use_reentrant):
        family, _, model = routed
        model.train()
        losses, gradients = self.run(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        checkpointed_losses, checkpointed_gradients = self.run(model)
        assert any("moe_router" in name for name in gradients)
        torch.testing.assert_close(checkpointed_losses, losses, **TOLERANCE[family])
        torch.testing.assert_close(checkpointed_gradients, gradients, **TOLERANCE[family])

    @every_scope
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
    def test_gates_inside_of_the_checkpoint_give_the_same_gradients(self, scope, use_reentrant):
        """As in older releases of transformers, which checkpoint a block together with its hooks."""
        model = tiny_mixture("llama", scope, top_k=2, **ALL_LOSSES).train()
        losses, gradients = self.run(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        for block in model.base_model.model.model.layers:
            block.__class__ = checkpointed_with_its_hooks(type(block))
        checkpointed_losses, checkpointed_gradients = self.run(model)
        torch.testing.assert_close(checkpointed_losses, losses, **TOLERANCE["llama"])
        torch.testing.assert_close(checkpointed_gradients, gradients, **TOLERANCE["llama"])

    @every_scope
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
    def test_no_token_is_counted_twice(self, scope, use_reentrant):
        model = tiny_mixture("llama", scope, top_k=2, **ALL_LOSSES).train()
        self.run(model)
        summary = model.routing_summary()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        self.run(model)
        checkpointed = model.routing_summary()
        assert checkpointed.keys() == summary.keys()
        for site in summary:
            assert checkpointed[site]["tokens"] == 15
            assert checkpointed[site]["usage"] == pytest.approx(summary[site]["usage"], abs=1e-6)

    @every_scope
    @pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
    def test_jitter_and_dropout_are_replayed(self, scope, use_reentrant):
        model = tiny_mixture("llama", scope, router_jitter=0.3, lora_dropout=0.2, **ALL_LOSSES).train()
        torch.manual_seed(11)
        losses, gradients = self.run(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        torch.manual_seed(11)
        checkpointed_losses, checkpointed_gradients = self.run(model)
        torch.testing.assert_close(checkpointed_losses, losses, **TOLERANCE["llama"])
        torch.testing.assert_close(checkpointed_gradients, gradients, **TOLERANCE["llama"])

    @every_scope
    def test_weights_are_recorded_once(self, scope):
        model = tiny_mixture("llama", scope).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        with model.record_routing() as recorded:
            self.run(model)
        assert recorded and all(len(weights) == 1 for weights in recorded.values())

    def test_detaching_gives_the_model_its_own_checkpointing_function_back(self):
        model = tiny_mixture("llama").train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        block = model.base_model.model.model.layers[0]
        own = block._gradient_checkpointing_func
        self.run(model)
        assert block._gradient_checkpointing_func is not own
        model.detach_router()
        assert block._gradient_checkpointing_func is own


def checkpointed_with_its_hooks(block_class):
    class Block(block_class):
        def __call__(self, *args, **kwargs):
            def run(*args):
                self.gradient_checkpointing = False
                try:
                    return super(Block, self).__call__(*args, **kwargs)
                finally:
                    self.gradient_checkpointing = True

            return self._gradient_checkpointing_func(run, *args)

    return Block


class TestSaveAndLoad:
    @pytest.fixture
    def saved_base(self, tmp_path):
        def save(family):
            tiny_base(family).save_pretrained(tmp_path / "base")
            return tiny_base_class(family).from_pretrained(tmp_path / "base", dtype="auto")

        return save

    @torch.no_grad()
    @every_family
    @every_scope
    def test_logits_are_bit_equal_after_loading_from_the_config_alone(self, family, scope, saved_base, tmp_path):
        model = tiny_mixture(family, scope, base=saved_base(family), top_k=2)
        logits = model(input_ids=tokens(2, 9)).logits
        model.save_pretrained(tmp_path / "mixture")
        loaded = load(family, tmp_path / "mixture")
        assert torch.equal(loaded(input_ids=tokens(2, 9)).logits, logits)

    @torch.no_grad()
    @every_family
    @every_scope
    def test_logits_are_bit_equal_after_adding_and_deleting_experts(self, family, scope, saved_base, tmp_path):
        model = tiny_mixture(family, scope, base=saved_base(family), top_k=2)
        model.add_expert("newcomer", r=2)
        model.delete_expert("expert_1")
        spread_gates(model)
        model.eval()
        if family == "gpt2":
            model.double()
        logits = model(input_ids=tokens(2, 9)).logits
        model.save_pretrained(tmp_path / "mixture")
        loaded = load(family, tmp_path / "mixture")
        assert loaded.base_model.moe_router.expert_names == ["expert_0", "expert_2", "newcomer"]
        assert torch.equal(loaded(input_ids=tokens(2, 9)).logits, logits)

    @torch.no_grad()
    @every_scope
    def test_logits_are_bit_equal_when_loaded_with_low_cpu_mem_usage(self, scope, saved_base, tmp_path):
        model = tiny_mixture("llama", scope, base=saved_base("llama"), top_k=2)
        logits = model(input_ids=tokens(2, 9)).logits
        model.save_pretrained(tmp_path / "mixture")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture", low_cpu_mem_usage=True)
        assert torch.equal(loaded(input_ids=tokens(2, 9)).logits, logits)

    @torch.no_grad()
    @every_scope
    def test_logits_are_bit_equal_under_another_adapter_name(self, scope, saved_base, tmp_path):
        model = tiny_mixture("llama", scope, base=saved_base("llama"), top_k=2)
        logits = model(input_ids=tokens(2, 9)).logits
        model.save_pretrained(tmp_path / "mixture")
        base = tiny_base_class("llama").from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, tmp_path / "mixture", adapter_name="other")
        assert loaded.active_adapter == "other"
        assert torch.equal(loaded(input_ids=tokens(2, 9)).logits, logits)


def tiny_base_class(family):
    return type(tiny_base(family))


def load(family, folder):
    dtype = torch.float64 if family == "gpt2" else torch.float32
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.double().eval() if family == "gpt2" else model.eval()


class TestCompile:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("selection", [{}, {"top_k": 2}, {"top_p": 0.7}], ids=["dense", "top_k", "top_p"])
    def test_a_layer_with_its_own_gate_compiles_without_a_graph_break(self, training, selection):
        model = tiny_mixture("llama", "layer", **selection).train(training)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        expected, actual = layer(x), compiled(x)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        if training:
            wanted = torch.autograd.grad(expected.square().sum(), [x, *trainable(model, layer)], allow_unused=True)
            got = torch.autograd.grad(actual.square().sum(), [x, *trainable(model, layer)], allow_unused=True)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_a_compiled_layer_follows_its_gate(self):
        model = tiny_mixture("llama", "layer", top_k=2)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        before = compiled(x)
        spread_gates(model, seed=99)
        assert not torch.allclose(compiled(x), before, atol=1e-3)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("scope", ["layer", "block", "model"])
    def test_a_whole_model_compiles_without_a_graph_break(self, scope, training):
        model = tiny_mixture("llama", scope, top_k=2).train(training)
        ids = tokens(2, 7)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, actual = model(input_ids=ids, labels=ids), compiled(input_ids=ids, labels=ids)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-6)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        wanted, got = (torch.autograd.grad(output.loss, trained) for output in (expected, actual))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)  # float32, fused in another order

    @pytest.mark.slow
    @torch.no_grad()
    def test_a_layer_with_its_own_gate_compiles_with_inductor(self):
        model = tiny_mixture("llama", "layer", top_k=2)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)


def trainable(model, layer):
    gate = next(iter(model.base_model.moe_router.gates.values()))
    return [parameter for parameter in (*layer.parameters(), *gate.parameters()) if parameter.requires_grad]


class TestNamesMeanNothing:
    @torch.no_grad()
    def test_permuting_experts_with_their_columns_changes_nothing(self, routed):
        family, scope, model = routed
        ids = tokens(2, 9)
        logits = model(input_ids=ids).logits
        for order in ([1, 2, 0], [2, 1, 0], [0, 2, 1]):
            permuted = tiny_mixture(family, scope, top_k=2, experts=[f"expert_{i}" for i in order])
            copy_by_expert_name(model, permuted)
            for gate, other in gate_pairs(model, permuted):
                other.weight.copy_(gate.weight[order])
            torch.testing.assert_close(permuted(input_ids=ids).logits, logits, **TOLERANCE[family])

    @torch.no_grad()
    def test_renaming_experts_changes_nothing(self, routed):
        family, scope, model = routed
        ids = tokens(2, 9)
        new_names = {"expert_0": "zeta", "expert_1": "expert_0", "expert_2": "alpha"}
        renamed = tiny_mixture(family, scope, top_k=2, experts=list(new_names.values()))
        copy_by_expert_name(model, renamed, new_names)
        for gate, other in gate_pairs(model, renamed):
            other.weight.copy_(gate.weight)
        assert torch.equal(renamed(input_ids=ids).logits, model(input_ids=ids).logits)

    @torch.no_grad()
    def test_the_order_of_the_active_adapters_changes_nothing(self, routed):
        family, _, model = routed
        ids = tokens(2, 9)
        logits = model(input_ids=ids).logits
        model.base_model.set_adapter(["expert_2", "expert_0", "expert_1"])
        torch.testing.assert_close(model(input_ids=ids).logits, logits, **TOLERANCE[family])


def gate_pairs(model, other):
    return zip(model.base_model.moe_router.gates.values(), other.base_model.moe_router.gates.values())


@torch.no_grad()
def copy_by_expert_name(source, target, names=None):
    """Give each expert of `target` the weights of the expert that it is named after."""
    names = names or {name: name for name in source.base_model.moe_router.expert_names}
    layers = {name: layer for name, layer in target.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in source.named_modules():
        if isinstance(layer, LoraLayer):
            for old, new in names.items():
                layers[name].lora_A[new].weight.copy_(layer.lora_A[old].weight)
                layers[name].lora_B[new].weight.copy_(layer.lora_B[old].weight)


class TestHooks:
    @every_scope
    def test_attaching_and_detaching_leaves_no_hook(self, scope):
        model = tiny_mixture("llama", scope)
        model.detach_router()
        before = count_hooks(model)
        model.attach_router(RouterConfig(scope=scope))
        assert count_hooks(model) > before
        model.detach_router()
        assert count_hooks(model) == before

    @every_scope
    def test_a_failed_forward_leaves_no_hook_or_state(self, scope):
        model = tiny_mixture("llama", scope)
        ids = tokens(2, 5)
        expected, hooks = model(input_ids=ids).logits, count_hooks(model)
        norm = model.base_model.model.model.norm
        handle = norm.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="made to fail"):
            model(input_ids=ids)
        handle.remove()
        context = model.base_model._routing_context()
        assert context.owner is None and len(context.frames) == 1 and not context.frame.weights
        assert count_hooks(model) == hooks
        assert torch.equal(model(input_ids=ids).logits, expected)

    @every_scope
    def test_unloading_leaves_the_base_model_without_hooks(self, scope):
        base = tiny_base("llama")
        before, logits = count_hooks(base), base(input_ids=tokens(2, 5)).logits
        model = tiny_mixture("llama", scope, base=base)
        unloaded = model.unload()
        assert count_hooks(unloaded) == before
        assert torch.equal(unloaded(input_ids=tokens(2, 5)).logits, logits)


def fail(*_):
    raise RuntimeError("made to fail")


class TestCopies:
    @every_scope
    @torch.no_grad()
    def test_a_deep_copy_gives_the_same_logits(self, scope):
        model = tiny_mixture("llama", scope, top_k=2)
        ids = tokens(2, 5)
        expected = model(input_ids=ids).logits
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, expected)

    @every_scope
    @torch.no_grad()
    def test_a_deep_copy_is_independent(self, scope):
        model = tiny_mixture("llama", scope, top_k=2)
        ids = tokens(2, 5)
        expected = model(input_ids=ids).logits
        copied = copy.deepcopy(model)
        spread_gates(copied, seed=99)
        assert not torch.allclose(copied(input_ids=ids).logits, expected, atol=1e-4)
        assert torch.equal(model(input_ids=ids).logits, expected)
        copied.detach_router()
        assert torch.equal(model(input_ids=ids).logits, expected)
        copied.base_model.set_adapter("expert_0")
        model.routing_summary()
        assert count_hooks(copied) < count_hooks(model)


class TestRandomShapes:
    @every_scope
    @torch.no_grad()
    def test_each_sequence_of_a_batch_is_routed_as_if_it_were_alone(self, scope):
        model = tiny_mixture("llama", scope, top_k=2)
        shapes = random.Random(0)
        for _ in range(5):
            batch, length = shapes.randint(1, 4), shapes.randint(1, 8)
            ids = tokens(batch, length, seed=batch * 10 + length)
            together = model(input_ids=ids).logits
            alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
            torch.testing.assert_close(together, alone, **TOLERANCE["llama"])
