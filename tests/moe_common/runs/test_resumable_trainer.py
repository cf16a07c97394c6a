"""A Trainer that is killed at any checkpoint ends with the same bits, and stops where its numbers are lost."""

import shutil

import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from moe_common.runs.checkpoints import checkpoints
from moe_common.runs.finite import NotFiniteError
from moe_common.runs.resumable_trainer import ResumableTrainer


class Line(nn.Module):
    """y = w x + b, with dropout, so that the state of the random numbers counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout = nn.Linear(4, 1), nn.Dropout(0.2)

    def forward(self, x, labels):
        return {"loss": (self.layer(self.dropout(x))[:, 0] - labels).square().mean()}


def rows(count=20):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(float(row))} for row in range(count)]


def trained(folder, *, callbacks=(), data=None, model=None, **arguments):
    model = model or Line()
    chosen = {"save_steps": 2, "learning_rate": 0.1, "max_steps": 4, "save_total_limit": 9} | arguments
    trainer = ResumableTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            **chosen,
        ),
        train_dataset=data or rows(),
        eval_dataset=rows(4),
        callbacks=list(callbacks),
    )
    trainer.train_on()
    return model.state_dict(), trainer.state.global_step


class StopsBehind(TrainerCallback):
    """As if killed when the checkpoint of a step is whole."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise KeyboardInterrupt

    on_train_end = on_step_begin


LENGTHS = [
    {"max_steps": 4},  # in the middle of the first epoch
    {"max_steps": -1, "num_train_epochs": 1.4},  # in the middle of the second
    {"max_steps": -1, "num_train_epochs": 1},
    {"max_steps": 4, "gradient_accumulation_steps": 2},
    {"max_steps": 4, "lr_scheduler_type": "constant"},
]


@pytest.mark.parametrize("length", LENGTHS, ids=str)
def test_killed_at_each_checkpoint_the_last_included_it_ends_with_the_same_bits(length, tmp_path):
    whole, steps = trained(tmp_path / "whole", **length)
    for step in range(2, steps + 1, 2):
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(KeyboardInterrupt):
            trained(folder, callbacks=[StopsBehind(step)], **length)
        assert checkpoints(folder)[-1].name == f"checkpoint-{step}"
        ended, ended_at = trained(folder, **length)
        assert ended_at == steps
        for name, tensor in whole.items():
            assert torch.equal(tensor, ended[name]), f"{name}, killed at step {step}"


def test_killed_behind_an_early_stop_it_does_not_go_on(tmp_path):
    stops = {
        "max_steps": 9,
        "learning_rate": 0.0,  # no validation is better than the first
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    _, steps = trained(tmp_path / "whole", callbacks=[EarlyStoppingCallback(1)], **stops)
    assert steps == 4
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", callbacks=[EarlyStoppingCallback(1), StopsBehind(4)], **stops)
    assert trained(tmp_path / "killed", callbacks=[EarlyStoppingCallback(1)], **stops)[1] == 4


def test_a_checkpoint_damaged_without_a_change_of_size_is_passed_over_and_the_bits_are_the_same(tmp_path, caplog):
    whole, _ = trained(tmp_path)
    last = tmp_path / "checkpoint-4"
    for file in ("optimizer.pt", "model.safetensors"):
        shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{file}"))
        place = tmp_path.with_name(f"{tmp_path.name}-{file}") / last.name / file
        held = place.read_bytes()
        place.write_bytes(held[:-32] + bytes(32))
        ended, _ = trained(place.parent.parent)
        assert "checkpoint-4 is damaged" in caplog.text
        assert all(torch.equal(tensor, ended[name]) for name, tensor in whole.items())


def test_a_rate_that_diverges_stops_and_the_last_good_checkpoint_stays(tmp_path):
    with pytest.raises(NotFiniteError, match=r"step \d+"):
        trained(tmp_path, learning_rate=1e30, max_steps=50, save_steps=1, optim="sgd", max_grad_norm=0)
    for checkpoint in checkpoints(tmp_path):
        from safetensors.torch import load_file

        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_a_lost_weight_of_the_model_is_named_in_the_first_step(tmp_path):
    model = Line()
    model.layer.bias.data[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"loss of step 1 is nan: layer\.bias is not finite"):
        trained(tmp_path, model=model)
    assert not checkpoints(tmp_path)
