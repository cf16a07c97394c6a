"""Which drafted tokens stand: those that the backbone itself would have chosen, from the first on.

The backbone's choice at each place, greedy or sampled, is made from its own scores and never from the draft; a draft
only decides how far those scores may be read. So greedy output is that of `generate`, and sampled output has the
backbone's own distribution: for a draft that is one fixed token, this is the rule of speculative sampling (Leviathan
et al. 2023, arXiv:2211.17192): it stands with the probability p(draft), and otherwise the token is drawn from p
without it.

Shape letters: B rows, V vocabulary.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def choose(scores_BV: Tensor, *, sampled: bool) -> Tensor:
    """[B] the backbone's token of each row.

    Args:
        scores_BV: after the logits processors.
        sampled: drawn from softmax(scores), else the highest.
    """
    if not sampled:
        return scores_BV.argmax(dim=-1)
    return torch.multinomial(scores_BV.softmax(dim=-1), num_samples=1)[:, 0]


def prepare_cache(cache: Cache) -> None:
    """Make sure that the last tokens can be taken out of a cache again.

    Raises:
        ValueError: they cannot: a static cache, a state that runs through the text.
    """
    # A sliding window has dropped what a roll-back needs, unless it records the past. Before transformers 5.21 it does
    # not, or the masks do not know of it.
    records = hasattr(cache, "is_recording_past")
    if records:
        cache.activate_past_recording()
    rolls_back = all(
        hasattr(layer, "crop")
        and getattr(layer, "is_croppable", True)
        and (records or not getattr(layer, "is_sliding", False))
        for layer in cache.layers
    )
    if not rolls_back:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        raise ValueError(
            f"The backbone's cache ({kinds}) cannot forget single tokens, which checking a draft needs. Use the "
            "default dynamic cache, or plain generate for this backbone; sliding windows need transformers 5.21."
        )


def roll_back(cache: Cache, num_tokens: int) -> None:
    """Take the last tokens out of the cache."""
    # A sliding window is cut back to its size by `crop` even where nothing is taken out.
    if num_tokens or any(cache.is_sliding):
        cache.crop(-num_tokens)
