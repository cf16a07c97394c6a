"""Token heads: each predicts one token further ahead than the one before it.

The backbone's own output gives the next token x_1 of a window. Head j then predicts x_{j+1}:

    s_0 = h + attention over the text               h: the state that the backbone's lm_head reads
    s_j = s_{j-1} + W_down silu(W_up [norm(s_{j-1}); norm(E x_j)])
    logits_j = [lm_head(s_j); o_j . s_j + b_j]      the last one is OFF: no token from this head

lm_head and the embedding E are the backbone's and frozen. W_down starts at zero, so that training starts from the
backbone's own prediction. Heads that read the tokens drafted before them are those of Hydra (Ankner et al. 2024,
arXiv:2402.05109); without E x_j they are independent heads as in Medusa (Cai et al. 2024, arXiv:2401.10774), built for
comparison. The attention (prefix_attention.py) may be left out, and independent heads never have it.

Shape letters: N positions (any leading shape), D hidden size, V vocabulary, H heads.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from moe_ext.multi_token.model.prefix_attention import PrefixAttention

HeadKind = Literal["sequential", "independent"]

# Below the logits of any likely token, so that no head is OFF before it has learnt when to be.
OFF_BIAS = -10.0


class TokenHead(nn.Module):
    """One head: a residual block on the running state, and the logit of OFF.

    Args:
        hidden_size: D, of the backbone.
        width: numbers in the block's inner layer.
        reads_token: whether the block also reads the window's token before the one it predicts.
    """

    def __init__(self, hidden_size: int, width: int, *, reads_token: bool) -> None:
        super().__init__()
        self.state_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.token_norm = nn.RMSNorm(hidden_size, eps=1e-6) if reads_token else None
        self.up = nn.Linear((1 + reads_token) * hidden_size, width)
        self.down = nn.Linear(width, hidden_size, bias=False)
        self.off = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.off.weight)
        nn.init.constant_(self.off.bias, OFF_BIAS)

    def forward(self, state_ND: Tensor, token_ND: Tensor) -> Tensor:
        """The next state.

        Args:
            state_ND: of the head before, or of the backbone.
            token_ND: embedding of the token before the one that is predicted; not read by an independent head.
        """
        read = self.state_norm(state_ND)
        if self.token_norm is not None:
            read = torch.cat([read, self.token_norm(token_ND)], dim=-1)
        return state_ND + self.down(silu(self.up(read)))


class TokenHeads(nn.Module):
    """All heads of a backbone.

    Args:
        num_heads: H.
        hidden_size: D.
        width: see `TokenHead`.
        kind: `sequential` heads read the tokens drafted before them and go on from each other's state; `independent`
            ones each start from the backbone's state and read no token.
        prefix_attention: whether a layer of attention over the text stands in front of them.
    """

    def __init__(
        self,
        num_heads: int,
        hidden_size: int,
        width: int,
        kind: HeadKind = "sequential",
        *,
        prefix_attention: bool = False,
    ) -> None:
        super().__init__()
        self.kind: HeadKind = kind
        reads_token = kind == "sequential"
        self.blocks = nn.ModuleList(TokenHead(hidden_size, width, reads_token=reads_token) for _ in range(num_heads))
        self.prefix = PrefixAttention(hidden_size) if prefix_attention else None

    def step(self, place: int, first_ND: Tensor, state_ND: Tensor, token_ND: Tensor) -> Tensor:
        """The state of head `place` (from 0).

        Args:
            first_ND: s_0.
            state_ND: of the head before; `first_ND` for the first.
            token_ND: embedding of the token before the one that is predicted.
        """
        return self.blocks[place](state_ND if self.kind == "sequential" else first_ND, token_ND)

    def logits(self, place: int, state_ND: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, V + 1] scores of head `place`, float32; the last column is OFF.

        Args:
            lm_head: the backbone's; or its rows of some tokens, as many columns then.
        """
        off_N1 = self.blocks[place].off(state_ND)
        return torch.cat([lm_head(state_ND).float(), off_N1.float()], dim=-1)
