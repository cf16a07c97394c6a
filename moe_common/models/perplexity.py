"""Held-out perplexity: exp of the mean negative log-likelihood of a token, every real token weighing the same.

The mean runs over all predicted tokens of the text, not over batches or documents, and padding is left out. It is
taken from the logits and not from `outputs.loss`, because a routed model adds its balance losses to the latter.

Shape letters: N blocks, B blocks in a batch, L tokens in a block, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
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


def measure_blocks(model, blocks: Dataset, *, batch_size: int = 8) -> HeldOutLoss:
    """Sum the negative log-likelihood of every labelled token given those before it in its block.

    Args:
        model, blocks, batch_size: as in `block_losses`.

    Raises:
        ValueError: not one token can be predicted.
    """
    total_nll, num_tokens = block_losses(model, blocks, batch_size=batch_size).sum(dim=0).tolist()
    if num_tokens == 0:
        raise ValueError(
            f"The {len(blocks)} blocks hold no token to predict: every label after the first is -100. "
            "Give longer text, or check the labels."
        )
    return HeldOutLoss(total_nll=total_nll, num_tokens=int(num_tokens))


@torch.no_grad()
def block_losses(model, blocks: Dataset, *, batch_size: int = 8) -> Tensor:
    """The loss of each block, in nats, and the number of its predicted tokens: float64 [N, 2].

    The model is put into eval mode and given back in the mode it came in.

    Args:
        model: any causal language model of transformers, with or without PEFT adapters.
        blocks: rows as `moe_common.text.batches.collate` takes them, all of one kind; labels of -100 do not count.
        batch_size: blocks at once.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = []
    try:
        for batch in batches_of(blocks, batch_size, device):
            labels_BL = batch.pop("labels")[:, 1:]
            losses_BL = token_losses(model(**batch).logits[:, :-1], labels_BL)
            counts_B = (labels_BL != IGNORED_LABEL).sum(dim=1)
            sums.append(torch.stack([losses_BL.double().sum(dim=1), counts_B.double()], dim=1).cpu())
    finally:
        model.train(was_training)
    return torch.cat(sums)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss at every place [...], in nats; zero where the label is -100.

    Args:
        logits: [..., V].
        labels: [...], aligned with the predictions.
    """
    # fp32: a log-softmax in bf16 is off by more than the differences one wants to see.
    nll = cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return nll.view(labels.shape)
