"""How good a model is on held-out text of several sources: the loss of each block, and what a report says of it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from moe_common.models.perplexity import block_losses


def losses_by_source(
    model: PreTrainedModel, held_out: Mapping[str, Dataset], *, batch_size: int = 8
) -> dict[str, np.ndarray]:
    """The mean loss of each block, in nats per token, by source.

    Args:
        model: what is measured.
        held_out: blocks of `moe_common.text.reading.read_blocks` by source.
        batch_size: blocks at once.
    """
    measured = {source: block_losses(model, blocks, batch_size=batch_size) for source, blocks in held_out.items()}
    return {source: (totals_N2[:, 0] / totals_N2[:, 1]).numpy() for source, totals_N2 in measured.items()}


def mean_loss(losses: Mapping[str, np.ndarray]) -> float:
    """Nats per token, every source weighing the same."""
    return float(np.mean([values.mean() for values in losses.values()]))


def summary(losses: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Perplexity by source, and the mean loss, for a report."""
    return {
        "perplexity": {source: round(math.exp(values.mean()), 4) for source, values in losses.items()},
        "loss": round(mean_loss(losses), 5),
        "blocks": {source: len(values) for source, values in losses.items()},
    }
