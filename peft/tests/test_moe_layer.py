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
"""The routed forward of every kind of LoRA layer, against plain loops and against stock PEFT, one expert at a time."""

import copy
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from moe_oracles import (
    EXACT,
    EXPERTS,
    LAYERS,
    Recorder,
    adapted,
    adapted_model,
    concatenations,
    example,
    one_expert_at_a_time,
    only,
    random_weights,
    token_loop,
    token_shape,
)
from torch import nn
from torch.func import functional_call

from peft import LoraConfig, import_utils
from peft.tuners.lora import moe_stack
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.te import TeLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear


# bf16 keeps 8 bits: each of the few roundings along the way is 2^-9 of a value of order ten.
BF16 = {"rtol": 2e-2, "atol": 1e-1}
# float32 keeps 24 bits; values of order ten, sums of five terms.
FP32 = {"rtol": 1e-5, "atol": 1e-5}
SAME_RANK = {name: {"r": 2, "lora_alpha": 3} for name in ("one", "two", "three")}
WEIGHT_SHAPES = ("[experts]", "[batch, experts]", "[batch, seq, experts]")
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_weight_shape = pytest.mark.parametrize("weight_shape", WEIGHT_SHAPES)
looped_layers = pytest.mark.parametrize("kind", [kind for kind in LAYERS if "conv" not in kind.lower().split()[0]])


def weights_of_shape(weight_shape, tokens, num_experts=3):
    lead = {"[experts]": (), "[batch, experts]": tokens[:1], "[batch, seq, experts]": tokens}[weight_shape]
    return random_weights(*lead, num_experts)


def trained_factors(layer):
    return {name: parameter for name, parameter in layer.named_parameters() if "lora_" in name}


class TestEveryLayer:
    @every_weight_shape
    @every_layer
    def test_equals_stock_experts_run_one_at_a_time(self, kind, weight_shape):
        layer, x = example(kind)
        weights = weights_of_shape(weight_shape, token_shape(layer, x))
        torch.testing.assert_close(layer(x, routing_weights=weights), one_expert_at_a_time(layer, x, weights), **EXACT)

    @every_weight_shape
    @looped_layers
    def test_equals_a_loop_over_tokens_and_experts(self, kind, weight_shape):
        layer, x = example(kind)
        weights = weights_of_shape(weight_shape, token_shape(layer, x))
        torch.testing.assert_close(layer(x, routing_weights=weights), token_loop(layer, x, weights), **EXACT)

    @every_layer
    def test_zero_weights_give_exactly_the_base_layer(self, kind):
        layer, x = example(kind)
        assert torch.equal(layer(x, routing_weights=torch.zeros(3, dtype=torch.float64)), layer.base_layer(x))

    @every_layer
    def test_one_hot_weights_give_that_expert(self, kind):
        layer, x = example(kind)
        for column, name in enumerate(EXPERTS):
            with only(layer, name):
                alone = layer(x)
            torch.testing.assert_close(
                layer(x, routing_weights=F.one_hot(torch.tensor(column), 3).double()), alone, **EXACT
            )

    @every_layer
    def test_gradients_are_those_of_stock_experts_run_one_at_a_time(self, kind):
        layer, x = example(kind)
        weights = random_weights(*token_shape(layer, x), 3).requires_grad_()
        wanted = [weights, *trained_factors(layer).values()]
        if x.is_floating_point():
            wanted.append(x.requires_grad_())
        with torch.no_grad():
            direction = torch.randn_like(layer.base_layer(x))

        routed = torch.autograd.grad((layer(x, routing_weights=weights) * direction).sum(), wanted)
        oracle = torch.autograd.grad((one_expert_at_a_time(layer, x, weights) * direction).sum(), wanted)
        for ours, theirs in zip(routed, oracle):
            torch.testing.assert_close(ours, theirs, **EXACT)

    @pytest.mark.parametrize("kind", ["linear", "transformers Conv1D", "embedding", "conv2d of two groups"])
    def test_gradients_are_those_of_finite_differences(self, kind):
        layer, x = example(kind)
        factors = trained_factors(layer)
        weights = random_weights(*token_shape(layer, x), 3).requires_grad_()
        if x.is_floating_point():
            x.requires_grad_()

        def routed(x, weights, *values):
            return functional_call(layer, dict(zip(factors, values)), (x,), {"routing_weights": weights})

        assert torch.autograd.gradcheck(routed, (x, weights, *factors.values()), fast_mode=True)

    @every_layer
    def test_a_layer_that_lacks_an_expert_skips_its_column(self, kind):
        layer, x = example(kind)
        weights = random_weights(*token_shape(layer, x), 3)
        layer.delete_adapter("two")
        layer._active_adapter = ["one", "two", "three"]
        routed = layer(x, routing_weights=weights)
        layer._active_adapter = ["one", "three"]
        torch.testing.assert_close(routed, one_expert_at_a_time(layer, x, weights[..., [0, 2]]), **EXACT)

    def test_a_layer_that_lacks_all_experts_is_the_base_layer(self):
        layer, x = example("linear")
        layer._active_adapter = ["d", "e"]
        assert torch.equal(layer(x, routing_weights=random_weights(2)), layer.base_layer(x))

    def test_disabled_adapters_give_the_base_layer(self):
        layer, x = example("linear")
        layer.enable_adapters(False)
        assert torch.equal(layer(x, routing_weights=random_weights(3)), layer.base_layer(x))

    @every_layer
    def test_the_outputs_of_the_base_layer_are_not_changed_in_place(self, kind):
        layer, x = example(kind)
        returned = []
        layer.get_base_layer().register_forward_hook(lambda module, inputs, output: returned.append(output))
        layer(x, routing_weights=random_weights(3))
        (output,) = returned
        assert output._version == 0
        assert torch.equal(output, layer.get_base_layer().forward(x))


