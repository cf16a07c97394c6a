"""Train the small Llama-type base model that is committed in moe_common/models/base.

    python scripts/train_base_tokenizer.py --output moe_common/models/base
    python scripts/train_base.py --steps 2400 --run_folder runs/base --output moe_common/models/base

The report beside the weights (training_report.json) holds the options of the committed run, how long it took and what
it reached. On a CPU with AMX, --bf16 True --compile True make it several times faster. With other work on the same
cores set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait cost more than ten times the speed there.

A run can be interrupted (Ctrl-C or SIGTERM: it saves a checkpoint first) and started again with the same command; with
another --steps it plans the decay of its learning rate again from where it stands (warmup-stable-decay schedule: Hu et
al. 2024, arXiv:2404.06395, section 4). The hidden matrices are trained with Muon (Jordan et al. 2024) as torch has it,
embeddings and norms with AdamW.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from moe_common.models.perplexity import measure_texts
from moe_common.runs.allocator import keep_freed_memory
from moe_common.runs.checkpoints import load_state, save_state
from moe_common.runs.commands import run_command
from moe_common.runs.finite import check_loss, check_weights
from moe_common.runs.options import OptionParser, check_above, check_at_least
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import write_json
from moe_common.text.domains import DOMAINS
from moe_common.text.packing import token_stream

logger = logging.getLogger("train_base")

# Options that a run may be continued with although they differ; more `steps` prolong it.
FREE_OPTIONS = ("run_folder", "output", "steps", "checkpoint_minutes", "snapshot_minutes", "log_every", "compile")
SHAPE = {"hidden_size": 256, "intermediate_size": 672, "num_hidden_layers": 6, "num_attention_heads": 4}
QUICK_BLOCKS = 16  # of each domain's validation text, measured while training runs and again by the tests


@dataclass(kw_only=True)
class BaseTrainingConfig:
    run_folder: str = field(metadata={"help": "Folder of the checkpoint; a run found there is continued."})
    output: str = field(
        default="moe_common/models/base",
        metadata={"help": "Folder that holds the tokenizer and receives the model and its report."},
    )
    steps: int = field(default=2400, metadata={"help": "Optimiser steps in all, those of earlier runs included."})
    block_size: int = field(default=512, metadata={"help": "Tokens in a block."})
    blocks_per_step: int = field(default=16, metadata={"help": "Blocks in an optimiser step."})
    blocks_at_once: int = field(default=8, metadata={"help": "Blocks in one forward pass; divides blocks_per_step."})
    # Little math: it has 64 templates, which are soon known by heart. With a share of 0.16 the perplexity of the
    # templates that are held out rose from step 120 on (69, then 77 at step 420) while prose and code still halved.
    prose_share: float = field(default=0.48, metadata={"help": "Share of the training tokens that are prose."})
    code_share: float = field(default=0.50, metadata={"help": "Share that are code; the rest is math."})
    optimizer: Literal["muon", "adamw"] = field(default="muon", metadata={"help": "Optimiser of the hidden matrices."})
    learning_rate: float = field(default=6e-3, metadata={"help": "Peak rate of every parameter, in AdamW's units."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decoupled decay of the matrices."})
    warmup_steps: int = field(default=50, metadata={"help": "Steps of the linear warm-up."})
    decay_fraction: float = field(default=0.3, metadata={"help": "Last part of the steps, where the rate falls to 0."})
    bf16: bool = field(default=False, metadata={"help": "Matrix products in bfloat16; fast on a CPU with AMX only."})
    compile: bool = field(
        default=False, metadata={"help": "Compilation of the training step by torch.compile; needs a C++ compiler."}
    )
    checkpoint_minutes: float = field(default=5, metadata={"help": "Minutes between two checkpoints."})
    snapshot_minutes: float = field(
        default=0, metadata={"help": "Minutes after which the model is written once more; 0: never."}
    )
    log_every: int = field(default=10, metadata={"help": "Steps between two progress lines."})
    seed: int = field(default=0, metadata={"help": "Seed of the initialisation and of the order of the blocks."})

    def __post_init__(self):
        check_at_least(self, steps=1, block_size=2, blocks_per_step=1, blocks_at_once=1, warmup_steps=1, log_every=1)
        check_at_least(self, weight_decay=0, decay_fraction=0, checkpoint_minutes=0, snapshot_minutes=0, seed=0)
        check_above(self, learning_rate=0)
        if self.blocks_per_step % self.blocks_at_once:
            raise ValueError(
                f"blocks_at_once is {self.blocks_at_once} and does not divide blocks_per_step "
                f"({self.blocks_per_step}). Choose a divisor."
            )
        if min(self.shares.values()) < 0:
            raise ValueError(
                f"The shares are {self.shares}, but none may be negative. Lower prose_share or code_share."
            )

    @property
    def shares(self) -> dict[str, float]:
        return {
            "prose": self.prose_share,
            "code": self.code_share,
            "math": round(1 - self.prose_share - self.code_share, 6),
        }


class BlockSampler:
    """Blocks of one domain, each epoch in a new order and cut at a new offset; the n-th block depends on n and
    seed."""

    def __init__(self, stream: np.ndarray, *, block_size: int, seed: int):
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.blocks_per_epoch = len(stream) // block_size - 1
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def block(self, n: int) -> np.ndarray:
        epoch, place = divmod(n, self.blocks_per_epoch)
        if epoch != self.order[0]:
            rng = np.random.default_rng([self.seed, epoch])
            starts = rng.integers(self.block_size) + self.block_size * rng.permutation(self.blocks_per_epoch)
            self.order = (epoch, starts)
        start = self.order[1][place]
        return self.stream[start : start + self.block_size]


def build_model(tokenizer, *, context: int) -> LlamaForCausalLM:
    """An untrained Llama of 6 layers and width 256: 5.7 million parameters, embedding and head shared."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **SHAPE,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model, config: BaseTrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon (or AdamW) for the matrices inside the layers, AdamW for the embedding and the norms."""
    hidden = [parameter for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim == 2]
    of_hidden = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in model.parameters() if id(parameter) not in of_hidden]
    adam = {"lr": config.learning_rate, "betas": (0.9, 0.95)}
    rest = torch.optim.AdamW(others, weight_decay=0.0, **adam)
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(hidden, weight_decay=config.weight_decay, **adam), rest]
    muon = torch.optim.Muon(
        hidden, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, rest]


