"""A Trainer whose run ends with the same numbers, however often it was interrupted, or stops where they are lost."""

import logging
from itertools import chain
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from moe_common.runs.checkpoints import MarkCompleteCheckpoints, newest_complete
from moe_common.runs.finite import check_loss, check_weights
from moe_common.runs.whole_files import read_json

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"


class ResumableTrainer(Trainer):
    """A Trainer that trusts whole checkpoints alone and stops at a loss or a weight that is not finite."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(MarkCompleteCheckpoints())
        self.add_callback(CheckWeights())
        self._has_ended = False

    def train_on(self, *, resume: bool = True, checkpoint: Path | None = None) -> TrainOutput:
        """Train to the end, from the newest whole checkpoint in `args.output_dir` where there is one.

        Args:
            resume: go on from a checkpoint; otherwise begin again.
            checkpoint: to go on from, in place of the newest.

        Raises:
            NotFiniteError: a loss or a weight is not finite.
        """
        newest = newest_complete(Path(self.args.output_dir), removes_others=self.args.should_save)
        checkpoint = checkpoint or (newest if resume else None)
        if checkpoint is None:
            return self.train()
        logger.info("continuing from %s", checkpoint)
        self._has_ended = has_ended(checkpoint)
        return self.train(resume_from_checkpoint=str(checkpoint))

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        check_loss(loss, self.state.global_step + 1, chain(self.model.named_parameters(), self.model.named_buffers()))
        return loss

    def _run_epoch(self, *args, **kwargs):
        # The Trainer looks whether training has ended behind a step, not before the first one of a resumed run.
        if self._has_ended:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)


class CheckWeights(TrainerCallback):
    """Stops a run whose weights are lost, before a checkpoint of them takes the place of a good one."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
        check_weights(trained, state.global_step)


def has_ended(checkpoint: Path) -> bool:
    """Whether training had nothing more to do when a checkpoint of a Trainer was written."""
    state = read_json(checkpoint / TRAINER_STATE)
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return state["global_step"] >= state["max_steps"] or bool(control.get("should_training_stop"))
