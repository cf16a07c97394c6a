"""Objectives against their formulas written out, and zero where there is nothing to learn."""

import copy

import pytest
import torch

from moe_ext.router_ft.objectives import make_objective
from moe_ext.routers import moe_layers

TOKENS = torch.arange(3, 33).view(2, 15)


@pytest.fixture
def pair(family, model_of):
    """A model and a copy of it with worse experts."""
    teacher = model_of(family)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in moe_layers(student):
            layer.experts.down_proj.mul_(50.0)  # far apart, or float32 could not tell their difference
            layer.experts.gate_up_proj.add_(0.02)
    return student, teacher


def test_next_token_is_the_loss_of_the_model_without_its_balance_loss(pair):
    student, _ = pair
    expected = student(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(make_objective("ce", student, None)(TOKENS), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_the_divergence_summed_over_the_vocabulary(pair, temperature):
    student, teacher = pair
    wanted, found = ((model(TOKENS).logits / temperature).softmax(-1) for model in (teacher, student))
    expected = (wanted * (wanted.log() - found.log())).sum(-1).mean() * temperature**2
    loss = make_objective("kl", student, teacher, temperature=temperature)(TOKENS)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-8)


def test_alignment_compares_the_routers_layer_by_layer(pair):
    student, teacher = pair
    with torch.no_grad():
        for layer in moe_layers(student):
            layer.router.weight.mul_(3)
    wanted, found = (model.model(TOKENS, output_router_logits=True).router_logits for model in (teacher, student))
    divergences = []
    for w, f in zip(wanted, found, strict=True):
        w, f = w.float().softmax(-1), f.float().softmax(-1)
        divergences.append((w * (w.log() - f.log())).sum(-1).mean())
    loss = make_objective("align", student, teacher)(TOKENS)
    torch.testing.assert_close(loss, torch.stack(divergences).mean(), rtol=1e-3, atol=1e-8)


def test_blocks_compare_outputs_on_the_inputs_of_the_student(pair):
    student, teacher = pair
    inputs = []
    hooks = [
        layer.block.register_forward_pre_hook(lambda _, seen: inputs.append(seen[0])) for layer in moe_layers(student)
    ]
    with torch.no_grad():
        student(TOKENS)
        for hook in hooks:
            hook.remove()
        expected = 0
        for hidden, ours, theirs in zip(inputs, moe_layers(student), moe_layers(teacher), strict=True):
            wanted = theirs.block(hidden)
            expected += ((ours.block(hidden) - wanted) ** 2).sum() / (wanted**2).sum()
    torch.testing.assert_close(make_objective("blocks", student, teacher)(TOKENS).detach(), expected)


@pytest.mark.parametrize("name", ["kl", "align", "blocks"])
def test_a_model_has_nothing_to_learn_from_itself(name, model_of):
    model = model_of("olmoe")
    assert make_objective(name, model, copy.deepcopy(model))(TOKENS).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["ce", "kl", "align", "blocks"])
def test_every_router_gets_a_gradient(name, pair):
    student, teacher = pair
    if name == "align" and len(moe_layers(student)) == 1:
        pytest.skip("the only router of this model stands before every changed expert")
    make_objective(name, student, teacher)(TOKENS).backward()
    routers = [layer.router.weight for layer in moe_layers(student)]
    # The first router's input is that of the teacher, and so are its logits: nothing to align there.
    for weight in routers[1:] if name == "align" else routers:
        assert weight.grad.abs().sum() > 0


def test_an_objective_without_its_teacher_is_refused(model_of):
    with pytest.raises(ValueError, match="'kl'.*full-precision"):
        make_objective("kl", model_of("olmoe"), None)
    with pytest.raises(ValueError, match="objective.*'mse'.*ce, kl, align, blocks"):
        make_objective("mse", model_of("olmoe"), None)
