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
"""The arithmetic of a routed linear layer against a loop over tokens and experts, and the choice between its forms."""

from random import Random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peft.tuners.lora.moe_path import sparse_pays
from peft.tuners.lora.moe_product import NORM_EPSILON, add_sparse, add_stacked, project


class Case:
    """A layer's tensors in float64, all of them differentiated."""

    def __init__(self, num_tokens, ranks, kept, seed, inputs=5, outputs=3):
        self.generator = torch.Generator().manual_seed(seed)
        self.ranks, self.kept = ranks, min(kept, len(ranks))
        self.x = self.random(num_tokens, inputs)
        self.result = self.random(num_tokens, outputs)
        self.rows = [self.random(rank, inputs) for rank in ranks]
        self.columns = [self.random(outputs, rank) for rank in ranks]
        self.gate = self.random(len(ranks), inputs)
        scores = torch.rand(num_tokens, len(ranks), generator=self.generator, dtype=torch.float64)
        self.mask = torch.zeros_like(scores).scatter(-1, scores.topk(self.kept).indices, 1.0)
        self.weights = (scores * self.mask).requires_grad_()

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).requires_grad_()

    def looped(self):
        updated = []
        for token, result, row in zip(self.x, self.result, self.weights):
            for weight, A, B in zip(row, self.rows, self.columns):
                result = result + weight * (B @ (A @ token))
            updated.append(result)
        return torch.stack(updated)

    def leaves(self):
        return [self.result, self.x, self.weights, *self.rows, *self.columns]

    def stacked(self):
        hidden, _ = project(self.x, self.rows, 0, torch.float64)
        return add_stacked(self.result, hidden, self.weights, self.columns, self.ranks)

    def sparse(self):
        return add_sparse(self.result, self.x, self.weights, self.rows, self.columns, self.kept, torch.float64)


def random_cases(count=25):
    random = Random(0)
    for seed in range(count):
        ranks = [random.randint(1, 4) for _ in range(random.randint(1, 7))]
        yield random.randint(1, 9), ranks, random.randint(1, 7), seed


cases = pytest.mark.parametrize(("num_tokens", "ranks", "kept", "seed"), list(random_cases()))


@cases
def test_the_stacked_form_and_all_its_gradients_equal_the_loop(num_tokens, ranks, kept, seed):
    case = Case(num_tokens, ranks, kept, seed)
    stacked, looped = case.stacked(), case.looped()
    torch.testing.assert_close(stacked, looped)  # float64: only the order of the sums differs
    upstream = torch.randn_like(looped)
    got = torch.autograd.grad(stacked, case.leaves(), upstream)
    torch.testing.assert_close(got, torch.autograd.grad(looped, case.leaves(), upstream))


@cases
def test_the_sparse_form_and_all_its_gradients_equal_the_loop(num_tokens, ranks, kept, seed):
    case = Case(num_tokens, [ranks[0]] * len(ranks), kept, seed)
    sparse, looped = case.sparse(), case.looped()
    torch.testing.assert_close(sparse, looped)
    upstream = torch.randn_like(looped)
    got = list(torch.autograd.grad(sparse, case.leaves(), upstream))
    want = list(torch.autograd.grad(looped, case.leaves(), upstream))
    # an expert that was not kept has no path to the output, so its weight has no gradient in the sparse form
    got[2], want[2] = got[2] * case.mask, want[2] * case.mask
    torch.testing.assert_close(got, want)


@cases
def test_scores_are_those_of_the_normalised_input(num_tokens, ranks, kept, seed):
    case = Case(num_tokens, ranks, kept, seed)
    hidden, scores = project(case.x, [*case.rows, case.gate], len(ranks), torch.float64)
    inverse_rms = torch.rsqrt(case.x.square().mean(dim=1, keepdim=True) + NORM_EPSILON)
    plain = [case.x @ torch.cat(case.rows).t(), (case.x * inverse_rms) @ case.gate.t()]
    torch.testing.assert_close([hidden, scores], plain)
    leaves = [case.x, case.gate, *case.rows]
    upstream = [torch.randn_like(tensor) for tensor in plain]
    got = torch.autograd.grad([hidden, scores], leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(plain, leaves, upstream))


@pytest.mark.parametrize("form", ["stacked", "sparse"])
def test_second_derivatives_are_those_of_finite_differences(form):
    case = Case(3, [2, 2] if form == "sparse" else [2, 1], 2, seed=0)

    def update(*leaves):
        case.result, case.x, case.weights = leaves[:3]
        case.rows, case.columns = leaves[3:5], leaves[5:]
        return getattr(case, form)()

    assert torch.autograd.gradgradcheck(update, case.leaves())


def test_second_derivatives_of_scores_are_those_of_finite_differences():
    case = Case(3, [2, 1], 2, seed=0)
    assert torch.autograd.gradgradcheck(
        lambda x, gate, *rows: project(x, [*rows, gate], 2, torch.float64), (case.x, case.gate, *case.rows)
    )


