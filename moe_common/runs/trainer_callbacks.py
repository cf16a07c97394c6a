"""What trainings with transformers' Trainer do beside it: anneal a value, and say in the log where they stand."""

import logging
from collections.abc import Callable

from transformers import PrinterCallback, Trainer, TrainerCallback

logger = logging.getLogger(__name__)


class Annealing(TrainerCallback):
    """Says before each step how far training is, from the step's number alone, so that a resumed run goes on as one.

    Args:
        set_progress: called with 0 before the first step, 1 before the last, and a straight line between.
    """

    def __init__(self, set_progress: Callable[[float], None]) -> None:
        self.set_progress = set_progress

    def on_step_begin(self, args, state, control, **kwargs):
        self.set_progress(state.global_step / max(1, state.max_steps - 1))


class LogLines(TrainerCallback):
    """Logs a line every few steps.

    Args:
        name: what is trained, where several are in turn.
    """

    def __init__(self, name: str = "") -> None:
        self.prefix = f"{name}: " if name else ""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            done = f"{self.prefix}step {state.global_step} of {state.max_steps}"
            logger.info("%s loss %.4f lr %.2e", done, logs["loss"], logs["learning_rate"])


def log_in_lines(trainer: Trainer, name: str = "") -> None:
    """Let a Trainer without a progress bar log lines; its own would go to where a command prints its result."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLines(name))
