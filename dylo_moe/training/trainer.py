"""Train an adapter with transformers' Trainer: progress shown, routing watched, an interrupted run continued."""

import importlib.util
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dylo_moe.training.routing_watch import RoutingWatch
from moe_common.models.base_identity import BaseIdentity
from moe_common.runs.checkpoints import check_base, save_base_identity
from moe_common.runs.options import check_at_least, split_names
from moe_common.runs.resumable_trainer import ResumableTrainer
from moe_common.runs.trainer_arguments import trainer_arguments
from moe_common.runs.whole_files import remove, write_json
from moe_common.text.batches import TurnTakingSampler, collate
from moe_common.text.packing import IGNORED_LABEL

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
CHECKPOINTS = "checkpoints"
TRACKERS = ("tensorboard", "wandb", "trackio")
PER_GATE = "routing/"  # names of logged values that are for trackers and files, not for the eye


@dataclass(kw_only=True)
class TrainingConfig:
    """How each adapter is trained; all get the same."""

    num_epochs: float = field(default=1.0, metadata={"help": "Passes over the training rows."})
    num_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps for each adapter; by default as num_epochs says."}
    )
    train_batch_size: int = field(default=16, metadata={"help": "Rows of a forward pass on each device."})
    eval_batch_size: int = field(default=8, metadata={"help": "Rows of a forward pass when measuring."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Forward passes that make up one optimiser step."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    lr_strategy: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "Learning rate behind the warm-up."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of each target spread over the vocabulary."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Train in bfloat16 autocast. By default: where that is fast."},
    )
    fp16: bool = field(default=False, metadata={"help": "Train in float16 autocast with loss scaling; GPU only."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute blocks going back: less memory, a third more time."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Validations without a better loss that end the training, the best kept; by default none do."
        },
    )
    save_steps: int = field(default=100, metadata={"help": "Steps between two checkpoints, and two validations."})
    logging_steps: int = field(default=20, metadata={"help": "Steps between two lines of the log."})
    report_to: str = field(default="none", metadata={"help": "Comma separated: tensorboard, wandb, trackio; or none."})
    seed: int = field(default=0, metadata={"help": "Seed of the adapters' weights and of the order of the rows."})

    def __post_init__(self) -> None:
        check_at_least(self, train_batch_size=1, eval_batch_size=1, gradient_accumulation_steps=1, num_steps=1)
        check_at_least(self, save_steps=1, logging_steps=1, early_stopping_patience=1, weight_decay=0, seed=0)
        for name in ("learning_rate", "num_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, but must lie in [0, 1).")
        if self.fp16 and self.bf16:
            raise ValueError("bf16 and fp16 are both set, but autocast has one type. Drop one of the two.")
        if self.fp16 and not torch.cuda.is_available():
            raise ValueError("fp16 is set, but float16 trains on a GPU only and there is none. Use --bf16.")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"report_to names '{name}', but must be none or some of {', '.join(TRACKERS)}.")
            if not is_installed(name):
                raise ValueError(
                    f"report_to names {name}, which is not installed. Install it with: pip install '.[track]' (or "
                    f"pip install {name})."
                )

    @property
    def trackers(self) -> list[str]:
        names = split_names(self.report_to)
        return [] if names == ["none"] else names

    @property
    def autocast_bf16(self) -> bool:
        """Whether training runs in bfloat16: as asked, else where it is fast."""
        return not self.fp16 and (multiplies_bf16_fast() if self.bf16 is None else self.bf16)

    def total_steps(self, num_rows: int, num_processes: int = 1) -> int:
        """Optimiser steps of a run over so many rows, as the Trainer counts them."""
        if self.num_steps is not None:
            return self.num_steps
        batches = math.ceil(num_rows / (self.train_batch_size * num_processes))
        return max(1, math.ceil(self.num_epochs * max(1, math.ceil(batches / self.gradient_accumulation_steps))))


