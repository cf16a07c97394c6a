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
"""`routing_weights` of whole models: the exact oracles of PEFT itself, generation, training, and every refusal."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from moe_oracles import EXACT, EXPERTS, looped, random_weights, with_experts
from moe_stock_outputs import stock_outputs
from moe_testing import FAMILIES, PAD, TARGETS, TOLERANCE, VOCAB, count_hooks, tiny_base, tokens
from torch import nn
from transformers import GPT2ForSequenceClassification, GPT2Model, T5Config, T5ForConditionalGeneration

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.moe_router import RouterConfig
from peft.utils.hotswap import hotswap_adapter


# Strong enough that each expert speaks other tokens than the base model does.
STRONG = {name: {"r": 2, "lora_alpha": 32} for name in ("one", "two", "three")}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
# T5 normalises in float32; its activations here are of order ten.
T5_CLOSE = {"rtol": 1e-4, "atol": 1e-4}
every_family = pytest.mark.parametrize("family", FAMILIES)


def mixture(family="gpt2", experts=EXPERTS, **common):
    """Three experts of unequal rank on a tiny base model."""
    common = {"target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2", **common}
    return with_experts(tiny_base(family), experts, **common)


@pytest.fixture
def model():
    return mixture()


def one_hot(*columns, num_experts=3):
    return torch.nn.functional.one_hot(torch.tensor(columns), num_experts).double()


@contextmanager
def only_active(model, name):
    """Run one adapter alone, as stock PEFT does."""
    active = list(model.base_model.active_adapters)
    model.base_model.set_adapter(name)
    try:
        yield
    finally:
        model.base_model.set_adapter(active)


class TestOracles:
    """Invariant: the exact oracles that PEFT itself offers."""

    @every_family
    @torch.no_grad()
    def test_zero_weights_are_the_base_model_bit_for_bit(self, family):
        model, ids = mixture(family), tokens(2, 7)
        routed = model(ids, routing_weights=torch.zeros(2, 7, 3)).logits
        with model.disable_adapter():
            assert torch.equal(routed, model(ids).logits)

    @every_family
    @torch.no_grad()
    def test_one_hot_rows_are_a_mixed_batch_of_adapter_names(self, family):
        model, ids = mixture(family), tokens(4, 7)
        weights = torch.cat([one_hot(2, 0, 1), torch.zeros(1, 3)]).to(model.dtype)
        mixed = model(ids, adapter_names=["three", "one", "two", "__base__"]).logits
        torch.testing.assert_close(model(ids, routing_weights=weights).logits, mixed, **TOLERANCE[family])
        assert not torch.allclose(mixed[0], mixed[1])

    @every_family
    @torch.no_grad()
    def test_constant_weights_are_the_weighted_adapter_of_type_cat(self, family):
        # without rsLoRA, whose scaling add_weighted_adapter gets wrong in 0.21.2
        experts = {"one": EXPERTS["one"], "two": EXPERTS["two"]}
        model, ids = mixture(family, experts), tokens(2, 7)
        routed = model(ids, routing_weights=torch.tensor([0.7, 0.4], dtype=model.dtype)).logits
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "cat", combination_type="cat")
        model.set_adapter("cat")
        torch.testing.assert_close(routed, model(ids).logits, **TOLERANCE[family])

    @every_family
    @torch.no_grad()
    def test_weights_for_each_token_are_a_loop_in_every_layer(self, family):
        model, ids = mixture(family), tokens(2, 7)
        weights = random_weights(2, 7, 3, dtype=model.dtype)
        routed = model(ids, routing_weights=weights).logits
        with looped(model, weights):
            torch.testing.assert_close(routed, model(ids).logits, **TOLERANCE[family])

    def test_gradients_are_those_of_the_loop(self, model):
        ids = tokens(2, 5)
        model.train()
        weights = random_weights(2, 5, 3).requires_grad_()
        wanted = [weights, *(p for p in model.parameters() if p.requires_grad)]
        assert len(wanted) == 1 + 2 * 3 * 8  # A and B of three experts in four layers of two blocks
        ours = torch.autograd.grad(model(ids, labels=ids, routing_weights=weights).loss, wanted)
        with looped(model, weights):
            theirs = torch.autograd.grad(model(ids, labels=ids).loss, wanted)
        torch.testing.assert_close(ours, theirs, **EXACT)

    @torch.no_grad()
    def test_equals_the_loop_with_patterns_biases_and_different_target_modules(self):
        experts = {
            "one": {"target_modules": ["c_attn", "wte"], "rank_pattern": {"h.0.attn.c_attn": 5}, "lora_alpha": 3},
            "two": {"target_modules": ["c_fc", "lm_head"], "alpha_pattern": {"c_fc": 11}, "lora_bias": True, "r": 3},
            "three": {"target_modules": ["c_attn", "c_fc", "c_proj", "wte"], "use_rslora": True, "r": 2},
        }
        base = tiny_base("gpt2", tie_word_embeddings=False)
        model, ids = with_experts(base, experts, fan_in_fan_out=False), tokens(2, 7)
        first = model.base_model.model.transformer.h[0]
        assert (first.attn.c_attn.r["one"], first.mlp.c_fc.lora_alpha["two"]) == (5, 11)
        weights = random_weights(2, 7, 3)
        routed = model(ids, routing_weights=weights).logits
        with looped(model, weights):
            torch.testing.assert_close(routed, model(ids).logits, **TOLERANCE["gpt2"])

    @torch.no_grad()
    def test_experts_renamed_and_permuted_with_their_columns_give_the_same_logits(self, model):
        ids, weights = tokens(2, 7), random_weights(2, 7, 3)
        before = model(ids, routing_weights=weights).logits
        model.base_model.set_adapter(["three", "one", "two"])
        torch.testing.assert_close(model(ids, routing_weights=weights[..., [2, 0, 1]]).logits, before, **EXACT)

    @pytest.mark.parametrize("weight_shape", [(3,), (2, 3), (2, 7, 3)], ids=str)
    @torch.no_grad()
    def test_every_shape_of_weights_is_the_same_weights_written_out(self, model, weight_shape):
        ids, weights = tokens(2, 7), random_weights(*weight_shape)
        written_out = (
            weights.reshape((1,) * (3 - weights.dim()) + weight_shape) if weights.dim() != 2 else weights[:, None]
        )
        torch.testing.assert_close(
            model(ids, routing_weights=weights).logits,
            model(ids, routing_weights=written_out.expand(2, 7, 3)).logits,
            **EXACT,
        )

    @torch.no_grad()
    def test_explicit_weights_go_before_an_attached_router(self, model):
        ids, weights = tokens(2, 7), random_weights(2, 7, 3)
        expected = model(ids, routing_weights=weights).logits
        model.base_model.attach_router(RouterConfig())
        torch.testing.assert_close(model(ids, routing_weights=weights).logits, expected, **EXACT)
        assert not torch.allclose(model(ids).logits, expected)


class TestKindsOfModels:
    @torch.no_grad()
    def test_a_peft_model_without_a_task_type_routes(self):
        model, ids = mixture(task_type=None), tokens(2, 7)
        weights = random_weights(2, 7, 3)
        with looped(model, weights):
            expected = model(ids).logits
        torch.testing.assert_close(model(ids, routing_weights=weights).logits, expected, **TOLERANCE["gpt2"])

    @torch.no_grad()
    def test_inputs_embeds_take_weights_of_their_tokens(self, model):
        embeds, weights = random_weights(2, 7, 32), random_weights(2, 7, 3)
        routed = model(inputs_embeds=embeds, routing_weights=weights).logits
        with looped(model, weights):
            torch.testing.assert_close(routed, model(inputs_embeds=embeds).logits, **TOLERANCE["gpt2"])

    @torch.no_grad()
    def test_the_tuner_called_by_itself_routes_too(self, model):
        ids, weights = tokens(2, 7), random_weights(2, 7, 3)
        expected = model(ids, routing_weights=weights).logits
        assert torch.equal(model.base_model(ids, routing_weights=weights).logits, expected)
        assert not torch.allclose(model.base_model(ids).logits, expected)

    @torch.no_grad()
    def test_a_backbone_for_feature_extraction_routes(self):
        config = tiny_base("gpt2").config
        torch.manual_seed(0)
        model = with_experts(
            GPT2Model(config).double().eval(),
            EXPERTS,
            task_type=TaskType.FEATURE_EXTRACTION,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
        )
        ids, weights = tokens(2, 7), random_weights(2, 7, 3)
        routed = model(ids, routing_weights=weights).last_hidden_state
        with looped(model, weights):
            torch.testing.assert_close(routed, model(ids).last_hidden_state, **TOLERANCE["gpt2"])

    @torch.no_grad()
    def test_a_sequence_classifier_takes_one_weight_for_each_sequence(self):
        torch.manual_seed(0)
        base = GPT2ForSequenceClassification(tiny_base("gpt2").config).double().eval()
        model = with_experts(
            base, {"one": {"r": 2}}, task_type=TaskType.SEQ_CLS, target_modules=["c_attn"], fan_in_fan_out=True
        )
        ids, weights = tokens(2, 7), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        routed = model(ids, routing_weights=weights).logits
        torch.testing.assert_close(routed[1], model(ids).logits[1], **TOLERANCE["gpt2"])
        with model.disable_adapter():
            torch.testing.assert_close(routed[0], model(ids).logits[0], **TOLERANCE["gpt2"])

    @torch.no_grad()
    def test_a_model_that_is_no_transformer_routes_by_row(self):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double()
        model = with_experts(base, EXPERTS, task_type=None, target_modules=["0", "2"])
        x, weights = random_weights(6, 5), random_weights(6, 3)
        routed = model(x, routing_weights=weights)
        with looped(model, weights):
            torch.testing.assert_close(routed, model(x), **EXACT)

    @torch.no_grad()
    def test_what_generate_runs_outside_of_the_models_forward_is_routed_too(self):
        class Speaker(nn.Module):
            def __init__(self):
                super().__init__()
                self.prepare = nn.Linear(5, 5)

            def generate(self, x):
                return self.prepare(x)

        torch.manual_seed(0)
        model = with_experts(Speaker().double(), EXPERTS, task_type=None, target_modules=["prepare"])
        x, weights = random_weights(4, 5), random_weights(2, 3)
        with looped(model, weights.repeat_interleave(2, dim=0)):
            expected = model.base_model.model.prepare(x)
        torch.testing.assert_close(
            model.generate(x, routing_weights=weights.repeat_interleave(2, dim=0)), expected, **EXACT
        )

    @torch.no_grad()
    def test_disabled_adapters_stay_disabled(self, model):
        ids = tokens(2, 7)
        with model.disable_adapter():
            assert torch.equal(model(ids, routing_weights=random_weights(3)).logits, model(ids).logits)

    @torch.no_grad()
    def test_under_bfloat16_autocast_the_logits_are_close(self):
        model, ids = mixture("llama"), tokens(2, 7)
        weights = random_weights(2, 7, 3, dtype=torch.float32)
        expected = model(ids, routing_weights=weights).logits
        with torch.autocast("cpu", torch.bfloat16):
            routed = model(ids, routing_weights=weights).logits
        # bf16 keeps 8 bits; logits of order one after two blocks
        torch.testing.assert_close(routed.float(), expected, rtol=0, atol=5e-2)


class TestHotswap:
    @torch.no_grad()
    def test_a_routed_call_after_a_swap_runs_by_the_swapped_weights(self, tmp_path):
        experts = {name: {"r": 2, "lora_alpha": 4} for name in ("one", "two")}
        model, ids, weights = mixture("llama", experts), tokens(2, 7), torch.tensor([0.3, 0.9])
        model(ids, routing_weights=weights)  # stacks the experts, and the layers keep the stacks
        model.save_pretrained(tmp_path, selected_adapters=["two"])
        hotswap_adapter(model, tmp_path / "two", adapter_name="one")  # writes through .data, in place
        with looped(model, weights):
            expected = model(ids).logits
        torch.testing.assert_close(model(ids, routing_weights=weights).logits, expected, **TOLERANCE["llama"])


def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=PAD
    )
    base = T5ForConditionalGeneration(config).eval()
    model = with_experts(base, STRONG, task_type=TaskType.SEQ_2_SEQ_LM, target_modules=["q", "v", "wo"])
    # T5 starts from weights of standard deviation one: without this its tokens would not depend on the experts.
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in STRONG:
                layer.set_scale(name, 4.0)
    return model


class TestEncoderDecoder:
    @torch.no_grad()
    def test_one_hot_rows_run_each_sequence_through_its_expert_in_encoder_and_decoder(self):
        model, ids, answer = tiny_t5(), tokens(2, 7), tokens(2, 5, seed=4)
        routed = model(input_ids=ids, decoder_input_ids=answer, routing_weights=one_hot(2, 0).float()).logits
        for row, name in enumerate(["three", "one"]):
            with only_active(model, name):
                expected = model(input_ids=ids, decoder_input_ids=answer).logits
            torch.testing.assert_close(routed[row], expected[row], **T5_CLOSE)

    @pytest.mark.parametrize("num_beams", [1, 2])
    @torch.no_grad()
    def test_generate_routes_the_encoder_as_well_as_the_decoder(self, num_beams):
        model, ids = tiny_t5(), tokens(2, 7)
        how = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        routed = model.generate(input_ids=ids, routing_weights=one_hot(2, 0).float(), **how)
        for row, name in enumerate(["three", "one"]):
            with only_active(model, name):
                expected = model.generate(input_ids=ids[row : row + 1], **how)
            assert torch.equal(routed[row], expected[0])
        assert not torch.equal(routed, model.generate(input_ids=ids, **how))

    def test_weights_for_each_token_need_inputs_and_answers_of_one_length(self):
        model = tiny_t5()
        with pytest.raises(ValueError, match=r"shape \(2, 7, 3\) does not fit the input of \(2, 5\) tokens"):
            model(input_ids=tokens(2, 7), decoder_input_ids=tokens(2, 5), routing_weights=torch.rand(2, 7, 3))


class TestGenerate:
    @pytest.fixture
    def model(self):
        return mixture(experts=STRONG)

    def expected(self, model, ids, names, **how):
        """Each sequence generated by itself, with its expert as the only active adapter."""
        rows = []
        for row, name in enumerate(names):
            with only_active(model, name):
                rows.append(model.generate(ids[row : row + 1], **how))
        return torch.cat(rows)

    def test_the_experts_of_these_tests_speak_differently(self, model):
        ids = tokens(1, 5)
        spoken = [self.expected(model, ids, [name], **GREEDY) for name in STRONG]
        with model.disable_adapter():
            spoken.append(model.generate(ids, **GREEDY))
        assert len({tuple(sequence[0].tolist()) for sequence in spoken}) == 4

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_one_row_for_all_generates_what_that_expert_generates(self, model, use_cache):
        ids = tokens(2, 5)
        routed = model.generate(ids, routing_weights=one_hot(1)[0], use_cache=use_cache, **GREEDY)
        assert torch.equal(routed, self.expected(model, ids, ["two", "two"], **GREEDY))

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_each_row_generates_what_its_expert_generates_alone(self, model, use_cache):
        ids = tokens(3, 5)
        routed = model.generate(ids, routing_weights=one_hot(2, 0, 1), use_cache=use_cache, **GREEDY)
        assert torch.equal(routed, self.expected(model, ids, ["three", "one", "two"], **GREEDY))

    def test_beams_keep_the_weights_of_their_sequence(self, model):
        ids, how = tokens(3, 5), {"num_beams": 2, **GREEDY}
        routed = model.generate(ids, routing_weights=one_hot(2, 0, 1), **how)
        assert torch.equal(routed, self.expected(model, ids, ["three", "one", "two"], **how))

    def test_several_returned_beams_keep_the_weights_of_their_sequence(self, model):
        ids, how = tokens(2, 5), {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
        routed = model.generate(ids, routing_weights=one_hot(2, 0), **how)
        assert torch.equal(routed, self.expected(model, ids, ["three", "one"], **how))

    @torch.no_grad()
    def test_several_samples_keep_the_weights_of_their_sequence(self, model):
        torch.manual_seed(0)
        how = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "top_k": 0}
        out = model.generate(
            tokens(2, 5),
            routing_weights=one_hot(2, 0),
            return_dict_in_generate=True,
            output_logits=True,
            **how,
            min_new_tokens=5,
        )
        logits = torch.stack(out.logits, dim=1)
        for row, name in enumerate(["three"] * 3 + ["one"] * 3):
            sequence = out.sequences[row : row + 1]
            with only_active(model, name):
                read = model(sequence).logits[0, 4:-1]
            # generate returns its logits in float32, whatever the model's dtype
            torch.testing.assert_close(logits[row], read.float(), rtol=1e-5, atol=1e-5)

    def test_left_padding_changes_nothing(self, model):
        long, short = tokens(1, 6), tokens(1, 3, seed=8)
        ids = torch.cat([long, torch.cat([torch.full((1, 3), PAD), short], dim=1)])
        mask = torch.cat([torch.ones(1, 6), torch.tensor([[0, 0, 0, 1, 1, 1]])]).long()
        routed = model.generate(ids, attention_mask=mask, routing_weights=one_hot(1, 2), **GREEDY)[:, 6:]
        assert torch.equal(routed[:1], self.expected(model, long, ["two"], **GREEDY)[:, 6:])
        assert torch.equal(routed[1:], self.expected(model, short, ["three"], **GREEDY)[:, 3:])

    def test_a_model_without_a_task_type_generates(self):
        model, ids = mixture(experts=STRONG, task_type=None), tokens(2, 5)
        routed = model.generate(ids, routing_weights=one_hot(2, 0), **GREEDY)
        assert torch.equal(routed, self.expected(model, ids, ["three", "one"], **GREEDY))

    @torch.no_grad()
    def test_mixed_weights_generate_what_their_forward_says(self, model):
        ids, weights = tokens(2, 5), random_weights(2, 3) / 2
        routed = model.generate(ids, routing_weights=weights, **GREEDY)
        logits = model(routed, routing_weights=weights).logits[:, 4:-1]
        logits[..., 2] = -torch.inf  # the end is not allowed before six tokens
        assert torch.equal(routed[:, 5:], logits.argmax(-1))

    @torch.no_grad()
    def test_after_generating_the_model_is_as_before(self, model):
        ids = tokens(2, 5)
        before, hooks = model(ids).logits, count_hooks(model)
        model.generate(ids, routing_weights=one_hot(2, 0), **GREEDY)
        assert count_hooks(model) == hooks
        assert torch.equal(model(ids).logits, before)

    def test_weights_for_each_token_of_the_prompt_are_refused(self, model):
        with pytest.raises(ValueError, match=r"per-token routing_weights of shape \(2, 5, 3\).*attach a router"):
            model.generate(tokens(2, 5), routing_weights=torch.rand(2, 5, 3), max_new_tokens=2)

    @pytest.mark.parametrize("name", ["positional", "input_ids", "inputs", "inputs_embeds"])
    def test_rows_that_are_not_one_a_sequence_are_refused_and_both_counts_named(self, model, name):
        ids = tokens(2, 5)
        given = model.get_input_embeddings()(ids) if name == "inputs_embeds" else ids
        args, kwargs = ((given,), {}) if name == "positional" else ((), {name: given})
        with pytest.raises(ValueError, match="has 4 rows but the batch has 2 sequences"):
            model.generate(*args, **kwargs, routing_weights=torch.rand(4, 3), max_new_tokens=2)

    def test_a_wrong_width_is_refused(self, model):
        with pytest.raises(ValueError, match="has 2 columns but 3 adapters are active"):
            model.generate(tokens(2, 5), routing_weights=torch.rand(2), max_new_tokens=2)

    def test_weights_that_are_no_tensor_are_refused(self, model):
        with pytest.raises(ValueError, match="must be a floating-point tensor, got list"):
            model.generate(tokens(2, 5), routing_weights=[0.5, 0.5, 0.0], max_new_tokens=2)


class TestGradientCheckpointing:
    """Invariant: the same loss and gradients as without, in both kinds."""

    @pytest.mark.parametrize("weight_shape", [(3,), (2, 3), (2, 6, 3)], ids=str)
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_loss_and_gradients_are_those_without(self, model, use_reentrant, weight_shape):
        ids = tokens(2, 6)
        model.train()

        def loss_and_gradients():
            weights = random_weights(*weight_shape).requires_grad_()
            model.zero_grad()
            loss = model(ids, labels=ids, routing_weights=weights).loss
            loss.backward()
            return [loss.detach(), weights.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

        without = loss_and_gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        runs = []
        block = model.base_model.model.transformer.h[0]
        block.attn.register_forward_hook(lambda *_: runs.append(1))
        torch.testing.assert_close(loss_and_gradients(), without, **EXACT)
        assert len(runs) == 2  # the block did run again for its backward

    def test_two_forwards_before_their_backwards_keep_their_own_weights(self, model):
        ids = tokens(2, 6)
        model.train()
        first, second = random_weights(2, 6, 3).requires_grad_(), random_weights(3, seed=1).requires_grad_()

        def both():
            losses = [model(ids, labels=ids, routing_weights=weights).loss for weights in (first, second)]
            return torch.autograd.grad(losses[0] + 2 * losses[1], [first, second])

        without = both()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.testing.assert_close(both(), without, **EXACT)

    def test_a_call_without_weights_after_one_with_weights_is_plain(self, model):
        ids = tokens(2, 6)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        plain = model(ids, labels=ids).loss
        model(ids, labels=ids, routing_weights=random_weights(3)).loss.backward()
        assert torch.equal(model(ids, labels=ids).loss, plain)


class TestMixingInLayersIsNotMixingLogits:
    """Invariant: the two agree in two cases and differ otherwise, by the square of the update's size."""

    @torch.no_grad()
    def gap(self, model, ids, weights):
        """Largest difference between the mixture's logits and the mixture of the experts' logits."""
        mixed = torch.zeros((), dtype=torch.float64)
        for column, name in enumerate(model.base_model.active_adapters):
            with only_active(model, name):
                mixed = mixed + weights[..., column].reshape(-1, 1, 1) * model(ids).logits
        return (model(ids, routing_weights=weights).logits - mixed).abs().max().item()

    def test_they_agree_with_one_hot_weights_for_each_sequence(self, model):
        assert self.gap(model, tokens(3, 7), one_hot(2, 0, 1)) < 1e-10

    def test_they_agree_where_only_the_last_linear_is_adapted(self):
        base = tiny_base("gpt2", tie_word_embeddings=False)
        model = with_experts(base, EXPERTS, target_modules=["lm_head"])
        assert self.gap(model, tokens(2, 7), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)) < 1e-10

    def test_otherwise_the_gap_shrinks_fourfold_when_the_update_is_halved(self, model):
        ids, weights = tokens(2, 7), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
        gaps = []
        for scale in (0.04, 0.02, 0.01):
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    for name in EXPERTS:
                        layer.set_scale(name, scale)
            gaps.append(self.gap(model, ids, weights))
        assert gaps[-1] > 1e-8  # far above rounding: the two are not the same function
        assert all(3 < larger / smaller < 5 for larger, smaller in pairwise(gaps))


