"""Copies of the text so far as drafts: what followed where the last tokens stood before.

The longest run of tokens that ends the text is looked up where it stood last, and what followed it there is drafted
(prompt lookup; inference with reference: Yang et al. 2023, arXiv:2304.04487). As in LZ77 (Ziv and Lempel 1977) a copy
may run on into itself, so that a text that turns in a circle of three tokens is copied for as long as it turns.

Shape letters: B rows, L tokens, K copied tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_common.text.packing import IGNORED_LABEL

LONGEST_KEY = 8  # tokens that are looked up together
LONGEST_MATCH = 32  # tokens; longer matches are not told apart


@dataclass(frozen=True)
class Copy:
    """What followed a match.

    Args:
        matched: tokens at the text's end that stood before as well; 0 where nothing is copied.
        tokens: what followed them there.
    """

    matched: int
    tokens: list[int]


class CopyIndex:
    """Where each run of tokens of a growing text was seen last with something behind it.

    Args:
        tokens: of the text so far.
    """

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: list[int] = []
        self.behind: dict[tuple[int, ...], int] = {}  # a run of tokens -> the place of what followed it last
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """The text goes on with these."""
        for token in tokens:
            place = len(self.tokens)
            for length in range(1, min(LONGEST_KEY, place) + 1):
                self.behind[tuple(self.tokens[place - length :])] = place
            self.tokens.append(token)

    def copy(self, num_tokens: int) -> Copy:
        """As many tokens of what may follow, or none where the last token is new."""
        text = self.tokens
        for length in range(min(LONGEST_KEY, len(text)), 0, -1):
            place = self.behind.get(tuple(text[-length:]))
            if place is not None:
                # What lies between there and the end goes round.
                period = len(text) - place
                return Copy(self._matched(place, length), [text[place + step % period] for step in range(num_tokens)])
        return Copy(0, [])

    def _matched(self, place: int, known: int) -> int:
        """How many tokens before `place` are those that end the text; so many are known to be."""
        while known < min(LONGEST_MATCH, place) and self.tokens[place - known - 1] == self.tokens[-known - 1]:
            known += 1
        return known


def copies_everywhere(tokens_BL: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """What is copied at every position of known text.

    Args:
        tokens_BL: the text.
        num_tokens: K.

    Returns:
        matched_BL and copied_BLK: at position t what may follow x_{t+1}, as at generation, where the state behind x_t
        has chosen x_{t+1} already; -1 where nothing is copied.
    """
    num_rows, length = tokens_BL.shape
    matched_BL = torch.zeros(num_rows, length, dtype=torch.long)
    copied_BLK = torch.full((num_rows, length, num_tokens), -1)
    for row, tokens in enumerate(tokens_BL.tolist()):
        index = CopyIndex(tokens[:1])
        for place, token in enumerate(tokens[1:]):
            index.extend([token])
            copy = index.copy(num_tokens)
            if copy.matched:
                matched_BL[row, place] = copy.matched
                copied_BLK[row, place] = torch.tensor(copy.tokens)
    return matched_BL.to(tokens_BL.device), copied_BLK.to(tokens_BL.device)


def judge_copies(copied_BLK: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Whether copied tokens are what the text says.

    Args:
        copied_BLK: as `copies_everywhere` gives them.
        labels_BL: the text; -100 where it is not to be learnt.

    Returns:
        right_BLK and judged_BLK: a copied token is right, and that can be said of it and nothing before it was wrong.
    """
    length, num_tokens = copied_BLK.shape[1:]
    ahead_BL = pad(labels_BL, (0, num_tokens + 2), value=IGNORED_LABEL)
    target_BLK = ahead_BL[:, 2:].unfold(1, num_tokens, 1)[:, :length]
    right_BLK = copied_BLK == target_BLK
    before_BLK = torch.cat([torch.ones_like(right_BLK[..., :1]), right_BLK[..., :-1]], dim=-1)
    judged_BLK = before_BLK.long().cumprod(dim=-1).bool() & (copied_BLK >= 0) & (target_BLK >= 0)
    return right_BLK, judged_BLK
