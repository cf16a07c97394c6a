"""How good a model is: loss and perplexity on held-out text, and tasks of lm-eval.

Shape letters: N blocks, B blocks at once, L tokens in a block, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_common.text.documents import Part, load_documents
from moe_common.text.packing import pack_documents


@dataclass(frozen=True)
class HeldOut:
    """Held-out text of several sources.

    Args:
        blocks: blocks of tokens [N, L] by source.
    """

    blocks: dict[str, Tensor]

    @classmethod
    def read(
        cls,
        sources: Sequence[str],
        split: Part,
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_size: int,
        max_blocks: int | None = None,
    ) -> "HeldOut":
        """The first blocks of each source's split.

        Raises:
            ValueError: a source has not one block.
        """
        blocks = {}
        for source in sources:
            texts = load_documents(source, split)["text"]
            packed = pack_documents(texts, tokenizer, block_size=block_size, keep_remainder=False)
            if len(packed) == 0:
                raise ValueError(
                    f"{source} has less than {block_size} tokens in its split '{split}'. Give more text, or shorter "
                    "blocks (seqlen)."
                )
            count = min(len(packed), max_blocks or len(packed))
            blocks[source] = torch.tensor(packed[:count]["input_ids"])
        return cls(blocks)


@torch.no_grad()
def block_losses(model: PreTrainedModel, blocks_NL: Tensor, *, batch_size: int = 8) -> np.ndarray:
    """The mean loss of each block [N] in nats a token, every token but the first predicted from those before it."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = []
    for tokens_BL in blocks_NL.to(device).split(batch_size):
        logits_BLV = model(tokens_BL, use_cache=False).logits[:, :-1].float()
        nll_BL = cross_entropy(logits_BLV.transpose(1, 2), tokens_BL[:, 1:], reduction="none")
        losses.append(nll_BL.double().mean(dim=1).cpu())
    model.train(was_training)
    return torch.cat(losses).numpy()


def losses_by_source(model: PreTrainedModel, held_out: HeldOut, *, batch_size: int = 8) -> dict[str, np.ndarray]:
    """`block_losses` of every source."""
    return {
        source: block_losses(model, blocks_NL, batch_size=batch_size) for source, blocks_NL in held_out.blocks.items()
    }


def mean_loss(losses: dict[str, np.ndarray]) -> float:
    """Nats a token, every source weighing the same."""
    return float(np.mean([values.mean() for values in losses.values()]))


def summary(losses: dict[str, np.ndarray]) -> dict[str, Any]:
    """Perplexity by source, and the mean loss, for a report."""
    return {
        "perplexity": {source: round(math.exp(values.mean()), 4) for source, values in losses.items()},
        "loss": round(mean_loss(losses), 5),
        "blocks": {source: len(values) for source, values in losses.items()},
    }


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """The numbers of lm-eval's tasks, by task and metric.

    Args:
        model, tokenizer: what is measured.
        tasks: names that lm-eval knows; its own fetch their data from the hub.
        tasks_dir: a folder of task descriptions (YAML) with data beside them, for use without the hub.
        limit: documents of each task; None takes all.
        batch_size: requests at once.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: a task that neither lm-eval nor the folder has.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "Tasks are run by the package lm-eval, which is not installed. Install it with: pip install '.[eval]'"
        ) from missing
    manager = TaskManager(include_path=str(tasks_dir) if tasks_dir else None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(
            f"There is no task {unknown[0]}" + (f" in {tasks_dir} or" if tasks_dir else "") + " in lm-eval. Check its "
            "name, or name the folder of its description with --tasks_dir."
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    return {
        task: {name.partition(",")[0]: value for name, value in results.items() if isinstance(value, float)}
        for task, results in found["results"].items()
    }
