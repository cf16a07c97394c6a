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
"""Properties of the routed layer, for random shapes, ranks and numbers of experts."""

import copy

import pytest
import torch
from moe_oracles import EXACT, adapted, one_expert_at_a_time, random_weights, spread, token_loop, token_shape
from torch import nn

from peft.tuners.lora import moe_layer


hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

configurations = st.fixed_dictionaries(
    {
        "ranks": st.lists(st.integers(1, 4), min_size=1, max_size=6),
        "batch": st.integers(1, 3),
        "length": st.integers(1, 4),
        "inputs": st.integers(1, 6),
        "outputs": st.integers(1, 6),
        "seed": st.integers(0, 2**16),
    }
)
quickly = settings(max_examples=25, deadline=None)


def random_layer(ranks, batch, length, inputs, outputs, seed):
    experts = {f"e{i}": {"r": rank, "lora_alpha": i + 1} for i, rank in enumerate(ranks)}
    layer = adapted(nn.Linear(inputs, outputs), experts, seed=seed)
    return (
        layer,
        random_weights(batch, length, inputs, seed=seed),
        random_weights(batch, length, len(ranks), seed=seed + 1),
    )


@quickly
@given(configurations)
def test_any_shape_rank_and_number_of_experts_equals_the_loop(configuration):
    layer, x, weights = random_layer(**configuration)
    torch.testing.assert_close(layer(x, routing_weights=weights), token_loop(layer, x, weights), **EXACT)


@quickly
@given(configurations, st.randoms(use_true_random=False))
def test_experts_permuted_with_their_columns_give_the_same(configuration, random):
    layer, x, weights = random_layer(**configuration)
    before = layer(x, routing_weights=weights)
    order = list(range(weights.shape[-1]))
    random.shuffle(order)
    layer._active_adapter = [f"e{i}" for i in order]
    torch.testing.assert_close(layer(x, routing_weights=weights[..., order]), before, **EXACT)


@quickly
@given(configurations)
def test_experts_renamed_give_the_same(configuration):
    layer, x, weights = random_layer(**configuration)
    ranks = configuration["ranks"]
    experts = {f"z{i}": {"r": rank, "lora_alpha": i + 1} for i, rank in enumerate(ranks)}
    renamed = adapted(copy.deepcopy(layer.get_base_layer()), experts)
    renamed.load_state_dict({key.replace(".e", ".z"): value for key, value in layer.state_dict().items()})
    torch.testing.assert_close(renamed(x, routing_weights=weights), layer(x, routing_weights=weights), **EXACT)


@quickly
@given(configurations, st.floats(-2, 2), st.floats(-2, 2))
def test_the_update_is_linear_in_the_weights(configuration, first, second):
    layer, x, weights = random_layer(**configuration)
    others, base = random_weights(*weights.shape, seed=99), layer.base_layer(x)

    def update(weights):
        return layer(x, routing_weights=weights) - base

    torch.testing.assert_close(
        update(first * weights + second * others), first * update(weights) + second * update(others), **EXACT
    )


@quickly
@given(
    rank=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_any_convolution_equals_stock_experts_run_one_at_a_time(rank, groups, stride, padding, seed):
    base = nn.Conv1d(2 * groups, 3 * groups, 3, stride=stride, padding=padding, groups=groups)
    layer = adapted(base, {"one": {"r": rank * groups}, "two": {"r": groups, "lora_alpha": 3}}, seed=seed)
    x = random_weights(2, 2 * groups, 5, seed=seed)
    weights = random_weights(*token_shape(layer, x), 2, seed=seed + 1)
    torch.testing.assert_close(layer(x, routing_weights=weights), one_expert_at_a_time(layer, x, weights), **EXACT)


@quickly
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 3))
def test_weights_are_spread_over_the_tokens_they_belong_to(tokens, num_experts, seed):
    tokens = tuple(tokens[:2])
    for lead in {(), tokens[:1], tokens}:
        weights = random_weights(*lead, num_experts, seed=seed)
        fitted = moe_layer.fit_to_tokens(weights, tokens).expand(*tokens, num_experts)
        torch.testing.assert_close(fitted, spread(weights, tokens), rtol=0, atol=0)
