"""Quantising a whole mixture: every expert by its own tokens, layer after layer, and never a zeroed one."""

import copy

import pytest
import torch
from torch.nn.functional import linear, silu

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")

from moe_ext.gptq import hessian_of
from moe_ext.router_ft.formats import round_to_nearest, scales_of, unpack
from moe_ext.router_ft.gptq import gptq
from moe_ext.router_ft.matrices import find_matrices
from moe_ext.router_ft.plan import uniform_plan
from moe_ext.router_ft.quantize import quantize_model
from moe_ext.routers import moe_layers


def some_blocks(count=8, length=64, seed=0):
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(module, model, blocks):
    """What a module is called with on the blocks, by running the whole model."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        model(blocks, use_cache=False)
    hook.remove()
    return seen


def test_each_expert_is_gptq_of_the_tokens_routed_to_it_in_the_model_quantised_so_far(family, model_of):
    model, blocks = model_of(family), some_blocks()
    plan = uniform_plan(find_matrices(model), "INT3")
    quantized = copy.deepcopy(model)
    reports = {report.name: report for report in quantize_model(quantized, plan, blocks).reports}
    # The oracle runs the model as a whole, with all layers before the one it looks at already quantised.
    layer = moe_layers(model)[-1]
    so_far = copy.deepcopy(quantized)
    experts = moe_layers(so_far)[-1].experts
    experts.load_state_dict(layer.experts.state_dict())
    ((hidden, chosen, *_),) = inputs_of(experts, so_far, blocks)
    for matrix in find_matrices(model):
        if matrix.kind == "expert" and matrix.layer == layer.index:
            tokens = hidden.flatten(0, -2)[(chosen.flatten(0, -2) == matrix.expert).any(dim=1)]
            if not matrix.reads_hidden:
                gate, up = linear(tokens, moe_layers(quantized)[-1].experts.gate_up_proj[matrix.expert]).chunk(2, -1)
                tokens = silu(gate) * up
            weight = matrix.weight(model)
            expected = gptq(weight, hessian_of(tokens), scales_of(weight, "INT3"), "INT3").float()
            assert reports[matrix.name].tokens == len(tokens)
            torch.testing.assert_close(matrix.weight(quantized), expected, rtol=0, atol=0)


def test_attention_and_shared_experts_are_quantised_too_where_the_plan_says_so(family, model_of, mixed_plan):
    model, blocks = model_of(family), some_blocks()
    plan, before = mixed_plan(model), copy.deepcopy(model)
    found = quantize_model(model, plan, blocks)
    assert [report.name for report in found.reports if report.kind == "dense"]
    for matrix in find_matrices(model):
        given, now = plan.formats[matrix.name], matrix.weight(model)
        assert torch.equal(now, matrix.weight(before)) == (given == "BF16")
        if given != "BF16":
            assert torch.equal(unpack(found.packed[matrix.name], given, matrix.num_columns).float(), now)


def test_nothing_but_the_matrices_changes(family, model_of, mixed_plan):
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_model(model, mixed_plan(model), some_blocks())
    planned = {matrix.parameter for matrix in find_matrices(model)}
    for name, tensor in model.state_dict().items():
        assert name in planned or torch.equal(tensor, before[name])


def test_gptq_changes_the_outputs_on_its_text_less_than_rounding_does(model_of):
    model, blocks = model_of("olmoe"), some_blocks(32)
    plan = uniform_plan(find_matrices(model), "INT2", dense="INT2")
    with torch.no_grad():
        expected = model(blocks).logits
        errors = {}
        for method in ("gptq", "round"):
            changed = copy.deepcopy(model)
            quantize_model(changed, plan, blocks, method=method)
            errors[method] = (changed(blocks).logits - expected).square().mean().item()
    assert errors["gptq"] < 0.9 * errors["round"]


def test_an_expert_that_sees_too_few_tokens_is_rounded_and_reported(model_of, caplog):
    model, blocks = model_of("olmoe"), some_blocks(1, 20)  # 40 choices among 4 experts with 32 columns
    before = copy.deepcopy(model)
    found = quantize_model(model, uniform_plan(find_matrices(model), "INT3"), blocks)
    short = [report for report in found.reports if report.kind == "expert" and report.tokens < 32]
    assert short
    for report in short:
        assert report.method == "round"
    matrices = {matrix.name: matrix for matrix in find_matrices(model)}
    for report in short:
        weight = matrices[report.name].weight(before)
        assert torch.equal(matrices[report.name].weight(model), round_to_nearest(weight, "INT3"))
    assert f"{len(short)} of {len(found.reports)} matrices saw fewer tokens" in caplog.text


def test_an_expert_that_no_token_reaches_is_not_zeroed(model_of):
    model = model_of("olmoe")
    router = moe_layers(model)[0].router
    router.register_forward_hook(lambda _, __, said: (*said[:2], torch.tensor([1, 2]).expand_as(said[2])))
    found = quantize_model(model, uniform_plan(find_matrices(model), "INT2"), some_blocks(2))
    assert list(found.tokens_per_expert().values())[:4] == [0, 128, 128, 0]
    assert all(matrix.weight(model).abs().sum() > 0 for matrix in find_matrices(model))


def test_the_tokens_of_all_experts_are_the_choices_of_the_router(model_of):
    model, blocks = model_of("mixtral"), some_blocks()
    tokens = quantize_model(model, uniform_plan(find_matrices(model), "INT4"), blocks).tokens_per_expert()
    assert len(tokens) == 2 * 4
    assert sum(tokens.values()) == 2 * blocks.numel() * 2


def test_the_batch_size_changes_nothing(model_of):
    model, blocks = model_of("deepseek_v3"), some_blocks(5)
    plan = uniform_plan(find_matrices(model), "INT3", dense="INT4")
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    quantize_model(one, plan, blocks, batch_size=1)
    quantize_model(other, plan, blocks, batch_size=3)
    for matrix in find_matrices(model):
        # The inputs differ by the order of sums in a product, so that a weight halfway between two levels may tip.
        differs = (matrix.weight(one) != matrix.weight(other)).float().mean()
        assert differs < 0.02


def test_gptq_without_text_is_refused(model_of, mixed_plan):
    model = model_of("olmoe")
    with pytest.raises(ValueError, match="GPTQ.*text"):
        quantize_model(model, mixed_plan(model))
