"""Cut documents into blocks of one length, for language-model training and evaluation.

Shape letters: N blocks, L tokens in a block.
"""

from collections.abc import Iterable

import numpy as np
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


def token_stream(texts: Iterable[str], tokenizer) -> np.ndarray:
    """All documents' tokens in one row (int64), an end-of-text token after each document."""
    stream: list[int] = []
    for batch in _in_batches(texts, TOKENIZE_AT_ONCE):
        for document in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            stream.extend(document)
            stream.append(tokenizer.eos_token_id)
    return np.asarray(stream, dtype=np.int64)


def _in_batches(items: Iterable[str], size: int) -> Iterable[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
