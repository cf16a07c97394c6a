"""Documents to rows of tokens, each predicted from those before it in its own document alone.

A row begins with the end-of-text token, so that the first token of a document is predicted too; a document that is
longer than a row goes on in the next, which again begins so. `labels` are aligned with the predictions: the label at a
place is the token behind it.

Shape letters: B rows, L tokens of the longest row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_common.text.packing import IGNORED_LABEL

ORDER_SEED = 0


@dataclass(frozen=True)
class Row:
    """A piece of a document.

    Args:
        tokens: the end-of-text token, then those of the piece.
        num_bytes: UTF-8 bytes of the piece's text.
        source: the source of the document.
        document: number of the document within its source.
    """

    tokens: list[int]
    num_bytes: int
    source: str
    document: int


def shuffled(texts: Sequence[str]) -> list[str]:
    """Documents in a random order that is the same in every run: calibration takes the first, training the last."""
    return Random(ORDER_SEED).sample(list(texts), len(texts))


def to_rows(
    texts: Sequence[str],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    row_length: int,
    max_tokens: int | None = None,
    rows_per_document: int | None = None,
) -> list[Row]:
    """The rows of a source's documents, in order.

    Args:
        texts: its documents.
        source: its name.
        tokenizer: of the experts; a fast one, which says where its tokens stand in the text.
        row_length: most tokens of a row.
        max_tokens: stop when so many are reached.
        rows_per_document: take no more of a document than its first so many rows.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    start = tokenizer.eos_token_id
    if start is None:
        raise ValueError(f"{type(tokenizer).__name__} has no end-of-text token. Set tokenizer.eos_token.")
    rows, num_tokens = [], 0
    piece = row_length - 1
    for document, text in enumerate(texts):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = [*encoded["input_ids"], start]
        # Where each token begins, in bytes; the end-of-text token stands behind the text and has none.
        bytes_before = [0, *accumulate(len(character.encode()) for character in text)]
        begins = [bytes_before[first] for first, _ in encoded["offset_mapping"]] + [bytes_before[-1]] * 2
        begins[0] = 0
        for number, at in enumerate(range(0, len(tokens), piece)):
            if rows_per_document is not None and number == rows_per_document:
                break
            kept = tokens[at : at + piece]
            rows.append(Row([start, *kept], begins[at + len(kept)] - begins[at], source, document))
            num_tokens += len(kept)
            if max_tokens is not None and num_tokens >= max_tokens:
                return rows
    return rows


def collate_rows(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 [B, L], padded on the right."""
    length = max(len(row.tokens) for row in rows)
    filled = [[*row.tokens, *[pad] * (length - len(row.tokens))] for row in rows]
    labels = [[*row.tokens[1:], *[IGNORED_LABEL] * (length - len(row.tokens) + 1)] for row in rows]
    mask = [[1] * len(row.tokens) + [0] * (length - len(row.tokens)) for row in rows]
    return {
        "input_ids": torch.tensor(filled),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def fingerprint(rows: Sequence[Row]) -> str:
    """A digest of the tokens of rows and of their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(torch.tensor([len(row.tokens), *row.tokens]).numpy().tobytes())
    return digest.hexdigest()[:16]
