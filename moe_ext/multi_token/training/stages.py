"""Stages 1 and 2 with transformers' Trainer.

Stage 1 trains the heads on the text, all of them on. Stage 2 trains heads and router; over all its epochs together the
heads go from reading the text to reading their own drafts (annealed teacher forcing: scheduled sampling, Bengio et al.
2015, arXiv:1506.03099), and the heads that are on from all of them to `k_max` a position.

An interrupted run goes on from its newest whole checkpoint, and ends with the same numbers as one that was not.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from torch import Tensor

from moe_common.runs.resumable_trainer import ResumableTrainer
from moe_common.runs.trainer_arguments import trainer_arguments
from moe_common.runs.trainer_callbacks import Annealing
from moe_common.text.batches import collate
from moe_ext.multi_token.model.mixture import MultiTokenMoE, Stage, Training


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How a stage is trained.

    Args:
        stage: `heads` (stage 1) or `router` (stage 2).
        epochs: passes over the rows.
        batch: rows of a step on each device.
        lr: peak learning rate; it falls to zero by a cosine behind a warm-up over the first twentieth.
        save_steps: steps between two checkpoints.
        logging_steps: steps between two lines of the log.
        bf16: bfloat16 autocast.
        seed: of the order of the rows and of which tokens are taught.
    """

    stage: Stage
    epochs: float
    batch: int
    lr: float
    save_steps: int
    logging_steps: int
    bf16: bool
    seed: int


def train_stage(model: MultiTokenMoE, rows: Dataset, settings: StageSettings, folder: Path) -> float:
    """Train a stage; called again with the same arguments it goes on from where it was interrupted.

    Args:
        model: changed in place.
        rows: as `moe_common.text.batches.collate` takes them.
        settings: of the stage.
        folder: for checkpoints.

    Returns:
        The mean loss, in nats.
    """
    for router in (model.router, model.copy_router):
        router.requires_grad_(settings.stage == "router")
    steps = max(1, round(settings.epochs * -(-len(rows) // settings.batch)))
    arguments = trainer_arguments(
        folder,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        bf16=settings.bf16,
        save_steps=settings.save_steps,
        logging_steps=settings.logging_steps,
        seed=settings.seed,
    )

    def set_progress(progress: float) -> None:
        model.training_state = at_progress(settings.stage, progress, model.config)

    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Annealing(set_progress)],
    )
    return trainer.train_on().training_loss


def at_progress(stage: Stage, progress: float, config) -> Training:
    """Where a stage stands.

    Args:
        stage: `heads` stays as it began; `router` anneals.
        progress: 0 in the first step, 1 in the last.
        config: of the model.
    """
    if stage == "heads":
        return Training(stage="heads", teacher_forcing=1.0, heads_on=config.num_heads)
    return Training(
        stage="router",
        teacher_forcing=1.0 + progress * (config.teacher_forcing_end - 1.0),
        heads_on=config.num_heads + progress * (config.k_max - config.num_heads),
    )


class StageTrainer(ResumableTrainer):
    """A Trainer that logs the parts of the loss beside their sum, as means since the last line of the log."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sums: dict[str, Tensor] = {}
        self.num_summed = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        for name, value in outputs.items():
            if name != "loss":
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.num_summed += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self.num_summed:
            means = {name: float(total) / self.num_summed for name, total in self.sums.items()}
            now = self.model.training_state
            if now.stage == "router":
                means |= {"teacher_forcing": now.teacher_forcing, "heads_on": now.heads_on}
            logs = {**logs, **{name: round(value, 4) for name, value in means.items()}}
            self.sums, self.num_summed = {}, 0
        super().log(logs, start_time)