class TestRefusals:
    """Nothing is silently ignored: what cannot be routed says so, and the model works on as before."""

    @pytest.fixture
    def model(self):
        model, ids = mixture(), tokens(2, 7)
        hooks = count_hooks(model)
        yield model
        assert count_hooks(model) == hooks
        model(ids)

    def refused(self, model, match, *, weights=None, **inputs):
        with pytest.raises(ValueError, match=match):
            model(tokens(2, 7), routing_weights=torch.rand(3) if weights is None else weights, **inputs)

    def test_a_wrong_width_names_both_counts_and_the_adapters(self, model):
        match = r"has 2 columns but 3 adapters are active \(\['one', 'two', 'three'\]\).*set_adapter"
        self.refused(model, match, weights=torch.rand(2))

    @pytest.mark.parametrize("shape", [(4, 3), (1, 3)], ids=str)
    def test_a_wrong_batch_names_both(self, model, shape):
        match = rf"shape \({shape[0]}, 3\) does not fit an input of batch 2 and sequence length 7"
        self.refused(model, match, weights=torch.rand(shape))

    @pytest.mark.parametrize("shape", [(2, 6, 3), (4, 7, 3), (2, 1, 3), (7, 2, 3)], ids=str)
    def test_a_wrong_sequence_length_names_both(self, model, shape):
        match = rf"shape \({shape[0]}, {shape[1]}, 3\) does not fit an input of batch 2 and sequence length 7"
        self.refused(model, match, weights=torch.rand(shape))

    @pytest.mark.parametrize("dtype", [torch.long, torch.bool])
    def test_weights_that_are_not_floating_point_name_their_dtype(self, model, dtype):
        self.refused(model, f"must be a floating-point tensor, got {dtype}", weights=torch.ones(3, dtype=dtype))

    def test_weights_that_are_a_list_are_refused(self, model):
        self.refused(model, "must be a floating-point tensor, got list", weights=[0.2, 0.3, 0.5])

    @pytest.mark.parametrize("shape", [(), (1, 2, 7, 3)], ids=str)
    def test_weights_of_no_or_four_dimensions_are_refused(self, model, shape):
        self.refused(model, r"but must be \[num_experts\], \[batch, num_experts\] or", weights=torch.rand(shape))

    def test_adapter_names_beside_weights_are_refused(self, model):
        self.refused(model, "routing_weights and adapter_names cannot be combined", adapter_names=["one", "two"])

    def test_alora_offsets_beside_weights_are_refused(self, model):
        self.refused(model, "routing_weights and alora_offsets cannot be combined", alora_offsets=[1, 1])

    def test_no_active_adapters_are_refused(self, model):
        model.base_model.set_adapter([])
        self.refused(model, "has 3 columns but 0 adapters are active")

    @pytest.mark.parametrize("active", [["ghost"], ["one", "ghost"]], ids=str)
    def test_an_unknown_adapter_is_refused_and_the_known_ones_named(self, model, active):
        model.base_model.set_adapter(active)
        match = r"active adapters \['ghost'\] have no LoRA weights.*holds \['one', 'three', 'two'\].*set_adapter"
        self.refused(model, match, weights=torch.rand(len(active)))

    def test_merged_adapters_are_refused_until_unmerged(self, model):
        model.merge_adapter(["two"])
        self.refused(model, r"merged adapters \(\['two'\]\); call `unmerge_adapter` first")
        model.unmerge_adapter()
        model(tokens(2, 7), routing_weights=torch.rand(3))

    @pytest.mark.parametrize(
        "arguments, variant",
        [({"use_dora": True}, "DoraLinearVariant"), ({"alora_invocation_tokens": [5]}, "ALoraLinearVariant")],
    )
    def test_variants_of_lora_are_refused_by_name(self, arguments, variant):
        model = mixture(experts={"plain": {"r": 2}, "other": {"r": 2, **arguments}}, target_modules=["c_attn"])
        self.refused(model, rf"'other' uses the LoRA variant {variant}.*Use plain LoRA", weights=torch.rand(2))

    def test_a_layer_that_cannot_be_routed_is_named_before_anything_runs(self, model):
        model.add_adapter("dora", LoraConfig(target_modules=["h.1.attn.c_attn"], use_dora=True, fan_in_fan_out=True))
        model.base_model.set_adapter(["one", "dora"])
        ran = []
        handle = model.base_model.model.transformer.wte.register_forward_hook(lambda *args: ran.append(1))
        self.refused(model, "'transformer.h.1.attn.c_attn' cannot be routed. Adapter 'dora'", weights=torch.rand(2))
        assert not ran
        handle.remove()

    def test_target_parameters_are_refused(self):
        base = nn.Sequential(nn.Linear(5, 4))
        model = with_experts(base, {"one": {"r": 2}}, task_type=None, target_parameters=["0.weight"])
        with pytest.raises(ValueError, match="ParamWrapper .target_parameters.*Exclude these modules"):
            model(torch.rand(2, 5), routing_weights=torch.rand(1))

    def test_multihead_attention_is_refused(self):
        class Attending(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2)

            def forward(self, x):
                return self.attention(x, x, x)[0]

        model = with_experts(Attending(), {"one": {"r": 2}}, task_type=None, target_modules=["attention"])
        with pytest.raises(ValueError, match="MultiheadAttention.*Exclude these modules"):
            model(torch.rand(3, 2, 8), routing_weights=torch.rand(1))

    @pytest.mark.parametrize(
        "config",
        [IA3Config(task_type="CAUSAL_LM"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)],
        ids=["IA3", "prompt tuning"],
    )
    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_other_methods_than_lora_are_refused_by_name(self, config, call):
        model = get_peft_model(tiny_base("llama"), config)
        run = model if call == "forward" else model.generate
        with pytest.raises(
            ValueError, match=f"needs a PeftModel with LoRA adapters.*of type .*{config.peft_type.value}"
        ):
            run(input_ids=tokens(2, 7), routing_weights=torch.rand(1))

    def test_a_mixed_model_is_refused(self):
        model = PeftMixedModel(tiny_base("llama"), LoraConfig(target_modules=["q_proj"]), "one")
        with pytest.raises(ValueError, match="needs a PeftModel with LoRA adapters.*of type PeftMixedModel"):
            model(input_ids=tokens(2, 7), routing_weights=torch.rand(1))

    def test_adalora_is_refused(self):
        config = AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_base("llama"), config)
        with pytest.raises(ValueError, match="Layers of type SVDLinear do not support routing_weights"):
            model(input_ids=tokens(2, 7), routing_weights=torch.rand(1))

    def test_weights_of_sequences_are_refused_where_a_model_selects_tokens(self):
        class EveryOtherToken(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(VOCAB, 8)
                self.mix = nn.Linear(8, 8)

            def forward(self, input_ids):
                return self.mix(self.embed(input_ids).flatten(0, 1)[::2])

        model = with_experts(EveryOtherToken(), EXPERTS, task_type=None, target_modules=["mix"])
        match = r"shape \(2, 3\) cannot be matched to the 6 tokens that enter 'mix'.*\(this call has 12\)"
        with pytest.raises(ValueError, match=match):
            model(input_ids=tokens(2, 6), routing_weights=torch.rand(2, 3))
        model(input_ids=tokens(2, 6), routing_weights=torch.rand(3))


class TestRoutingOff:
    """Without routing the fork is upstream: the same outputs and state dicts, bit for bit."""

    def test_outputs_and_state_dicts_are_those_of_the_pristine_release(self):
        pristine = os.environ.get("PEFT_PRISTINE")
        if not pristine:
            pytest.skip("set PEFT_PRISTINE to a folder that holds the pinned release's package `peft`")
        script = Path(__file__).with_name("moe_stock_outputs.py")
        environment = {**os.environ, "PYTHONPATH": pristine}
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        assert Path(theirs["peft"]).is_relative_to(pristine)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            ours = stock_outputs()
        finally:
            torch.set_num_threads(threads)
        assert ours == theirs["hashes"]

    def test_a_routed_call_leaves_the_next_plain_call_bit_for_bit_the_same(self, model):
        ids = tokens(2, 7)
        before, keys = model(ids).logits, list(model.state_dict())
        model(ids, routing_weights=random_weights(2, 7, 3))
        assert torch.equal(model(ids).logits, before)
        assert list(model.state_dict()) == keys