def training_arguments(config: TrainingConfig, folder: Path, *, num_rows: int, validated: bool) -> TrainingArguments:
    """What the Trainer is told.

    Args:
        config: the user's choices.
        folder: of the adapter; checkpoints and the trackers' files go below it.
        num_rows: training rows, from which the steps of the warm-up follow.
        validated: whether there is validation data, to be measured whenever a checkpoint is written.
    """
    recompute = {"use_reentrant": False} if config.gradient_checkpointing else None
    arguments = trainer_arguments(
        folder / CHECKPOINTS,
        num_train_epochs=config.num_epochs,
        max_steps=config.num_steps or -1,
        per_device_train_batch_size=config.train_batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.lr_strategy, config.lr_strategy),
        bf16=config.autocast_bf16,
        fp16=config.fp16,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        eval_strategy="steps" if validated else "no",
        eval_steps=config.save_steps,
        load_best_model_at_end=config.early_stopping_patience is not None,
        metric_for_best_model="eval_loss" if validated else None,
        report_to=config.trackers,
        run_name=folder.name,
        seed=config.seed,
        # Every expert has a gradient, zero where it got no token; and looking for unused parameters makes DDP build
        # the outputs anew, which fails because they hold the router's losses beside what their class knows.
        ddp_find_unused_parameters=False,
        **({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": recompute} if recompute else {}),
    )
    arguments.warmup_steps = max(1, config.total_steps(num_rows, arguments.world_size) // 20)
    return arguments


def train_adapter(
    model,
    rows: Dataset,
    config: TrainingConfig,
    folder: Path,
    *,
    sampler: TurnTakingSampler | None = None,
    validation: Dataset | None = None,
    resume: bool = True,
    base_name: str | None = None,
) -> dict:
    """Train a PeftModel and save its adapter to a folder.

    A run that was interrupted continues from its newest whole checkpoint when called again with the same arguments.

    Args:
        model: a PeftModel; changed in place.
        rows: what `moe_common.text.batches.collate` makes batches of.
        config: steps, batch, learning rate.
        folder: receives the adapter, and checkpoints while training runs.
        sampler: order of the rows; shuffled by default.
        validation: rows whose loss decides when to stop early; needed when `config.early_stopping_patience` is set.
        resume: continue from a checkpoint that lies in the folder; otherwise begin anew.
        base_name: how the base model was named, to be noted with the adapter.

    Returns:
        The last training `loss`, the `seconds` trained in this call, and the `history`: what was logged, step by step.

    Raises:
        ValueError: the checkpoint in the folder is of another base model.
        NotFiniteError: a loss or a weight is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = BaseIdentity.of(model.get_base_model(), base_name)
    check_base(folder, base)
    patience = config.early_stopping_patience
    arguments = training_arguments(config, folder, num_rows=len(rows), validated=validation is not None)
    if arguments.should_save:
        save_base_identity(folder, base)
    trainer = RoutedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collate,
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
        label_smoothing=config.label_smoothing,
        sampler=sampler,
    )
    outcome = trainer.train_on(resume=resume)
    trainer.save_model(str(folder))  # of all processes together, where each holds a part
    measured = {
        "loss": outcome.training_loss,
        "seconds": outcome.metrics["train_runtime"],
        "history": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        write_json(folder / FINISHED, measured)
    return measured


class RoutedTrainer(ResumableTrainer):
    """A Trainer that knows of routing: its losses under label smoothing, and what the gates do in the log.

    Args:
        label_smoothing: share of each target that is spread evenly over the vocabulary.
        sampler: order of the training rows; None shuffles them.
    """

    def __init__(self, *args, label_smoothing: float = 0.0, sampler: TurnTakingSampler | None = None, **kwargs):
        self.label_smoothing = label_smoothing
        self.sampler = sampler
        super().__init__(*args, **kwargs)
        self.watch = RoutingWatch(self.model)
        for shown in (ProgressCallback, PrinterCallback):
            if self.pop_callback(shown) is not None:
                self.add_callback({ProgressCallback: _QuietProgress, PrinterCallback: _QuietPrinter}[shown])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss, which holds the router's, plus what smoothing adds to its cross-entropy.

        transformers' own smoother would compute the loss from the logits alone and leave the router's losses out. With
        z the logits and y the target, (1 - eps) nll + eps mean_v(-log p_v) = nll + eps (z_y - mean_v z_v), so only the
        last term is added, over the same tokens and divided by the same count (Szegedy et al. 2016, arXiv:1512.00567).
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self.watch.look()
            if self.label_smoothing:
                added = smoothing_term(outputs["logits"], inputs["labels"], count=num_items_in_batch)
                shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
                loss = loss + self.label_smoothing * added * (self.accelerator.num_processes if shared else 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self.watch.report()}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)


def smoothing_term(logits: torch.Tensor, labels: torch.Tensor, *, count: torch.Tensor | int | None) -> torch.Tensor:
    """Sum over the predicted tokens of (logit of the target - mean logit), divided by their count.

    Args:
        logits: [batch, seq, vocabulary].
        labels: [batch, seq], unshifted; -100 is left out.
        count: tokens to divide by, where a step has several batches; by default those of this batch.
    """
    targets = labels[:, 1:]
    kept = targets != IGNORED_LABEL
    scores = logits[:, :-1][kept].float()
    difference = scores.gather(-1, targets[kept][:, None])[:, 0] - scores.mean(dim=-1)
    return difference.sum() / (kept.sum() if count is None else count)


def multiplies_bf16_fast() -> bool:
    """Whether bfloat16 training is quicker than float32 here: on a GPU that knows it, or a CPU with AMX tiles.

    A CPU without AMX multiplies bfloat16 more slowly than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return "amx_tile" in _cpu_flags()


def is_trained(folder: Path) -> bool:
    """Whether `train_adapter` finished in this folder."""
    return (folder / FINISHED).exists()


def forget_training(folder: Path) -> None:
    """Take away what says that training in this folder was finished, or where it stood; the adapter stays."""
    for name in (FINISHED, CHECKPOINTS):
        remove(folder / name)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _for_the_eye(logs: dict) -> dict:
    return {name: value for name, value in logs.items() if not name.startswith(PER_GATE)}


class _QuietProgress(ProgressCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=_for_the_eye(logs), **kwargs)


class _QuietPrinter(PrinterCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=_for_the_eye(logs), **kwargs)
