"""Held-out perplexity: exp of the mean negative log-likelihood of a token, every real token weighing the same.

The mean runs over all predicted tokens of the text, not over batches or documents, and padding is left out. It is
taken from the logits and not from `outputs.loss`, because a routed model adds its balance losses to the latter.

Shape letters: B blocks in a batch, L tokens in a block, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from moe_common.text.batches import batches_of
from moe_common.text.packing import IGNORED_LABEL, pack_documents


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """What a model makes of a text.

    Args:
        total_nll: summed negative log-likelihood, in nats.
        num_tokens: how many tokens were predicted.
    """

    total_nll: float
    num_tokens: int

    @property
    def mean_nll(self) -> float:
        """Nats a token."""
        return self.total_nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)


def measure_texts(
    model,
    tokenizer,
    texts: Iterable[str],
    *,
    block_size: int = 512,
    batch_size: int = 8,
    max_blocks: int | None = None,
) -> HeldOutLoss:
    """Pack the texts into blocks and measure the model on them; see `measure_blocks`.

    Args:
        model: any causal language model of transformers, with or without PEFT adapters.
        tokenizer: the model's own tokenizer.
        texts: held-out documents.
        block_size: tokens of context; a token is predicted from those before it in its block.
        batch_size: blocks at once.
        max_blocks: measure on the first so many blocks only; None measures on all.
    """
    blocks = pack_documents(texts, tokenizer, block_size=block_size)
    if max_blocks is not None:
        blocks = blocks.select(range(min(max_blocks, len(blocks))))
    return measure_blocks(model, blocks, batch_size=batch_size)


@torch.no_grad()
def measure_blocks(model, blocks: Dataset, *, batch_size: int = 8) -> HeldOutLoss:
    """Sum the negative log-likelihood of every labelled token given those before it in its block.

    The model is put into eval mode and given back in the mode it came in.

    Args:
        model: any causal language model of transformers, with or without PEFT adapters.
        blocks: rows as `moe_common.text.batches.collate` takes them, all of one kind; labels of -100 do not count.
        batch_size: blocks at once.

    Raises:
        ValueError: not one token can be predicted.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total_nll, num_tokens = 0.0, 0
    try:
        for batch in batches_of(blocks, batch_size, device):
            labels_BL = batch.pop("labels")[:, 1:]
            logits_BLV = model(**batch).logits
            # fp32: a log-softmax in bf16 is off by more than the differences one wants to see.
            nll = cross_entropy(
                logits_BLV[:, :-1].float().flatten(0, 1),
                labels_BL.flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            )
            total_nll += nll.item()
            num_tokens += int((labels_BL != IGNORED_LABEL).sum())
    finally:
        model.train(was_training)
    if num_tokens == 0:
        raise ValueError(
            f"The {len(blocks)} blocks hold no token to predict: every label after the first is -100. "
            "Give longer text, or check the labels."
        )
    return HeldOutLoss(total_nll=total_nll, num_tokens=num_tokens)
