"""The paths that tokens take through the first choices of several layers in a row.

The number of possible paths grows as E^length, so these figures depend on how many tokens are looked at; they are
taken from the sample, and so is their control.

Shape letters: L gates, T tokens, W windows of consecutive gates, P paths seen.
"""

import torch
from torch import Tensor

LENGTH = 3  # gates


def path_numbers(first_LT: Tensor, num_experts: int, *, length: int = LENGTH) -> Tensor:
    """A number for the path of every token in every window, [W, T]; W = L - length + 1, or 1 where L is smaller."""
    length = min(length, len(first_LT))
    windows_WTP = first_LT.unfold(0, length, 1)
    powers_P = num_experts ** torch.arange(length)
    return (windows_WTP * powers_P).sum(dim=-1)


def entropy(paths_WT: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """-sum_p q_p log q_p, [W], nats, with q_p the part of the tokens on path p (Shannon 1948).

    By chance the sum of the entropies of the gates' first choices, less what few tokens hide: the control has that.

    Args:
        paths_WT: as `path_numbers` gives them.
        weights_T: how often each token counts.
    """
    return torch.stack([torch.special.entr(part_P).sum() for part_P in _parts(paths_WT, weights_T)])


def distinct(paths_WT: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """The number of paths that any token takes, [W], float64; at most E^length."""
    return torch.stack([(part_P > 0).sum().double() for part_P in _parts(paths_WT, weights_T)])


def _parts(paths_WT: Tensor, weights_T: Tensor | None) -> list[Tensor]:
    weights_T = torch.ones(paths_WT.shape[1], dtype=torch.float64) if weights_T is None else weights_T.double()
    counts = []
    for paths_T in paths_WT:
        _, place_T = torch.unique(paths_T, return_inverse=True)
        count_P = torch.bincount(place_T, weights=weights_T)
        counts.append(count_P / count_P.sum())
    return counts
