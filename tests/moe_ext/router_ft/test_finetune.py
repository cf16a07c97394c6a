"""Router finetuning: only routers change, the loss falls, and a broken run goes on as if it had not been."""

import copy

import pytest
import torch

from moe_common.runs.finite import NotFiniteError
from moe_ext.router_ft.finetune import FinetuneConfig, _Run, finetune_routers
from moe_ext.routers import moe_layers, router_parameters

NAN, INF = float("nan"), float("inf")


def some_blocks(count=20, length=24):
    start = torch.arange(count)[:, None] * 7
    return (start + torch.arange(length) * 3) % 60 + 3  # a rule that can be learnt


@pytest.fixture
def damaged(model_of):
    """A tiny model whose experts were changed, and the model as it was."""
    teacher = model_of("olmoe")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in moe_layers(student):
            layer.experts.gate_up_proj.mul_(4)
    return student, teacher


@pytest.mark.parametrize("objective", ["ce", "kl", "align", "blocks"])
def test_only_the_routers_change(objective, damaged):
    student, teacher = damaged
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    finetune_routers(student, some_blocks(), FinetuneConfig(objective=objective, lr=1e-3), teacher=teacher)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(router_parameters(student))


def test_a_model_that_was_trainable_stays_so(damaged):
    student, _ = damaged
    student.lm_head.weight.requires_grad_(False)
    finetune_routers(student, some_blocks(4), FinetuneConfig())
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert frozen == ["lm_head.weight"]
    assert not student.training


@pytest.mark.parametrize("objective", ["ce", "kl", "blocks"])
def test_the_objective_falls_on_text_that_was_not_trained_on(objective, damaged):
    student, teacher = damaged
    config = FinetuneConfig(objective=objective, lr=3e-3, num_epochs=3)
    report = finetune_routers(student, some_blocks(), config, teacher=teacher)
    assert report.loss_after < report.loss_before
    assert (report.steps, report.trained) == (3 * 18, 2 * 4 * 32)
    assert report.change > 0


def test_a_rate_that_raises_the_loss_is_warned_of_with_the_figures(damaged, caplog):
    student, teacher = damaged
    report = finetune_routers(student, some_blocks(), FinetuneConfig(objective="align", lr=5.0), teacher=teacher)
    assert report.loss_after > report.loss_before
    assert f"from {report.loss_before:.5f} to {report.loss_after:.5f}" in caplog.text
    assert "lr is 5" in caplog.text


def test_a_run_that_is_broken_off_and_continued_ends_like_one_in_one_piece(damaged, tmp_path, monkeypatch):
    student, teacher = damaged
    parts = copy.deepcopy(student)
    config = FinetuneConfig(objective="kl", lr=1e-3, batch_size=2)
    whole = finetune_routers(student, some_blocks(), config, teacher=teacher)
    step = _Run._step

    def stop_at_four(run, total):
        if run.state["step"] == 4:
            raise KeyboardInterrupt
        return step(run, total)

    with monkeypatch.context() as broken:
        broken.setattr(_Run, "_step", stop_at_four)
        with pytest.raises(KeyboardInterrupt):
            finetune_routers(parts, some_blocks(), config, teacher=teacher, checkpoint=tmp_path / "run")
    fresh = copy.deepcopy(teacher)
    fresh.load_state_dict({**parts.state_dict(), **{n: p for n, p in teacher.state_dict().items() if ".gate." in n}})
    continued = finetune_routers(fresh, some_blocks(), config, teacher=teacher, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), fresh.parameters(), strict=True))
    assert (continued.steps, continued.loss_before) == (whole.steps, whole.loss_before)


def test_half_a_step_is_not_kept(damaged, tmp_path, monkeypatch):
    student, _ = damaged
    config = FinetuneConfig(lr=1e-3)
    again, parts = copy.deepcopy(student), copy.deepcopy(student)
    finetune_routers(student, some_blocks(), config)
    write, written = _Run._write_routers, []

    def stop_at_four(run):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(run)
        write(run)

    with monkeypatch.context() as broken:
        broken.setattr("moe_ext.router_ft.finetune.CHECKPOINT_SECONDS", 0)
        broken.setattr(_Run, "_write_routers", stop_at_four)
        with pytest.raises(KeyboardInterrupt):
            finetune_routers(parts, some_blocks(), config, checkpoint=tmp_path / "run")
    finetune_routers(again, some_blocks(), config, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("lr", [1e20, 1e30])
def test_a_rate_that_diverges_stops_and_names_the_step(damaged, tmp_path, lr):
    with pytest.raises(NotFiniteError, match=r"step \d+"):
        finetune_routers(damaged[0], some_blocks(), FinetuneConfig(lr=lr, weight_decay=1.0), checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


def test_gradient_checkpointing_changes_nothing(damaged):
    student, teacher = damaged
    other = copy.deepcopy(student)
    options = {"objective": "kl", "lr": 1e-3}
    finetune_routers(student, some_blocks(6), FinetuneConfig(**options), teacher=teacher)
    finetune_routers(other, some_blocks(6), FinetuneConfig(**options, gradient_checkpointing=True), teacher=teacher)
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_small_steps_are_not_lost_in_a_bfloat16_model(damaged):
    student, _ = damaged
    student.to(torch.bfloat16)
    routers = router_parameters(student)
    with torch.no_grad():
        for weight in routers.values():
            weight.fill_(0.02)
    # One step of 1e-5 is lost at 0.02, where bfloat16 has steps of 1.2e-4; in float32 the 36 add up to 1.8e-4.
    finetune_routers(student, some_blocks(), FinetuneConfig(lr=1e-5, weight_decay=0.0, num_epochs=2))
    start = torch.tensor(0.02, dtype=torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 and (weight != start).any() for weight in routers.values())


def test_too_little_text_is_refused(damaged):
    with pytest.raises(ValueError, match=r"\b4 blocks.*\b1\b.*\b9\b"):
        finetune_routers(damaged[0], some_blocks(4), FinetuneConfig(batch_size=8))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.0),
        ("batch_size", 0),
        ("num_epochs", 0),
        ("temperature", -1.0),
        ("weight_decay", -0.1),
        ("lr", INF),
        ("lr", NAN),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        FinetuneConfig(**{option: value})
