"""Which documents of a source are read, in which order, and what blocks of tokens they make."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from moe_common.text.documents import Part, load_documents
from moe_common.text.packing import pack_documents

# More characters than a token ever has on average: so many surely give the blocks that are wanted.
CHARACTERS_PER_TOKEN = 8


def read_blocks(
    source: str | Path,
    split: Part,
    tokenizer,
    *,
    block_size: int,
    max_blocks: int | None = None,
    at_least: int = 1,
    seed: int | None = None,
) -> Dataset:
    """The first whole blocks of a source, as `pack_documents` makes them.

    Args:
        source, split: as `load_documents` takes them.
        tokenizer: of the model that reads the blocks.
        block_size: tokens in a block.
        max_blocks: blocks that are wanted; None gives all.
        at_least: blocks that are needed.
        seed: of the order in which the documents are read; None keeps that of the source.

    Raises:
        ValueError: as `load_documents`; or the source has fewer blocks than are needed.
    """
    texts = load_documents(source, split)["text"]
    if seed is not None:
        texts = [texts[i] for i in reading_order(len(texts), seed)]
    texts = enough_texts(texts, None if max_blocks is None else max_blocks * block_size)
    blocks = pack_documents(texts, tokenizer, block_size=block_size, keep_remainder=False)
    if len(blocks) < at_least:
        raise ValueError(
            f"{source} has {len(blocks)} blocks of {block_size} tokens in its split '{split}', but {at_least} are "
            "needed. Give more text, ask for fewer blocks, or make them shorter."
        )
    return blocks if max_blocks is None else blocks.select(range(min(max_blocks, len(blocks))))


def reading_order(num_documents: int, seed: int) -> list[int]:
    """The documents by number, in an order that depends on the seed alone."""
    return sorted(range(num_documents), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())


def enough_texts(texts: Iterable[str], num_tokens: int | None) -> list[str]:
    """The first texts, so many that they surely have this number of tokens; all where it is None."""
    kept, characters = [], 0
    for text in texts:
        kept.append(text)
        characters += len(text)
        if num_tokens is not None and characters > num_tokens * CHARACTERS_PER_TOKEN:
            break
    return kept
