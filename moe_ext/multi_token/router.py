"""The router: how likely each head's draft is to be accepted, before anything is drafted.

A three-layer MLP on the backbone's state gives a logit r_j for each head. sigmoid(r_j) is the probability that head j
is right where all heads before it are, so a head's gate is

    g_j = prod_{i<=j} sigmoid(r_i)

the probability that drafts 1..j are all accepted, and 1 + sum_{j<=k} g_j the tokens to expect of a pass that verifies
k drafts. Gates never rise with j: heads that draft are always the first ones.

Shape letters: N positions (any leading shape), D hidden size, H heads.
"""

import torch
from torch import Tensor, nn


class HeadRouter(nn.Module):
    """Three linear layers with SiLU between them.

    Args:
        hidden_size: D, of the backbone.
        width: numbers in the two inner layers.
        num_heads: H.
    """

    def __init__(self, hidden_size: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.RMSNorm(hidden_size, eps=1e-6),
            nn.Linear(hidden_size, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, num_heads),
        )

    def forward(self, state_ND: Tensor) -> Tensor:
        """[N, H] logits, float32: each head right, given that those before it are."""
        return self.layers(state_ND).float()


def gates_of(logits_NH: Tensor) -> Tensor:
    """[N, H] gates: the probability that this head and all before it are right."""
    return torch.sigmoid(logits_NH).cumprod(dim=-1)
