"""Where a training stands is told before each step, also of a resumed one, and lines of the log say it."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer

from moe_common.runs.trainer_arguments import trainer_arguments
from moe_common.runs.trainer_callbacks import Annealing, log_in_lines


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"loss": (self.slope * x).square().mean()}


def make_trainer(folder, told, **chosen):
    arguments = trainer_arguments(folder, per_device_train_batch_size=1, max_steps=5, disable_tqdm=True, **chosen)
    rows = Dataset.from_dict({"x": [1.0, 2.0, 3.0, 4.0, 5.0]})
    return Trainer(model=Line(), args=arguments, train_dataset=rows, callbacks=[Annealing(told.append)])


def test_progress_goes_in_a_straight_line_and_a_resumed_run_goes_on_in_it(tmp_path):
    whole, resumed = [], []
    make_trainer(tmp_path, whole, save_steps=3).train()
    assert whole == [0.0, 0.25, 0.5, 0.75, 1.0]
    make_trainer(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed == whole[3:]


@pytest.mark.parametrize(("name", "line"), [("", "step 4 of 5 loss "), ("expert_1", "expert_1: step 4 of 5 loss ")])
def test_lines_go_to_the_log_and_none_to_stdout(tmp_path, caplog, capsys, name, line):
    trainer = make_trainer(tmp_path, [], logging_steps=2, save_strategy="no")
    log_in_lines(trainer, name)
    caplog.set_level("INFO", logger="moe_common")
    trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("moe_common")]
    assert len(said) == 2 and said[1].startswith(line) and " lr " in said[1]
    assert capsys.readouterr().out == ""


def test_a_training_tells_the_trainer_more_and_wins(tmp_path):
    told = trainer_arguments(tmp_path, save_total_limit=5, seed=7)
    assert (told.output_dir, told.save_total_limit, told.seed, told.report_to) == (str(tmp_path), 5, 7, [])
    assert told.use_cpu is not torch.cuda.is_available()
