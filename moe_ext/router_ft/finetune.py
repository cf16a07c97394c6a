"""Finetune the routers of a quantised mixture, and nothing else.

A router of [E, H] weights is the one part of a mixture layer that stays in full precision, so it can be trained
without touching what was quantised. The optimiser (AdamW) works on float32 copies of the routers; a model in bfloat16
gets the copies rounded after each step, or small steps would be lost in rounding.
"""

import logging
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_common.runs.checkpoints import load_state, save_state
from moe_common.runs.finite import check_loss, check_weights
from moe_common.runs.options import check_above, check_at_least
from moe_ext.router_ft.objectives import ObjectiveName, make_objective
from moe_ext.routers import router_parameters

logger = logging.getLogger(__name__)

PROBE_PART = 10  # one block of so many is never trained on: the loss before and after is measured there
CHECKPOINT_SECONDS = 300


@dataclass(kw_only=True)
class FinetuneConfig:
    objective: ObjectiveName = field(
        default="ce",
        metadata={
            "help": "Objective; ce: next token; kl: the full-precision logits; align: its routing; "
            "blocks: its layers' outputs."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the objective kl."})
    lr: float = field(default=1e-4, metadata={"help": "Peak learning rate; it falls to 0 along a straight line."})
    batch_size: int = field(default=1, metadata={"help": "Blocks in an optimiser step."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Decoupled decay of the routers."})
    num_epochs: int = field(default=1, metadata={"help": "Times that the calibration text is read."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})

    def __post_init__(self):
        check_above(self, temperature=0, lr=0, batch_size=0, num_epochs=0)
        check_at_least(self, weight_decay=0)


@dataclass(frozen=True)
class FinetuneReport:
    """What finetuning did.

    Args:
        steps: optimiser steps.
        trained: number of weights that were trained.
        loss_before, loss_after: the objective on blocks that were not trained on.
        change: |new - old| / |old| over all routers.
        seconds: of the whole finetuning, interruptions left out.
    """

    steps: int
    trained: int
    loss_before: float
    loss_after: float
    change: float
    seconds: float


def finetune_routers(
    model: PreTrainedModel,
    blocks_NL: Tensor,
    config: FinetuneConfig,
    *,
    teacher: PreTrainedModel | None = None,
    seed: int = 42,
    checkpoint: str | Path | None = None,
) -> FinetuneReport:
    """Train the model's routers in place; it comes back in eval mode.

    Args:
        model: quantised or not.
        blocks_NL: text; every tenth block (one at least) is kept for the loss before and after.
        config: the objective and the optimiser.
        teacher: the model in full precision, for the objectives that compare with it.
        seed: of the order of the blocks.
        checkpoint: a folder for the checkpoints of this finetuning and no other, written every five minutes and,
            between two steps, when it is interrupted; it goes on from the newest whole one.

    Raises:
        ValueError: too few blocks, no teacher where one is needed.
        NotFiniteError: a loss or a router is not finite.
    """
    num_probes = max(1, len(blocks_NL) // PROBE_PART)
    probe_NL, text_NL = blocks_NL[:num_probes], blocks_NL[num_probes:]
    if len(text_NL) < config.batch_size:
        raise ValueError(
            f"There are {len(blocks_NL)} blocks of text, of which {num_probes} are kept for measuring, but "
            f"{config.batch_size + num_probes} are needed for one step. Raise nsamples or lower batch_size."
        )
    objective = make_objective(config.objective, model, teacher, temperature=config.temperature)
    routers = router_parameters(model)
    original = {name: parameter.detach().clone() for name, parameter in routers.items()}
    others = _fingerprints(model, routers)
    was_trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    for parameter in routers.values():
        parameter.requires_grad_(True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = _Run(model, routers, objective, config, text_NL, probe_NL, seed, Path(checkpoint) if checkpoint else None)
    try:
        report = run.to_the_end(original)
    finally:
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in was_trainable)
            parameter.grad = None
    changed = [name for name, found in _fingerprints(model, routers).items() if found != others[name]]
    assert not changed, f"finetuning changed {changed}, which are no routers"
    if report.loss_after > report.loss_before:
        logger.warning(
            "finetuning raised the loss (%s) on text that it did not see from %.5f to %.5f: lower the rate (lr is %g) "
            "or give more text",
            config.objective,
            report.loss_before,
            report.loss_after,
            config.lr,
        )
    return report


class _Run:
    """The optimiser steps, and what an interrupted run needs to go on."""

    def __init__(self, model, routers, objective, config, text_NL, probe_NL, seed, checkpoint):
        self.model, self.objective, self.config = model, objective, config
        self.routers: dict[str, nn.Parameter] = routers
        self.text_NL, self.probe_NL, self.seed, self.checkpoint = text_NL, probe_NL, seed, checkpoint
        self.stepping = False
        self.masters = {name: parameter.detach().float().clone() for name, parameter in routers.items()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=config.lr, weight_decay=config.weight_decay)
        self.steps_per_epoch = len(text_NL) // config.batch_size
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss_before": None}

    def to_the_end(self, original: dict[str, Tensor]) -> FinetuneReport:
        if self.checkpoint:
            self._resume()
        if self.state["loss_before"] is None:
            self.state["loss_before"] = self._measure()
        total = self.steps_per_epoch * self.config.num_epochs
        started = saved = time.monotonic()
        before = self.state["seconds"]
        try:
            with tqdm(total=total, initial=self.state["step"], desc="finetuning routers", unit="step") as bar:
                while self.state["step"] < total:
                    loss = self._step(total)
                    self.state["seconds"] = before + time.monotonic() - started
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.4f}")
                    if time.monotonic() - saved > CHECKPOINT_SECONDS:
                        self._save()
                        saved = time.monotonic()
        except KeyboardInterrupt:
            if not self.stepping:  # half a step is never kept
                self._save()
            raise
        loss_after = self._measure()
        moved = sum(float((self.masters[name] - original[name].float()).square().sum()) for name in original)
        size = sum(float(tensor.float().square().sum()) for tensor in original.values())
        return FinetuneReport(
            steps=self.state["step"],
            trained=sum(parameter.numel() for parameter in self.routers.values()),
            loss_before=self.state["loss_before"],
            loss_after=loss_after,
            change=(moved / size) ** 0.5,
            seconds=round(self.state["seconds"], 1),
        )

    def _step(self, total: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (1 - self.state["step"] / total)
        # transformers recomputes layers in training mode alone; otherwise no dropout or jitter is wanted.
        self.model.train(self.config.gradient_checkpointing)
        loss = self.objective(self._batch(self.state["step"]))
        check_loss(loss, self.state["step"] + 1, self.model.named_parameters())
        loss.backward()
        for name, parameter in self.routers.items():
            # None where no chosen expert depends on this router, as in a layer that routes nothing.
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.stepping = True
        self.optimizer.step()
        self._write_routers()
        self.state["step"] += 1
        check_weights(self.masters.items(), self.state["step"])
        self.stepping = False
        return loss.item()

    def _batch(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.text_NL), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        first = place * self.config.batch_size
        return self._on_device(self.text_NL[order[first : first + self.config.batch_size]])

    @torch.no_grad()
    def _measure(self) -> float:
        self.model.eval()
        return sum(float(self.objective(self._on_device(row_L[None]))) for row_L in self.probe_NL) / len(self.probe_NL)

    @torch.no_grad()
    def _write_routers(self) -> None:
        for name, parameter in self.routers.items():
            parameter.copy_(self.masters[name])

    def _on_device(self, tokens_BL: Tensor) -> Tensor:
        return tokens_BL.to(next(iter(self.routers.values())).device)

    def _save(self) -> None:
        if self.checkpoint:
            content = {"state": self.state, "masters": self.masters, "optimizer": self.optimizer.state_dict()}
            save_state(self.checkpoint, self.state["step"], content)

    def _resume(self) -> None:
        saved = load_state(self.checkpoint)
        if saved is None:
            return
        self.state = saved["state"]
        for name, master in self.masters.items():
            master.copy_(saved["masters"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self._write_routers()


def _fingerprints(model: nn.Module, routers: dict[str, nn.Parameter]) -> dict[str, int]:
    """A checksum of every tensor of the model that is no router's."""
    return {
        name: zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in model.state_dict().items()
        if name not in routers
    }
