"""Train an adapter with transformers' Trainer: progress shown, checkpoints kept, a broken run continued."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

FINISHED = "finished.json"


@dataclass(kw_only=True)
class TrainingConfig:
    """How each adapter is trained; both get the same."""

    num_steps: int = field(default=120, metadata={"help": "Optimiser steps for each adapter."})
    train_batch_size: int = field(default=16, metadata={"help": "Blocks in a step."})
    max_seq_length: int = field(default=256, metadata={"help": "Tokens in a block."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate; falls to zero by a cosine."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Train in bfloat16 autocast; by default where the hardware multiplies it fast."},
    )
    save_steps: int = field(default=100, metadata={"help": "Steps between two checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of the adapters' weights and of the order of the blocks."})

    def __post_init__(self) -> None:
        for name in ("num_steps", "train_batch_size", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.max_seq_length < 2:
            raise ValueError(f"max_seq_length is {self.max_seq_length}, but must be at least 2.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be positive.")


def train_adapter(model, blocks: Dataset, config: TrainingConfig, folder: Path) -> dict[str, float]:
    """Train a PeftModel on blocks and save its adapter to a folder.

    A run that was broken off continues from its newest checkpoint when called again with the same arguments.

    Args:
        model: a PeftModel; changed in place.
        blocks: rows of `input_ids`, `attention_mask` and `labels`.
        config: steps, batch, learning rate.
        folder: receives the adapter, and checkpoints while training runs.

    Returns:
        The last training loss and the seconds trained in this call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=config.num_steps,
        per_device_train_batch_size=config.train_batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.num_steps // 20),
        bf16=multiplies_bf16_fast() if config.bf16 is None else config.bf16,
        logging_steps=20,
        save_steps=config.save_steps,
        save_total_limit=2,
        report_to=[],
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=blocks, callbacks=[_RoutingLog()])
    outcome = trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir) or None)
    model.save_pretrained(folder)
    measured = {"loss": outcome.training_loss, "seconds": outcome.metrics["train_runtime"]}
    partial = folder / (FINISHED + ".partial")
    partial.write_text(json.dumps(measured))
    os.replace(partial, folder / FINISHED)
    return measured


def multiplies_bf16_fast() -> bool:
    """Whether bfloat16 training is quicker than float32 here: on a GPU that knows it, or a CPU with AMX tiles.

    A CPU without AMX multiplies bfloat16 more slowly than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return "amx_tile" in _cpu_flags()


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def is_trained(folder: Path) -> bool:
    """Whether `train_adapter` finished in this folder."""
    return (folder / FINISHED).exists()


class _RoutingLog(TrainerCallback):
    """Adds the router's balance and entropy to every logged line."""

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        losses = getattr(model, "routing_losses", None)
        if losses is not None and logs is not None and "loss" in logs:
            logs |= {name: round(value.item(), 3) for name, value in losses().items()}
