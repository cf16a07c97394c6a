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
"""A forward that raises leaves no hook and no state behind, neither upstream's `adapter_names` nor our weights."""

from contextlib import contextmanager

import pytest
import torch
from moe_oracles import EXPERTS, random_weights, with_experts
from moe_testing import PAD, TARGETS, VOCAB, count_hooks, tiny_base, tokens
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.moe_router import RouterConfig


class Stumbled(Exception):
    pass


@pytest.fixture
def model():
    return with_experts(tiny_base("gpt2"), EXPERTS, target_modules=TARGETS["gpt2"], fan_in_fan_out=True)


@contextmanager
def stumbling(model, error=Stumbled, after=0):
    """Let the model's last block raise, after running well `after` times."""
    left = [after]

    def stumble(module, args):
        if left[0] == 0:
            raise error()
        left[0] -= 1

    handle = model.base_model.model.transformer.h[-1].mlp.register_forward_pre_hook(stumble)
    try:
        yield
    finally:
        handle.remove()


class Unchanged:
    """What a plain call computes and how many hooks there are: to be the same before and after."""

    def __init__(self, model):
        self.model, self.hooks, self.logits = model, count_hooks(model), self.run(model)

    @staticmethod
    @torch.no_grad()
    def run(model):
        return model(tokens(2, 7)).logits

    def check(self):
        assert count_hooks(self.model) == self.hooks
        assert torch.equal(self.run(self.model), self.logits)


class TestAdapterNames:
    """Upstream's own hooks, which 0.21.2 leaves behind."""

    def test_a_forward_that_raises_leaves_no_hook_behind(self, model):
        unchanged = Unchanged(model)
        with stumbling(model), pytest.raises(Stumbled):
            model(tokens(2, 7), adapter_names=["one", "two"])
        unchanged.check()

    def test_a_batch_of_another_size_runs_after_one_that_raised(self, model):
        with stumbling(model), pytest.raises(Stumbled):
            model(tokens(2, 7), adapter_names=["one", "two"])
        model(tokens(3, 7))

    def test_generate_that_raises_leaves_no_hook_behind(self, model):
        unchanged = Unchanged(model)
        with stumbling(model, after=2), pytest.raises(Stumbled):
            model.generate(tokens(2, 7), adapter_names=["one", "two"], max_new_tokens=5, min_new_tokens=5)
        unchanged.check()

    def test_beams_of_an_encoder_decoder_that_raise_leave_no_hook_behind(self):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=PAD
        )
        arguments = {"target_modules": ["q"], "task_type": "SEQ_2_SEQ_LM", "init_lora_weights": False}
        model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(**arguments), "one").eval()
        hooks = count_hooks(model)
        model.base_model.model.decoder.block[-1].register_forward_pre_hook(self.stumble)
        with pytest.raises(Stumbled):
            model.generate(input_ids=tokens(2, 7), adapter_names=["one", "__base__"], num_beams=2)
        assert count_hooks(model) == hooks + 1

    @staticmethod
    def stumble(module, args):
        raise Stumbled


class TestRoutingWeights:
    weights = random_weights(2, 3)

    @pytest.mark.parametrize("error", [Stumbled, KeyboardInterrupt])
    def test_a_forward_that_raises_leaves_nothing_behind(self, model, error):
        unchanged = Unchanged(model)
        with stumbling(model, error), pytest.raises(error):
            model(tokens(2, 7), routing_weights=self.weights)
        unchanged.check()

    @pytest.mark.parametrize("error", [Stumbled, KeyboardInterrupt])
    def test_the_next_routed_call_runs_by_its_own_weights(self, model, error):
        other = random_weights(4, 3, seed=1)
        expected = model(tokens(4, 5), routing_weights=other).logits
        with stumbling(model, error), pytest.raises(error):
            model(tokens(2, 7), routing_weights=self.weights)
        assert torch.equal(model(tokens(4, 5), routing_weights=other).logits, expected)

    def test_an_interrupted_call_does_not_count_as_still_running(self, model):
        with stumbling(model, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            model(tokens(2, 7), routing_weights=self.weights)
        model.base_model.attach_router(RouterConfig())
        model.base_model.model.transformer(tokens(2, 7))
        assert all(gate["tokens"] == 14 for gate in model.base_model.routing_summary().values())
        assert model.base_model.routing_summary()

    def test_generate_that_raises_leaves_nothing_behind(self, model):
        unchanged = Unchanged(model)
        with stumbling(model, after=2), pytest.raises(Stumbled):
            model.generate(tokens(2, 7), routing_weights=self.weights, max_new_tokens=5, min_new_tokens=5)
        unchanged.check()

    def test_a_call_that_is_refused_in_a_layer_leaves_nothing_behind(self):
        class Shortened(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(VOCAB, 8)
                self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, input_ids):
                return self.second(self.first(self.embed(input_ids))[:, :-1])

        model = with_experts(Shortened(), EXPERTS, task_type=None, target_modules=["first", "second"])
        ids, hooks = tokens(2, 7), count_hooks(model)
        before = model(input_ids=ids)
        with pytest.raises(ValueError, match=r"does not fit the input of \(2, 6\) tokens"):
            model(input_ids=ids, routing_weights=torch.rand(2, 7, 3))
        assert count_hooks(model) == hooks
        assert torch.equal(model(input_ids=ids), before)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpointed_forward_that_raises_leaves_nothing_behind(self, model, use_reentrant):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        unchanged, functions = Unchanged(model), self.checkpoint_functions(model)
        model.train()
        with stumbling(model), pytest.raises(Stumbled):
            model(tokens(2, 7), labels=tokens(2, 7), routing_weights=self.weights)
        model.eval()
        unchanged.check()
        assert self.checkpoint_functions(model) == functions

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_recomputation_that_raises_leaves_nothing_behind(self, model, use_reentrant):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        unchanged = Unchanged(model)
        model.train()
        with stumbling(model, after=1):
            loss = model(tokens(2, 7), labels=tokens(2, 7), routing_weights=self.weights).loss
            with pytest.raises(Stumbled):
                loss.backward()
        model.eval()
        unchanged.check()

    def test_a_checkpointed_forward_that_succeeds_leaves_nothing_behind(self, model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        unchanged, functions = Unchanged(model), self.checkpoint_functions(model)
        model.train()
        model(tokens(2, 7), labels=tokens(2, 7), routing_weights=self.weights).loss.backward()
        model.eval()
        unchanged.check()
        assert self.checkpoint_functions(model) == functions

    @staticmethod
    def checkpoint_functions(model):
        return [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