class TestShapes:
    def test_tokens_flattened_by_the_model_take_the_weights_of_their_sequence(self):
        layer, x = example("linear")
        weights = random_weights(2, 3)
        torch.testing.assert_close(
            layer(x.flatten(0, 1), routing_weights=weights), layer(x, routing_weights=weights).flatten(0, 1), **EXACT
        )

    def test_tokens_flattened_by_the_model_take_the_weights_of_their_token(self):
        layer, x = example("linear")
        weights = random_weights(2, 3, 3)
        torch.testing.assert_close(
            layer(x.flatten(0, 1), routing_weights=weights), layer(x, routing_weights=weights).flatten(0, 1), **EXACT
        )

    def test_a_single_vector_takes_one_weight_for_each_expert(self):
        layer, x = example("linear")
        weights = random_weights(3)
        torch.testing.assert_close(
            layer(x[0, 0], routing_weights=weights), layer(x, routing_weights=weights)[0, 0], **EXACT
        )

    @every_weight_shape
    @every_layer
    def test_a_call_without_tokens_gives_what_the_base_layer_gives(self, kind, weight_shape):
        layer, x = example(kind)
        tokens = (0, *token_shape(layer, x)[1:])
        x = x[:0]  # as an expert of a mixture-of-experts model gets that no token chose
        routed = layer(x, routing_weights=weights_of_shape(weight_shape, tokens))
        assert routed.shape == layer.base_layer(x).shape
        routed.sum().backward()
        assert all(not factor.grad.any() for factor in trained_factors(layer).values())

    def test_rows_of_weights_are_repeated_over_all_inner_dimensions(self):
        layer, x = example("linear")
        x = torch.stack([x, 2 * x], dim=1)  # [batch, 2, seq, features]
        weights = random_weights(2, 3)
        expected = torch.stack([layer(x[:, i], routing_weights=weights) for i in range(2)], dim=1)
        torch.testing.assert_close(layer(x, routing_weights=weights), expected, **EXACT)

    @pytest.mark.parametrize("kind", ["conv1d", "conv2d of two groups"])
    def test_one_image_without_a_batch_dimension_is_a_batch_of_one(self, kind):
        layer, x = example(kind)
        weights = random_weights(3)
        torch.testing.assert_close(layer(x[0], routing_weights=weights), layer(x, routing_weights=weights)[0], **EXACT)

    @pytest.mark.parametrize(
        "shape, tokens",
        [((5, 3), r"\(2, 3\)"), ((2, 4, 3), r"\(2, 3\)"), ((3, 3, 3), r"\(2, 3\)"), ((1, 3), r"\(2, 3\)")],
    )
    def test_weights_of_another_batch_or_length_are_refused_and_both_shapes_named(self, shape, tokens):
        layer, x = example("linear")
        with pytest.raises(ValueError, match=rf"shape \({shape[0]}.*does not fit the input of {tokens} tokens"):
            layer(x, routing_weights=random_weights(*shape))

    def test_weights_without_rows_are_refused_where_there_are_tokens(self):
        layer, x = example("linear")
        with pytest.raises(ValueError, match=r"shape \(0, 3\) does not fit the input of \(6,\) tokens"):
            layer(x.flatten(0, 1), routing_weights=random_weights(0, 3))

    def test_weights_of_four_dimensions_are_refused(self):
        layer, x = example("linear")
        with pytest.raises(ValueError, match=r"shape \(1, 2, 3, 3\) does not fit"):
            layer(x, routing_weights=random_weights(1, 2, 3, 3))

    def test_weights_of_another_width_are_refused_and_both_counts_named(self):
        layer, x = example("linear")
        with pytest.raises(ValueError, match=r"has 2 columns but 3 adapters are active \(\['one', 'two', 'three'\]\)"):
            layer(x, routing_weights=random_weights(2))

    def test_a_convolution_names_the_positions_of_its_output(self):
        layer, x = example("conv2d")  # 4 x 5 pixels give 2 x 3 positions
        with pytest.raises(ValueError, match=r"does not fit the convolution output of \(2, 6\) tokens"):
            layer(x, routing_weights=random_weights(2, 20, 3))


