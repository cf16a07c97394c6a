"""Training shared by the growing mixture and its baselines: so many steps on blocks, with transformers' Trainer."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback

from moe_common.runs.resumable_trainer import ResumableTrainer
from moe_common.runs.trainer_arguments import trainer_arguments
from moe_common.runs.trainer_callbacks import log_in_lines


def train_steps(
    model,
    blocks: Dataset,
    *,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    num_steps: int,
    batch_size: int,
    seed: int,
    bf16: bool,
    scratch: Path,
    name: str,
    at_step: dict[int, Callable[[], None]] | None = None,
) -> float:
    """Take optimiser steps; nothing is saved.

    Args:
        model: a PeftModel; changed in place.
        blocks: rows of `input_ids`, `attention_mask` and `labels`; drawn in an order that the seed gives.
        optimizer, scheduler: as torch's.
        num_steps: optimiser steps, whatever the number of blocks.
        batch_size: blocks in a step.
        seed: of the order of the blocks and of dropout.
        bf16: train in bfloat16 autocast.
        scratch: a folder that Trainer may call its own.
        name: what is trained, for the log.
        at_step: what to do when so many steps are taken.

    Returns:
        The mean training loss, nats a token.
    """
    arguments = trainer_arguments(
        scratch,
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        bf16=bf16,
        logging_steps=max(1, num_steps // 5),
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = ResumableTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks,
        optimizers=(optimizer, scheduler),
        callbacks=[_AtStep(at_step or {})],
    )
    log_in_lines(trainer, name)
    return trainer.train().training_loss


class _AtStep(TrainerCallback):
    """Calls what is due when so many steps are taken."""

    def __init__(self, due: dict[int, Callable[[], None]]) -> None:
        self.due = due

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.due:
            self.due[state.global_step]()
