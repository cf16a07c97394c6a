"""The tokens that heads may draft: all, or those that are frequent in what they are trained on.

The lm_head is most of what a small head costs, and most of its rows are for tokens that a draft seldom gets right.
Over the frequent ones alone a draft is cheaper; what the backbone says, and so the text, is not touched (FR-Spec: Zhao
et al. 2025, arXiv:2502.14856).

Shape letters: N positions (any leading shape), D hidden size, V tokens of the lm_head, C classes: the tokens that may
be drafted, and OFF last.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moe_common.text.packing import IGNORED_LABEL


@dataclass(frozen=True)
class DraftVocabulary:
    """Classes, and the tokens they stand for.

    Args:
        token_C: of each class; that of OFF is V.
        class_V: of each token, and of OFF behind them; -100 for a token that is not drafted.
        score: from states, [N, D], to scores of all classes but OFF, [N, C - 1].
    """

    token_C: Tensor
    class_V: Tensor
    score: Callable[[Tensor], Tensor]

    def classes(self, token_N: Tensor) -> Tensor:
        """[N] the class of each token; -100 stays -100."""
        return torch.where(token_N == IGNORED_LABEL, IGNORED_LABEL, self.class_V[token_N.clamp(min=0)])


def draft_vocabulary(
    token_S: Tensor, num_tokens: int, lm_head: nn.Linear, whole_lm_head: Callable[[Tensor], Tensor]
) -> DraftVocabulary:
    """The vocabulary of some tokens.

    Args:
        token_S: the tokens.
        num_tokens: V.
        lm_head: of the backbone, whose rows are taken.
        whole_lm_head: scores of all tokens, for a vocabulary of all.
    """
    where = token_S.device
    token_C = torch.cat([token_S, token_S.new_tensor([num_tokens])])
    class_V = torch.full((num_tokens + 1,), IGNORED_LABEL, device=where)
    class_V[token_C] = torch.arange(len(token_C), device=where)
    if len(token_S) == num_tokens:
        return DraftVocabulary(token_C, class_V, whole_lm_head)
    weight_SD = lm_head.weight[token_S.to(lm_head.weight.device)].to(where)
    bias = getattr(lm_head, "bias", None)
    bias_S = None if bias is None else bias[token_S.to(bias.device)].to(where)
    return DraftVocabulary(token_C, class_V, lambda state_ND: linear(state_ND.to(weight_SD.dtype), weight_SD, bias_S))


def most_frequent(rows: Iterable[list[int]], num_tokens: int, size: int) -> Tensor:
    """[size] the tokens that occur most often, in the order of their numbers; among equals the lower number.

    Args:
        rows: of tokens; numbers below 0 are no tokens.
        num_tokens: V.
        size: how many to take.
    """
    counts_V = torch.zeros(num_tokens, dtype=torch.long)
    for row in rows:
        token_L = torch.tensor(row)
        counts_V += torch.bincount(token_L[token_L >= 0], minlength=num_tokens)
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values