class TestScaling:
    def test_set_scale_scales_its_expert_alone(self):
        layer, x = example("linear")
        weights = random_weights(2, 3, 3)
        layer.set_scale("two", 2.5)
        torch.testing.assert_close(
            layer(x, routing_weights=weights),
            token_loop(layer, x, weights * torch.tensor([1.0, 2.5, 1.0], dtype=torch.float64)),
            **EXACT,
        )

    def test_scale_layer_scales_all_active_experts(self):
        layer, x = example("conv1d")
        weights = random_weights(3)
        before = layer(x, routing_weights=weights)
        layer.scale_layer(3.0)
        torch.testing.assert_close(
            layer(x, routing_weights=weights) - layer.base_layer(x), 3 * (before - layer.base_layer(x)), **EXACT
        )

    @pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d of two groups"])
    @pytest.mark.parametrize("with_bias", [("one", "two", "three"), ("two",)], ids=["all", "one of three"])
    def test_the_bias_of_an_expert_is_weighted_and_scaled_with_it(self, kind, with_bias):
        experts = {name: {**config, "lora_bias": name in with_bias} for name, config in EXPERTS.items()}
        layer, x = example(kind, experts)
        weights = random_weights(*token_shape(layer, x), 3)
        routed = layer(x, routing_weights=weights)
        torch.testing.assert_close(routed, one_expert_at_a_time(layer, x, weights), **EXACT)
        for name in with_bias:
            nn.init.zeros_(layer.lora_B[name].bias)
        assert not torch.allclose(layer(x, routing_weights=weights), routed)

    def test_the_bias_of_an_expert_gets_its_gradient(self):
        experts = {name: {**config, "lora_bias": name != "one"} for name, config in EXPERTS.items()}
        layer, x = example("linear", experts)
        weights = random_weights(2, 3, 3)
        biases = [layer.lora_B[name].bias for name in ("two", "three")]
        ours = torch.autograd.grad(layer(x, routing_weights=weights).square().sum(), biases)
        theirs = torch.autograd.grad(token_loop(layer, x, weights).square().sum(), biases)
        torch.testing.assert_close(ours, theirs, **EXACT)