@pytest.mark.parametrize("trained", ["rows of one expert", "columns of one expert", "gate", "x", "weights", "result"])
@pytest.mark.parametrize("form", ["stacked", "sparse"])
def test_what_does_not_train_gets_no_gradient_and_costs_the_others_nothing(form, trained):
    case = Case(6, [2, 2, 2] if form == "sparse" else [2, 3, 2], 2, seed=1)
    every = {
        "rows of one expert": case.rows[1],
        "columns of one expert": case.columns[2],
        "gate": case.gate,
        "x": case.x,
        "weights": case.weights,
        "result": case.result,
    }

    def update():
        if form == "sparse":
            updated, (_, scores) = case.sparse(), project(case.x, [case.gate], 3, torch.float64)
        else:
            hidden, scores = project(case.x, [*case.rows, case.gate], 3, torch.float64)
            updated = add_stacked(case.result, hidden, case.weights, case.columns, case.ranks)
        return updated.square().sum() + scores.square().sum()

    (want,) = torch.autograd.grad(update(), every[trained])
    for leaf in [*case.leaves(), case.gate]:
        leaf.requires_grad_(leaf is every[trained])
    (got,) = torch.autograd.grad(update(), every[trained])
    torch.testing.assert_close(got, want)


def test_parts_and_one_stacked_tensor_give_the_same():
    case = Case(6, [2, 3], 2, seed=2)
    hidden, _ = project(case.x, [torch.cat(case.rows)], 0, torch.float64)
    whole = add_stacked(case.result, hidden, case.weights, [torch.cat(case.columns, dim=1)], case.ranks)
    torch.testing.assert_close(whole, case.stacked(), rtol=0, atol=0)


def test_nothing_but_input_hidden_and_weights_is_kept_for_the_backward():
    num_tokens, inputs, outputs, ranks = 64, 32, 48, [4] * 8
    case = Case(num_tokens, ranks, 8, seed=0, inputs=inputs, outputs=outputs)
    parameters = {tensor.data_ptr() for tensor in [case.gate, *case.rows, *case.columns]}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = project(case.x, [*case.rows, case.gate], 8, torch.float64)
        add_stacked(case.result, hidden, case.weights, case.columns, ranks)
    numbers = inputs + (32 + 8) + 8 + 8 + 1  # x; the product; its normalised scores; the weights; one over rms
    assert sum(kept.values()) == num_tokens * numbers * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["stacked", "sparse"])
def test_half_precision_is_close_and_keeps_the_dtypes(form, dtype):
    case = Case(16, [4, 4, 4], 2, seed=3, inputs=32, outputs=16)
    exact = torch.autograd.grad(getattr(case, form)().sum(), case.leaves())
    for name in ("result", "x", "weights"):
        setattr(case, name, getattr(case, name).detach().to(dtype).requires_grad_())
    hidden = project(case.x, case.rows, 0, dtype)[0]
    if form == "stacked":
        updated = add_stacked(case.result, hidden, case.weights, case.columns, case.ranks)
    else:
        updated = add_sparse(case.result, case.x, case.weights, case.rows, case.columns, case.kept, dtype)
    assert updated.dtype == dtype
    grads = torch.autograd.grad(updated.sum(), case.leaves())
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in case.leaves()]
    for grad, want in zip(grads, exact):
        # each is a sum of at most 16 x 12 products of numbers rounded to 8 bits
        assert (grad - want).abs().max() <= 0.05 * want.abs().max()


def test_the_sparse_arithmetic_does_not_grow_with_the_number_of_experts():
    def update_flops(num_experts):
        case = Case(64, [2] * num_experts, 2, seed=0, inputs=16, outputs=16)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            case.sparse()
        return counter.get_total_flops()

    assert update_flops(64) == update_flops(4) == 64 * 2 * (2 * 16 * 2 + 2 * 2 * 16)


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_tokens, num_experts, taken",
    [
        (1, 63, False),
        (1, 64, True),
        (31, 32, False),
        (32, 32, True),
        (511, 31, False),
        (512, 16, True),
        (512, 15, False),
    ],
)
def test_the_sparse_form_is_taken_where_it_was_measured_to_win(num_tokens, num_experts, taken):
    assert sparse_pays(num_tokens, [16] * num_experts, 2, torch.float32, "cpu") == taken


@pytest.mark.parametrize(
    "kept, dtype, device", [(None, torch.float32, "cpu"), (2, torch.bfloat16, "cpu"), (2, torch.float32, "cuda")]
)
def test_the_sparse_form_is_not_taken_where_it_loses_or_k_is_not_fixed(kept, dtype, device):
    assert not sparse_pays(512, [16] * 128, kept, dtype, device)


def test_experts_of_unequal_ranks_take_the_stacked_form():
    assert not sparse_pays(512, [16] * 127 + [8], 2, torch.float32, "cpu")
