"""Which documents of a dataset are read, and in which order."""

import hashlib
from collections.abc import Iterable

# More characters than a token ever has on average: so many surely give the blocks that are wanted.
CHARACTERS_PER_TOKEN = 8


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
