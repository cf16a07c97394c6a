"""Cut documents into blocks of one length, for language-model training and evaluation.

A block may hold the end of one document and the start of the next. Kept apart, a token sees its own document alone:
`position_ids` start again at 0 with each document, and transformers makes a block-diagonal attention mask of that when
neither an attention mask nor a cache is given (eager, sdpa and flash attention). Whether a model does so is tried out,
not looked up.

Shape letters: N blocks, L tokens in a block, V vocabulary.
"""

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from datasets import Dataset

IGNORED_LABEL = -100  # what transformers' losses leave out
TOKENIZE_AT_ONCE = 256  # documents


def pack_documents(texts: Iterable[str], tokenizer, *, block_size: int, keep_remainder: bool = True) -> Dataset:
    """Join documents into one stream, an end-of-text token after each, and cut it into blocks.

    A block may hold the end of one document and the start of the next; tokens see across that border, as is usual in
    language-model training.

    Args:
        texts: the documents.
        tokenizer: any transformers tokenizer with an end-of-text token; its other special tokens are not added.
        block_size: tokens in a block (L).
        keep_remainder: pad the last, shorter block on the right rather than drop it.

    Returns:
        N rows of `input_ids`, `attention_mask` and `labels`, each L long. Labels are the tokens themselves (models
        shift them), and -100 on padding.

    Raises:
        ValueError: the tokenizer has no end-of-text token, or block_size is too small.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-text token to separate documents with. Set tokenizer.eos_token."
        )
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}, but at least 2 tokens are needed: one to read, one to predict.")
    stream = token_stream(texts, tokenizer)
    num_whole, remainder = divmod(len(stream), block_size)
    num_blocks = num_whole + int(keep_remainder and remainder > 0)
    attention_mask_NL = (np.arange(num_blocks * block_size) < len(stream)).astype(np.int64).reshape(-1, block_size)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padded = np.full(num_blocks * block_size, pad, dtype=np.int64)
    kept = min(len(stream), padded.size)
    padded[:kept] = stream[:kept]
    input_ids_NL = padded.reshape(-1, block_size)
    labels_NL = np.where(attention_mask_NL == 1, input_ids_NL, IGNORED_LABEL)
    return Dataset.from_dict(
        {"input_ids": list(input_ids_NL), "attention_mask": list(attention_mask_NL), "labels": list(labels_NL)}
    )


def pack_apart(texts: Iterable[str], tokenizer, *, block_size: int, keep_remainder: bool = False) -> Dataset:
    """As `pack_documents`, but no token sees another document than its own.

    There is no attention mask, because with one transformers does not look at the positions; padding would then be
    counted by a router's losses, so the last, shorter block is dropped unless it is asked for (for measuring). Call
    the model with `use_cache=False`, as `moe_common.text.batches.collate` says to.

    Args:
        texts, tokenizer, block_size: as in `pack_documents`.
        keep_remainder: pad the last, shorter block on the right.

    Returns:
        N rows of `input_ids`, `position_ids` and `labels`, each L long. The label of a document's first token is -100
        too: nothing that it may see predicts it. A document cut by the end of a block starts anew in the next one.
    """
    blocks = pack_documents(texts, tokenizer, block_size=block_size, keep_remainder=keep_remainder)
    if len(blocks) == 0:
        return Dataset.from_dict({"input_ids": [], "position_ids": [], "labels": []})
    held = blocks.with_format("numpy")[:]
    input_ids_NL, labels_NL = held["input_ids"], held["labels"]
    starts_NL = np.zeros(input_ids_NL.shape, dtype=bool)
    starts_NL[:, 0] = True
    starts_NL[:, 1:] = input_ids_NL[:, :-1] == tokenizer.eos_token_id
    places_L = np.arange(input_ids_NL.shape[1])
    position_ids_NL = places_L - np.maximum.accumulate(np.where(starts_NL, places_L, 0), axis=1)
    labels_NL = np.where(starts_NL, IGNORED_LABEL, labels_NL)
    return Dataset.from_dict(
        {"input_ids": list(input_ids_NL), "position_ids": list(position_ids_NL), "labels": list(labels_NL)}
    )


@torch.no_grad()
def keeps_documents_apart(model) -> bool:
    """Whether positions that start again keep this model's attention inside a document.

    Two documents stand in one row; the first is changed, and the second must not notice. A model without positions, or
    with a state that runs through the row, does notice.

    Args:
        model: a causal language model of transformers; its mode is kept.
    """
    half = 8
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    row_L = torch.arange(2 * half, device=device) % vocabulary
    other_L = torch.cat([(row_L[:half] + vocabulary // 2) % vocabulary, row_L[half:]])
    positions_L = torch.arange(half, device=device).repeat(2)
    was_training = model.training
    model.eval()
    try:
        # Row by row: a batch of two could differ by rounding alone.
        first_LV, second_LV = (
            model(input_ids=tokens_L[None], position_ids=positions_L[None], use_cache=False).logits[0].float()
            for tokens_L in (row_L, other_L)
        )
    except TypeError:  # a forward without position_ids
        return False
    finally:
        model.train(was_training)
    change_L = (first_LV - second_LV).abs().amax(dim=-1)
    # Not zero: 8-bit layers pick their outlier columns by all tokens of a row.
    return bool(change_L[half:].max() <= 0.01 * change_L[:half].max())


def token_stream(texts: Iterable[str], tokenizer, *, enough: int | None = None) -> np.ndarray:
    """The documents' tokens in one row (int64), an end-of-text token after each document.

    Args:
        texts, tokenizer: as in `pack_documents`.
        enough: tokens after which no more documents need to be read.
    """
    stream: list[int] = []
    texts = iter(texts)
    while (enough is None or len(stream) < enough) and (batch := list(islice(texts, TOKENIZE_AT_ONCE))):
        for document in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            stream.extend(document)
            stream.append(tokenizer.eos_token_id)
    return np.asarray(stream, dtype=np.int64)