class TestDropout:
    """Each expert writes outputs of its own and A is the identity, so that the output shows the masks: x is all ones."""

    FEATURES = 400

    def masks(self, *rates):
        size, names = self.FEATURES, ("one", "two", "three")[: len(rates)]
        experts = {name: {"r": size, "lora_alpha": size, "lora_dropout": p} for name, p in zip(names, rates)}
        layer = adapted(nn.Linear(size, size * len(rates), bias=False), experts)
        with torch.no_grad():
            layer.get_base_layer().weight.zero_()
            for column, name in enumerate(names):
                layer.lora_A[name].weight.copy_(torch.eye(size))
                layer.lora_B[name].weight.zero_()[column * size : (column + 1) * size] = torch.eye(size)
        layer.train()
        out = layer(torch.ones(1, size, dtype=torch.float64), routing_weights=torch.ones(len(rates)).double())
        return out.reshape(len(rates), size).unbind()

    def test_experts_of_equal_dropout_share_one_mask(self):
        first, other, second = self.masks(0.5, 0.25, 0.5)
        assert torch.equal(first, second)
        assert not torch.equal(first > 0, other > 0)

    def test_each_expert_drops_at_its_own_rate_and_rescales_what_is_left(self):
        for mask, rate in zip(self.masks(0.5, 0.25, 0.0), (0.5, 0.25, 0.0)):
            kept = mask > 0
            torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - rate)), **EXACT)
            # 400 draws: four standard deviations are at most 0.1
            assert abs(kept.double().mean().item() - (1 - rate)) <= 4 * (rate * (1 - rate) / self.FEATURES) ** 0.5

    @pytest.mark.parametrize("kind", ["linear", "conv2d of two groups"])
    def test_unequal_dropout_keeps_each_experts_weight_and_scaling(self, kind):
        rates = {"one": 0.3, "two": 0.0, "three": 0.3}
        layer, x = example(kind, {name: {**EXPERTS[name], "lora_dropout": rates[name]} for name in EXPERTS})
        weights = random_weights(*token_shape(layer, x), 3)
        layer.train()
        torch.manual_seed(0)
        routed = layer(x, routing_weights=weights)

        torch.manual_seed(0)
        masked = F.dropout(x, 0.3)  # the one mask that the first and the third share
        layer.eval()
        dropped = one_expert_at_a_time(layer, masked, weights * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
        kept = one_expert_at_a_time(layer, x, weights * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
        torch.testing.assert_close(routed, dropped - layer.base_layer(masked) + kept, **EXACT)
        assert not torch.allclose(routed, one_expert_at_a_time(layer, x, weights))

    def test_nothing_is_dropped_in_eval(self):
        layer, x = example("linear", {name: {**EXPERTS[name], "lora_dropout": 0.5} for name in EXPERTS})
        weights = random_weights(2, 3, 3)
        torch.testing.assert_close(layer(x, routing_weights=weights), token_loop(layer, x, weights), **EXACT)


class TestDtypes:
    @pytest.mark.parametrize("kind", ["linear", "transformers Conv1D", "embedding", "conv2d"])
    @pytest.mark.parametrize(
        "base, adapters", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
    )
    def test_the_output_has_the_base_layers_dtype_and_the_oracles_values(self, kind, base, adapters):
        layer, x = example(kind)
        weights = random_weights(*token_shape(layer, x), 3)
        expected = one_expert_at_a_time(layer, x, weights)
        self.cast(layer, getattr(torch, base), dict.fromkeys(EXPERTS, getattr(torch, adapters)))
        x = x.to(getattr(torch, base)) if x.is_floating_point() else x
        routed = layer(x, routing_weights=weights.to(torch.float32))
        assert routed.dtype == getattr(torch, base)
        torch.testing.assert_close(routed.double(), expected, **(FP32 if base == "float32" else BF16))

    @pytest.mark.parametrize("kind", ["linear", "embedding", "conv1d of two groups"])
    def test_experts_may_differ_in_dtype(self, kind):
        layer, x = example(kind)
        weights = random_weights(*token_shape(layer, x), 3)
        expected = one_expert_at_a_time(layer, x, weights)
        self.cast(layer, torch.float32, {"one": torch.bfloat16, "two": torch.float32, "three": torch.bfloat16})
        x = x.float() if x.is_floating_point() else x
        routed = layer(x, routing_weights=weights)
        assert routed.dtype == torch.float32
        torch.testing.assert_close(routed.double(), expected, **BF16)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_weights_may_have_any_floating_dtype(self, dtype):
        layer, x = example("linear")
        self.cast(layer, torch.float32, dict.fromkeys(EXPERTS, torch.float32))
        weights = torch.tensor([0.5, -0.25, 2.0])  # exact in bf16
        expected = layer(x.float(), routing_weights=weights)
        assert torch.equal(layer(x.float(), routing_weights=weights.to(dtype)), expected)

    def test_autocast_computes_in_its_own_dtype_and_is_close(self):
        layer, x = example("linear")
        weights = random_weights(2, 3, 3)
        expected = token_loop(layer, x, weights)
        self.cast(layer, torch.float32, dict.fromkeys(EXPERTS, torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            routed = layer(x.float(), routing_weights=weights.float())
        assert routed.dtype == torch.bfloat16
        torch.testing.assert_close(routed.double(), expected, **BF16)

    def test_gradients_of_float32_experts_on_a_bfloat16_base_stay_float32(self):
        layer, x = example("linear")
        self.cast(layer, torch.bfloat16, dict.fromkeys(EXPERTS, torch.float32))
        weights = random_weights(2, 3, 3, dtype=torch.float32).requires_grad_()
        layer(x.bfloat16(), routing_weights=weights).float().square().sum().backward()
        assert weights.grad.dtype == torch.float32
        assert all(factor.grad.dtype == torch.float32 for factor in trained_factors(layer).values())

    @staticmethod
    def cast(layer, base_dtype, adapter_dtypes):
        for name, parameter in layer.named_parameters():
            adapter = next((adapter for adapter in EXPERTS if f".{adapter}" in name), None)
            parameter.data = parameter.data.to(base_dtype if "lora_" not in name else adapter_dtypes[adapter])
        for buffer in layer.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(base_dtype)


class TestCost:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("ranks", [(2,) * 8, (2, 4) * 4], ids=["equal ranks", "unequal ranks"])
    def test_no_tensor_of_tokens_times_experts_times_outputs_exists(self, training, ranks):
        experts = {f"e{i}": {"r": rank, "lora_dropout": 0.1 * training} for i, rank in enumerate(ranks)}
        tokens, inputs, outputs = 40, 16, 32
        layer = adapted(nn.Linear(inputs, outputs), experts, dtype=torch.float32).train(training)
        x = torch.randn(2, tokens // 2, inputs, requires_grad=training)
        weights = torch.rand(2, tokens // 2, 8, requires_grad=training)
        with Recorder() as recorder:
            out = layer(x, routing_weights=weights)
            if training:
                out.sum().backward()
        # the largest that are needed: tokens x outputs, tokens x all ranks, all ranks x outputs
        assert max(recorder.sizes) <= max(tokens * outputs, tokens * sum(ranks), sum(ranks) * outputs)
        assert max(recorder.sizes) < tokens * 8 * outputs

    @pytest.mark.parametrize("num_experts", [2, 16])
    @torch.no_grad()
    def test_the_number_of_matrix_products_does_not_grow_with_the_experts(self, num_experts):
        layer = adapted(nn.Linear(6, 5), {f"e{i}": {"r": 2} for i in range(num_experts)})
        with Recorder() as recorder:
            layer(torch.randn(2, 3, 6).double(), routing_weights=random_weights(2, 3, num_experts))
        products = [name for name in recorder.operators if name in ("mm", "addmm", "bmm", "linear", "matmul")]
        assert len(products) == 3  # the base layer, A, B


class StubQuantized(nn.Module):
    """A frozen linear layer of 8-bit integers, which returns a tensor that nobody may write to."""

    def __init__(self, in_features=5, out_features=4):
        super().__init__()
        # The names by which PEFT's layers find the sizes of quantized layers of several libraries.
        self.in_features = self.infeatures = in_features
        self.out_features = self.outfeatures = out_features
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("qweight", torch.randint(-9, 9, (out_features, in_features), generator=generator).char())
        self.returned = []

    def forward(self, x):
        self.returned.append(F.linear(x, self.qweight.to(x.dtype) / 8))
        return self.returned[-1]


def lora_class_for(monkeypatch, module_name, class_name, fakes):
    """A LoRA class that PEFT only defines where a quantization library is installed: its module, run with a stub."""
    for name, attributes in fakes.items():
        fake = types.ModuleType(name)
        vars(fake).update(attributes)
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(import_utils, f"is_{module_name}_available", lambda: True)
    origin = importlib.util.find_spec(f"peft.tuners.lora.{module_name}").origin
    spec = importlib.util.spec_from_file_location(f"peft.tuners.lora.{module_name}_on_stub", origin)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, class_name)


ALWAYS_DEFINED = {"gptq": GPTQLoraLinear, "awq": AwqLoraLinear, "aqlm": AqlmLoraLinear, "te": TeLinear}
ONLY_WITH_THEIR_LIBRARY = {
    "hqq": ("HqqLoraLinear", {"hqq": {}, "hqq.core": {}, "hqq.core.quantize": {"HQQLinear": StubQuantized}}),
    "eetq": ("EetqLoraLinear", {"eetq": {"EetqLinear": StubQuantized}}),
}
quantized_layers = pytest.mark.parametrize("kind", [*ALWAYS_DEFINED, *ONLY_WITH_THEIR_LIBRARY])


class TestQuantizedLayers:
    """The libraries are not needed: what counts is that the update is added to whatever their layer returns."""

    def layer_of(self, kind, monkeypatch):
        if kind in ALWAYS_DEFINED:
            cls = ALWAYS_DEFINED[kind]
        else:
            name, fakes = ONLY_WITH_THEIR_LIBRARY[kind]
            cls = lora_class_for(monkeypatch, kind, name, fakes)
        torch.manual_seed(0)
        arguments = {"r": 2, "lora_alpha": 4}
        layer = cls(StubQuantized(), "one", config=LoraConfig(init_lora_weights=False, **arguments), **arguments)
        for name in ("two", "three"):
            layer.update_layer(name, config=LoraConfig(init_lora_weights=False, **EXPERTS[name]), **self.ranks(name))
        layer.set_adapter(["one", "two", "three"])
        return layer.double().eval()

    @staticmethod
    def ranks(name):
        return {"r": EXPERTS[name]["r"], "lora_alpha": EXPERTS[name]["lora_alpha"]}

    @every_weight_shape
    @quantized_layers
    def test_equals_a_loop_over_tokens_and_experts(self, kind, weight_shape, monkeypatch):
        layer = self.layer_of(kind, monkeypatch)
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        weights = weights_of_shape(weight_shape, (2, 3))
        torch.testing.assert_close(layer(x, routing_weights=weights), token_loop(layer, x, weights), **EXACT)

    @quantized_layers
    def test_what_the_quantized_layer_returned_is_not_written_to(self, kind, monkeypatch):
        layer = self.layer_of(kind, monkeypatch)
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        routed = layer(x, routing_weights=random_weights(3))
        (returned,) = layer.base_layer.returned
        assert returned is not routed
        assert returned._version == 0
        assert torch.equal(returned, F.linear(x, layer.base_layer.qweight.double() / 8))

    @quantized_layers
    def test_half_precision_in_gives_half_precision_out(self, kind, monkeypatch):
        layer = self.layer_of(kind, monkeypatch)
        x, weights = torch.randn(2, 3, 5, dtype=torch.float64), random_weights(2, 3, 3)
        expected = token_loop(layer, x, weights)
        routed = layer.float()(x.bfloat16(), routing_weights=weights.float())
        assert routed.dtype == torch.bfloat16
        torch.testing.assert_close(routed.double(), expected, **BF16)

    def test_torchao_layers_route(self, monkeypatch):
        for name, attributes in {"torchao": {}, "torchao.quantization": {"Int4Tensor": type(None)}}.items():
            fake = types.ModuleType(name)
            vars(fake).update(attributes)
            monkeypatch.setitem(sys.modules, name, fake)
        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
        with pytest.warns(UserWarning, match="without `get_apply_tensor_subclass`"):
            layer = TorchaoLoraLinear(nn.Linear(5, 4), "one", config=config, r=2, lora_alpha=4)
        layer.update_layer("two", r=4, lora_alpha=2, config=LoraConfig(r=4, lora_alpha=2, init_lora_weights=False))
        layer.set_adapter(["one", "two"])
        layer.double().eval()
        x, weights = torch.randn(2, 3, 5).double(), random_weights(2, 3, 2)
        torch.testing.assert_close(layer(x, routing_weights=weights), token_loop(layer, x, weights), **EXACT)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_bitsandbytes_layers_route_on_the_cpu(self, bits):
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

        torch.manual_seed(0)
        dense = torch.randn(32, 64)
        if bits == 8:
            base = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
            base.weight = bitsandbytes.nn.Int8Params(dense, requires_grad=False, has_fp16_weights=False)
            cls = Linear8bitLt
        else:
            base = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
            base.weight = bitsandbytes.nn.Params4bit(dense, requires_grad=False)
            cls = Linear4bit
        layer = cls(base.to("cpu"), "one", config=LoraConfig(init_lora_weights=False, r=2), r=2, lora_alpha=4)
        layer.update_layer("two", r=4, lora_alpha=2, config=LoraConfig(init_lora_weights=False, r=4))
        layer.set_adapter(["one", "two"])
        layer.eval()
        assert base.weight.dtype == (torch.int8 if bits == 8 else torch.uint8)  # quantized, not merely wrapped
        x, weights = torch.randn(2, 3, 64), random_weights(2, 3, 2, dtype=torch.float32)
        # float32, values of order ten, sums over 64 inputs
        torch.testing.assert_close(
            layer(x, routing_weights=weights), one_expert_at_a_time(layer, x, weights), rtol=1e-4, atol=1e-4
        )


class TestKeptStack:
    """In eval the concatenated factors are kept until a weight changes."""

    @pytest.fixture
    def model(self):
        return adapted_model(nn.Linear(5, 4), SAME_RANK)

    @pytest.fixture
    def layer(self, model):
        return model.base_model.model.layer

    x = random_weights(2, 3, 5, seed=1)
    weights = random_weights(2, 3, 3)

    @torch.no_grad()
    def routed(self, layer):
        return layer(self.x, routing_weights=self.weights)

    def assert_fresh(self, layer):
        torch.testing.assert_close(self.routed(layer), token_loop(layer, self.x, self.weights), **EXACT)

    def test_it_is_made_once_and_reused(self, layer):
        assert concatenations(lambda: self.routed(layer)) == 2  # A and B
        assert concatenations(lambda: self.routed(layer)) == 0

    def test_it_is_reused_for_other_inputs_and_weights(self, layer):
        self.routed(layer)
        with torch.no_grad():
            again = concatenations(lambda: layer(self.x[:1], routing_weights=random_weights(3, seed=2)))
        assert again == 0

    def test_it_is_reused_with_gradients_on_where_no_expert_trains(self, layer):
        layer.requires_grad_(False)
        weights = self.weights.clone().requires_grad_()
        layer(self.x, routing_weights=weights)
        assert concatenations(lambda: layer(self.x, routing_weights=weights)) == 0
        (ours,) = torch.autograd.grad(layer(self.x, routing_weights=weights).square().sum(), weights)
        (theirs,) = torch.autograd.grad(token_loop(layer, self.x, weights).square().sum(), weights)
        torch.testing.assert_close(ours, theirs, **EXACT)

    def test_it_is_not_part_of_the_state_dict(self, layer):
        before = set(layer.state_dict())
        self.routed(layer)
        assert set(layer.state_dict()) == before

    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_it_follows_an_optimizer_step(self, layer, optimizer, foreach):
        self.routed(layer)
        optimizer = optimizer(layer.parameters(), lr=0.1, foreach=foreach)
        token_loop(layer, self.x, self.weights).square().sum().backward()  # the layer itself never runs in training
        optimizer.step()
        self.assert_fresh(layer)

    def test_it_follows_a_training_step_that_writes_through_data(self, layer):
        self.routed(layer)
        layer.train()
        layer(self.x, routing_weights=self.weights).square().sum().backward()
        for factor in trained_factors(layer).values():
            factor.data.sub_(0.1 * factor.grad)
        layer.eval()
        self.assert_fresh(layer)

    def test_it_follows_a_new_tensor_put_into_data(self, layer):
        self.routed(layer)
        for factor in trained_factors(layer).values():
            factor.data = factor.data * 2
        self.assert_fresh(layer)

    def test_it_follows_load_state_dict(self, layer):
        self.routed(layer)
        layer.load_state_dict({key: value * 1.5 for key, value in layer.state_dict().items()})
        self.assert_fresh(layer)

    def test_it_follows_load_state_dict_that_assigns(self, layer):
        self.routed(layer)
        layer.load_state_dict({key: value * 1.5 for key, value in layer.state_dict().items()}, assign=True)
        self.assert_fresh(layer)

    def test_it_follows_a_change_made_in_inference_mode(self, layer):
        self.routed(layer)
        with torch.inference_mode():
            layer.lora_B["two"].weight.mul_(3)
        self.assert_fresh(layer)

    def test_it_follows_another_dtype_there_and_back(self, layer):
        self.routed(layer)
        layer.to(torch.bfloat16)
        layer(self.x.bfloat16(), routing_weights=self.weights)
        layer.to(torch.float64)
        self.assert_fresh(layer)

    def test_it_follows_another_dtype_there_and_back_without_a_call_between(self, layer):
        self.routed(layer)
        layer.to(torch.bfloat16).to(torch.float64)  # what bf16 cannot hold is lost
        self.assert_fresh(layer)

    def test_it_follows_an_adapter_added_and_deleted(self, model, layer):
        self.routed(layer)
        model.add_adapter("d", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
        model.base_model.set_adapter(["one", "two", "d"])
        self.assert_fresh(layer)
        model.delete_adapter("two")
        model.base_model.set_adapter(["one", "three", "d"])
        self.assert_fresh(layer)

    def test_it_follows_an_adapter_deleted_and_made_anew_under_its_name(self, model, layer):
        self.routed(layer)
        model.delete_adapter("three")
        model.add_adapter("three", LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], init_lora_weights=False))
        model.base_model.set_adapter(["one", "two", "three"])
        self.assert_fresh(layer)

    def test_it_follows_the_order_of_the_active_adapters(self, model, layer):
        self.routed(layer)
        model.base_model.set_adapter(["three", "one", "two"])
        self.assert_fresh(layer)

    def test_it_follows_fewer_active_adapters(self, model, layer):
        self.routed(layer)
        model.base_model.set_adapter(["one", "two"])
        with torch.no_grad():
            routed = layer(self.x, routing_weights=self.weights[..., :2])
        torch.testing.assert_close(routed, token_loop(layer, self.x, self.weights[..., :2]), **EXACT)

    @torch.no_grad()
    def test_it_follows_another_parameter_on_the_same_memory(self, layer):
        self.routed(layer)
        before = layer.lora_A["one"].weight
        after = nn.Parameter(before.data)
        while after._version < before._version:  # so that neither address nor version tells them apart
            after.mul_(1.5)
        layer.lora_A["one"].weight = after
        assert before._version > 0
        self.assert_fresh(layer)

    def test_it_follows_set_scale(self, layer):
        before = self.routed(layer)
        layer.set_scale("one", 4.0)
        scaled = token_loop(layer, self.x, self.weights * torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(self.routed(layer), scaled, **EXACT)
        assert not torch.allclose(before, scaled)

    def test_a_deep_copy_holds_its_own(self, layer):
        self.routed(layer)
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.lora_A["one"].weight.zero_()
        self.assert_fresh(twin)
        self.assert_fresh(layer)

    def test_a_model_saved_whole_and_loaded_computes_afresh(self, layer, tmp_path):
        self.routed(layer)
        torch.save(layer, tmp_path / "layer.pt")
        loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
        with torch.no_grad():
            loaded.lora_A["one"].weight.mul_(2)
        self.assert_fresh(loaded)

    def test_made_in_inference_mode_it_serves_grad_mode(self, layer):
        with torch.inference_mode():
            layer(self.x, routing_weights=self.weights)
        layer.requires_grad_(False)
        weights = self.weights.clone().requires_grad_()
        (ours,) = torch.autograd.grad(layer(self.x, routing_weights=weights).square().sum(), weights)
        (theirs,) = torch.autograd.grad(token_loop(layer, self.x, weights).square().sum(), weights)
        torch.testing.assert_close(ours, theirs, **EXACT)

    def test_parameters_loaded_in_inference_mode_route(self):
        with torch.inference_mode():
            layer = adapted(nn.Linear(5, 4), SAME_RANK)
            self.assert_fresh(layer)
            layer.lora_A["one"].weight.mul_(2)
            self.assert_fresh(layer)

    def test_training_leaves_nothing_kept(self, layer):
        self.routed(layer)
        layer.train()
        layer(self.x, routing_weights=self.weights)
        assert moe_stack.STACK_CACHE_KEY not in layer._caches

    def test_an_embedding_keeps_its_own(self):
        layer, ids = example("embedding", SAME_RANK)
        weights = random_weights(2, 3, 3)
        with torch.no_grad():
            layer(ids, routing_weights=weights)
            # the looked-up rows are concatenated in each call, the B factors once
            assert concatenations(lambda: layer(ids, routing_weights=weights)) == 1
            layer.lora_embedding_B["three"].mul_(2)
            torch.testing.assert_close(layer(ids, routing_weights=weights), token_loop(layer, ids, weights), **EXACT)


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, variant",
        [
            ({"use_dora": True}, "Dora"),
            ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "ALora"),
            ({"init_lora_weights": "mica"}, "MiCA"),
        ],
    )
    def test_a_variant_is_refused_by_its_name(self, arguments, variant):
        experts = {"plain": {"r": 2}, "other": {"r": 2, **arguments}}
        layer = adapted(nn.Linear(5, 4), experts, dtype=torch.float32)  # MiCA refuses float64
        message = rf"Adapter 'other' uses the LoRA variant {variant}\w+.*cannot be weighted per token. Use plain LoRA"
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(2, 5), routing_weights=random_weights(2))

    def test_a_variant_that_is_not_active_is_no_hindrance(self):
        layer = adapted(nn.Linear(5, 4), {"plain": {"r": 2}, "dora": {"r": 2, "use_dora": True}})
        layer._active_adapter = ["plain"]
        x, weights = torch.randn(2, 5).double(), random_weights(1)
        torch.testing.assert_close(layer(x, routing_weights=weights), token_loop(layer, x, weights), **EXACT)

    @pytest.mark.parametrize("absent", [lambda factor: factor.to("meta"), lambda factor: factor.detach()[:0]])
    def test_weights_that_are_offloaded_or_partitioned_are_refused_and_named(self, absent):
        layer = adapted_model(nn.Linear(5, 4), SAME_RANK).base_model.model.layer
        name = layer.active_adapters[1]
        layer.lora_A[name].weight = nn.Parameter(absent(layer.lora_A[name].weight))
        with pytest.raises(ValueError, match=f"weights of adapter '{name}' are not on a device"):
            layer(random_weights(2, 3, 5), routing_weights=random_weights(2, 3, 3))

    def test_merged_adapters_are_refused_and_named(self):
        layer, x = example("linear")
        layer.merge(adapter_names=["two"])
        with pytest.raises(ValueError, match=r"merged adapters \(\['two'\]\); call `unmerge_adapter` first"):
            layer(x, routing_weights=random_weights(3))
        layer.unmerge()
        weights = random_weights(3)
        torch.testing.assert_close(layer(x, routing_weights=weights), token_loop(layer, x, weights), **EXACT)

    def test_adapter_names_are_refused(self):
        layer, x = example("linear")
        with pytest.raises(ValueError, match="routing_weights and adapter_names cannot be combined.*one-hot rows"):
            layer(x, routing_weights=random_weights(3), adapter_names=["one", "two"])

    def test_alora_offsets_are_refused(self):
        layer, x = example("linear")
        with pytest.raises(ValueError, match="cannot be combined with aLoRA"):
            layer(x, routing_weights=random_weights(3), alora_offsets=[1, 1])


class TestRoutingOff:
    @every_layer
    def test_the_output_is_bit_for_bit_what_upstream_computes(self, kind):
        layer, x = example(kind)
        expected = layer.base_layer(x)
        for name in EXPERTS:  # as upstream writes it: one adapter after the other
            if len(layer.lora_embedding_A):
                update = layer._embed(x, layer.lora_embedding_A[name].T) @ layer.lora_embedding_B[name].T
                update = update * layer.scaling[name]
                scale = layer._get_embed_scale()
                expected = expected + (update if scale is None else update * scale.to(update.dtype))
            else:
                expected = expected + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        assert torch.equal(layer(x), expected)

    def test_weights_of_none_are_no_weights(self):
        layer, x = example("linear")
        assert torch.equal(layer(x, routing_weights=None), layer(x))


class TestCompile:
    """Invariant: a routed layer compiles without a graph break and gives the same result."""

    @staticmethod
    def assert_compiles(layer, x, backend):
        torch._dynamo.reset()
        weights = random_weights(*token_shape(layer, x), 3).requires_grad_()
        wanted = [weights, *trained_factors(layer).values()]
        compiled = torch.compile(lambda x, w: layer(x, routing_weights=w), fullgraph=True, backend=backend)
        eager = layer(x, routing_weights=weights)
        routed = compiled(x, weights)
        torch.testing.assert_close(routed, eager, **EXACT)
        ours = torch.autograd.grad(routed.square().sum(), wanted)
        theirs = torch.autograd.grad(eager.square().sum(), wanted)
        torch.testing.assert_close(ours, theirs, **EXACT)

    @every_layer
    def test_every_layer_compiles_without_a_graph_break(self, kind):
        self.assert_compiles(*example(kind), backend="eager")

    def test_ahead_of_time_autograd_gives_the_same_gradients(self):
        self.assert_compiles(*example("linear"), backend="aot_eager")

    def test_in_eval_it_follows_weights_that_change(self):
        torch._dynamo.reset()
        layer, x = example("linear")
        weights = random_weights(2, 3, 3)
        compiled = torch.compile(lambda x, w: layer(x, routing_weights=w), fullgraph=True, backend="eager")
        with torch.no_grad():
            layer(x, routing_weights=weights)  # keeps a stack that the compiled layer must not use
            compiled(x, weights)
            layer.lora_A["one"].weight.mul_(2)
            torch.testing.assert_close(compiled(x, weights), token_loop(layer, x, weights), **EXACT)

    @pytest.mark.slow
    def test_a_layer_compiled_by_inductor_gives_the_same(self):
        self.assert_compiles(*example("linear"), backend="inductor")