def rate_factor(step: int, config: BaseTrainingConfig, *, first_of_decay: int) -> float:
    """Part of the peak learning rate that step `step` (from 0) runs at; from `first_of_decay` on it falls to 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    decay = min(1.0, (config.steps - step) / max(1, config.steps - first_of_decay))
    return warmup * decay


def next_token_loss(model, tokens_BL: Tensor) -> Tensor:
    """Mean loss of a token in nats."""
    return model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False).loss


def train(
    config: BaseTrainingConfig,
    *,
    command: str = "train_base.py",
    build_model: Callable = build_model,
    loss_of: Callable[..., Tensor] = next_token_loss,
) -> dict:
    """Train, write the model into config.output, and return the report that is written beside it.

    Args:
        config: the run.
        command: by which the run's folder knows it.
        build_model: makes the untrained model of a tokenizer and a `context` in tokens.
        loss_of: what is minimised, of a model and a batch of blocks.
    """
    if not keep_freed_memory():
        logger.info("the allocator stays as it is: large tensors may be slow to come by")
    folder = RunFolder(config.run_folder, command, asdict(config), free=FREE_OPTIONS, option="--run_folder")
    tokenizer = AutoTokenizer.from_pretrained(config.output)
    samplers = {
        domain: BlockSampler(
            token_stream((document["text"] for document in documents("pretraining")), tokenizer),
            block_size=config.block_size,
            seed=config.seed + number,
        )
        for number, (domain, documents) in enumerate(DOMAINS.items())
    }
    logger.info("training tokens %s", {domain: len(sampler.stream) for domain, sampler in samplers.items()})
    torch.manual_seed(config.seed)
    model = build_model(tokenizer, context=config.block_size)
    optimizers = build_optimizers(model, config)
    state = {"step": 0, "seconds": 0.0, "drawn": dict.fromkeys(DOMAINS, 0), "losses": []}
    with folder:
        if (saved := load_state(folder.folder)) is not None:
            state = take_up(saved, model, optimizers)
            logger.info("continuing at step %d of %d", state["step"], config.steps)
        if state.get("planned_steps") != config.steps:  # a new run, or one that is prolonged
            first_of_decay = max(round(config.steps * (1 - config.decay_fraction)), state["step"])
            state |= {"planned_steps": config.steps, "first_of_decay": first_of_decay}
        with signals_noted() as asked_to_stop:
            run_steps(config, model, loss_of, optimizers, samplers, state, tokenizer, asked_to_stop)
        if state["step"] < config.steps:
            logger.info("interrupted at step %d; the same command continues it", state["step"])
            return {"steps": state["step"], "finished": False}
        write_model(model, Path(config.output))
        report = report_on(config, state, tokenizer)
        write_json(Path(config.output) / "training_report.json", report)
    return report


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying of them, so that a step can end and be saved."""
    noted: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: noted.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_steps(config, model, loss_of, optimizers, samplers, state, tokenizer, asked_to_stop: list[int]) -> None:
    """Run the remaining steps, or those until asked_to_stop is no longer empty; changes `state` in place."""
    started = time.perf_counter() - state["seconds"]
    forward = torch.compile(model) if config.compile else model
    folder = Path(config.run_folder)
    last_checkpoint = last_line = time.perf_counter()
    snapshot_due = config.snapshot_minutes > 0 and state["seconds"] < 60 * config.snapshot_minutes
    while state["step"] < config.steps and not asked_to_stop:
        factor = rate_factor(state["step"], config, first_of_decay=state["first_of_decay"])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * config.learning_rate
        state["losses"].append(one_step(config, forward, model, loss_of, optimizers, samplers, state))
        state["step"] += 1
        check_weights(model.named_parameters(), state["step"])
        now = time.perf_counter()
        state["seconds"] = now - started
        if state["step"] % config.log_every == 0:
            speed = config.log_every * config.blocks_per_step * config.block_size / (now - last_line)
            recent = state["losses"][-config.log_every :]
            logger.info(
                "step %d of %d loss %.3f rate %.5f tok/s %.0f elapsed_min %.1f",
                state["step"],
                config.steps,
                sum(recent) / len(recent),
                factor * config.learning_rate,
                speed,
                state["seconds"] / 60,
            )
            last_line = now
        if now - last_checkpoint > 60 * config.checkpoint_minutes:
            keep(folder, model, optimizers, state)
            quick = held_out(model, tokenizer, "validation", QUICK_BLOCKS)
            logger.info("step %d validation perplexity %s", state["step"], quick)
            last_checkpoint = last_line = time.perf_counter()
        if snapshot_due and state["seconds"] > 60 * config.snapshot_minutes:
            write_model(model, Path(config.output))
            logger.info("early snapshot written to %s", config.output)
            snapshot_due = False
    keep(folder, model, optimizers, state)


