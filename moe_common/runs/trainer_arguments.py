"""What all trainings of this project tell transformers' Trainer."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


def trainer_arguments(folder: Path, **chosen: Any) -> TrainingArguments:
    """Arguments of a Trainer that works where there is a GPU and where there is none, and reports to nobody.

    Args:
        folder: of the checkpoints, of which the last two are kept.
        chosen: what this training tells the Trainer; it wins over what all share.
    """
    on_gpu = torch.cuda.is_available()
    shared = {
        "output_dir": str(folder),
        "save_total_limit": 2,
        "report_to": [],
        "label_names": ["labels"],
        "remove_unused_columns": False,  # position_ids restart with each document
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
    }
    return TrainingArguments(**(shared | chosen))
