"""The router: how likely each draft is to be accepted, before anything is drafted.

A three-layer MLP on the state that the first head starts from gives a logit r_j for each head. sigmoid(r_j) is the
probability that head j is right where all heads before it are, so a head's gate is

    g_j = prod_{i<=j} sigmoid(r_i)

the probability that drafts 1..j are all accepted, and 1 + sum_{j<=k} g_j the tokens to expect of a pass that verifies
k drafts. Gates never rise with j: heads that draft are always the first ones.

The copy router says the same of copied tokens (copying.py): its gate g_k is the probability that copied tokens 1..k
all stand, from the backbone's own state (it has no heads to judge) and from how long a run of tokens stood before.

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
        self.layers = _three_layers(hidden_size, width, num_heads)

    def forward(self, state_ND: Tensor) -> Tensor:
        """[N, H] logits, float32: each head right, given that those before it are."""
        return self.layers(state_ND).float()


class CopyRouter(nn.Module):
    """Odds by the length of the match, and three linear layers on the state that shift them.

    Args:
        hidden_size: D, of the backbone.
        width: numbers in the two inner layers.
        longest: K.
    """

    def __init__(self, hidden_size: int, width: int, longest: int) -> None:
        super().__init__()
        self.odds = nn.Embedding(len(MATCH_STEPS) + 1, longest)
        self.layers = _three_layers(hidden_size, width, longest)
        for zero in (self.odds.weight, self.layers[-1].weight, self.layers[-1].bias):
            nn.init.zeros_(zero)

    def forward(self, state_ND: Tensor, matched_N: Tensor) -> Tensor:
        """[N, K] logits, float32: each copied token right, given that those before it are.

        Args:
            state_ND: the backbone's, before the last token.
            matched_N: tokens at the text's end that stood before as well.
        """
        return (self.odds(_step_of(matched_N)) + self.layers(state_ND)).float()

    @torch.no_grad()
    def count(self, matched_N: Tensor, right_NK: Tensor, judged_NK: Tensor) -> None:
        """Begin with the odds of known text, which training would take long to find.

        Args:
            matched_N: as in `forward`.
            right_NK: whether a copied token was right.
            judged_NK: where that can be said, and all before it were.
        """
        step_N = _step_of(matched_N)
        for step in range(len(MATCH_STEPS) + 1):
            there_NK = judged_NK & (step_N == step)[:, None]
            # One right and one wrong are added (Laplace), so that no odds are infinite.
            right_K = (right_NK & there_NK).sum(dim=0) + 1.0
            wrong_K = (~right_NK & there_NK).sum(dim=0) + 1.0
            self.odds.weight[step] = (right_K / wrong_K).log()


def _three_layers(hidden_size: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.RMSNorm(hidden_size, eps=1e-6),
        nn.Linear(hidden_size, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, outputs),
    )


def _step_of(matched_N: Tensor) -> Tensor:
    return torch.bucketize(matched_N, matched_N.new_tensor(MATCH_STEPS))


def gates_of(logits_NH: Tensor) -> Tensor:
    """[N, H] gates: the probability that this token and all drafted before it are right."""
    return torch.sigmoid(logits_NH).cumprod(dim=-1)