def one_step(config, forward, model, loss_of, optimizers, samplers, state) -> float:
    """One optimiser step; returns the mean of what it minimises."""
    rng = np.random.default_rng([config.seed, state["step"]])
    counts = rng.multinomial(config.blocks_per_step, list(config.shares.values()))
    blocks = []
    for domain, count in zip(config.shares, counts, strict=True):
        first = state["drawn"][domain]
        blocks += [samplers[domain].block(n) for n in range(first, first + count)]
        state["drawn"][domain] += int(count)
    batch = torch.from_numpy(np.stack(blocks))[torch.from_numpy(rng.permutation(len(blocks)))]
    model.train()
    total = 0.0
    for part in batch.split(config.blocks_at_once):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss = loss_of(forward, part)
        check_loss(loss, state["step"] + 1, model.named_parameters())
        weight = len(part) / len(batch)
        (loss * weight).backward()
        total += loss.item() * weight
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def held_out(model, tokenizer, split: str, max_blocks: int | None = None) -> dict[str, float]:
    """Perplexity of every domain's held-out documents, in blocks of the model's whole context."""
    context = model.config.max_position_embeddings
    found = {
        domain: measure_texts(
            model, tokenizer, (d["text"] for d in documents(split)), block_size=context, max_blocks=max_blocks
        )
        for domain, documents in DOMAINS.items()
    }
    return {domain: round(loss.perplexity, 3) for domain, loss in found.items()}


def report_on(config: BaseTrainingConfig, state: dict, tokenizer) -> dict:
    """What was trained, how long it took and how good it is; perplexities are those of the model as it is stored."""
    stored = AutoModelForCausalLM.from_pretrained(config.output, dtype=torch.float32)
    last = state["losses"][-100:]
    tokens = state["step"] * config.blocks_per_step * config.block_size
    return {
        "parameters": stored.num_parameters(),
        "steps": state["step"],
        "tokens": tokens,
        "tokens_by_domain": {domain: blocks * config.block_size for domain, blocks in state["drawn"].items()},
        "minutes": round(state["seconds"] / 60, 1),
        "tokens_per_second": round(tokens / state["seconds"]),
        "threads": torch.get_num_threads(),
        "training_loss_of_last_100_steps": round(sum(last) / len(last), 4),
        "validation_perplexity": held_out(stored, tokenizer, "validation"),
        f"validation_perplexity_of_first_{QUICK_BLOCKS}_blocks": held_out(
            stored, tokenizer, "validation", QUICK_BLOCKS
        ),
        "test_perplexity": held_out(stored, tokenizer, "test"),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "config": {
            name: value for name, value in asdict(config).items() if name not in ("run_folder", "output", "log_every")
        },
    }


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Put a bf16 copy of the model into the folder; a reader finds the old weights or the new, never half of them."""
    scratch = folder.parent / f".{folder.name}-being-written"
    shutil.rmtree(scratch, ignore_errors=True)
    stored = type(model)(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.save_pretrained(scratch)
    for name in sorted(os.listdir(scratch)):
        os.chmod(scratch / name, 0o644)  # safetensors makes its files readable to their owner alone
        os.replace(scratch / name, folder / name)
    scratch.rmdir()


def keep(folder: Path, model, optimizers, state: dict) -> None:
    """Write everything that continuing needs."""
    optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    held = {"model": model.state_dict(), "optimizers": optimizer_states, "state": state}
    save_state(folder, state["step"], held)


def take_up(saved: dict, model, optimizers) -> dict:
    """Bring model and optimisers to the checkpoint's state and return the counters."""
    model.load_state_dict(saved["model"])
    for optimizer, optimizer_state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return saved["state"]


def main(argv: list[str] | None = None) -> int:
    parser = OptionParser(
        (BaseTrainingConfig,),
        description=__doc__.splitlines()[0],
        epilog="example:\npython scripts/train_base.py --run_folder runs/base --steps 950 --bf16",
    )
    return run_command(parser, lambda config: json.dumps(train(config), indent=2), argv)


if __name__ == "__main__":
    sys.exit(main())
