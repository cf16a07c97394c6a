"""The router: how likely each draft is to be accepted, before anything is drafted.

A three-layer MLP on the backbone's state gives a logit r_j for each head. sigmoid(r_j) is the probability that head j
is right where all heads before it are, so a head's gate is

    g_j = prod_{i<=j} sigmoid(r_i)

the probability that drafts 1..j are all accepted, and 1 + sum_{j<=k} g_j the tokens to expect of a pass that verifies
k drafts. Gates never rise with j: heads that draft are always the first ones.

The copy router says the same of copied tokens (copying.py): its gate g_k is the probability that copied tokens 1..k
all stand, from the state and from how long a run of tokens stood before.

Shape letters: N positions (any leading shape), D hidden size, H heads, K copied tokens.
"""

import torch
from torch import Tensor, nn

MATCH_STEPS = (0, 1, 2, 3, 4, 8, 16)  # longest match of each step; behind them is one more


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


class CopyRouter(nn.Module):
    """Three linear layers with SiLU between them; the length of the match is added to what the first one gives.

    Args:
        hidden_size: D, of the backbone.
        width: numbers in the two inner layers.
        longest: K.
    """

    def __init__(self, hidden_size: int, width: int, longest: int) -> None:
        super().__init__()
        self.state_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.state = nn.Linear(hidden_size, width)
        self.match = nn.Embedding(len(MATCH_STEPS) + 1, width)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, longest))
        nn.init.zeros_(self.match.weight)

    def forward(self, state_ND: Tensor, matched_N: Tensor) -> Tensor:
        """[N, K] logits, float32: each copied token right, given that those before it are.

        Args:
            state_ND: the backbone's, before the last token.
            matched_N: tokens at the text's end that stood before as well.
        """
        step_N = torch.bucketize(matched_N, matched_N.new_tensor(MATCH_STEPS))
        return self.layers(self.state(self.state_norm(state_ND)) + self.match(step_N)).float()


def gates_of(logits_NH: Tensor) -> Tensor:
    """[N, H] gates: the probability that this token and all drafted before it are right."""
    return torch.sigmoid(logits_NH).cumprod(dim=-1)
