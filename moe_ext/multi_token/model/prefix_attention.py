"""One attention layer in front of the token heads, so that they read the text and not one state of it alone.

The token x_{t+1} is chosen already when the heads draft what follows it, so the layer can look up where that token
stood before and what came behind it there:

    q_t = R_t W_q [norm(h_t); norm(E x_{t+1})]          what the text ends with
    k_u = R_u W_k [norm(h_u); norm(E x_u)]              where that stood
    v_u = W_v [norm(h_u); norm(E x_{u+1})]              what followed it there
    s_0 = h_t + W_o sum_{u<=t} softmax_u(q_t . k_u / sqrt(S)) v_u

with h and E the backbone's states and embedding, and R rotary positions (Su et al. 2021, arXiv:2104.09864). The first
head starts from s_0 (heads.py). W_o starts at zero, so that training starts from the backbone's own prediction.

The drafts of EAGLE (Li et al. 2024, arXiv:2401.15077) and of Hydra with prefix attention (Ankner et al. 2024,
arXiv:2402.05109) come from such a layer over states and the tokens that follow them. Here a key reads the token before
the one that its value reads, so that one layer can do what takes a transformer two (an induction head: Olsson et al.
2022, arXiv:2209.11895).

Shape letters: B rows, Q new positions, T = Q + 1 tokens, M positions of the whole text so far, D hidden size,
E = 2 D, A attention heads, S numbers in each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEAD_SIZE = 64  # S, or close to it: D is shared out among D // 64 heads
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Prefix:
    """What the layer keeps of a text.

    Args:
        key_BAMS, value_BAMS: of every position so far.
        mask_BM: False on padding.
    """

    key_BAMS: Tensor
    value_BAMS: Tensor
    mask_BM: Tensor


class PrefixAttention(nn.Module):
    """The layer; see the top of this file.

    Args:
        hidden_size: D, of the backbone; at least 2.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_heads = max(1, hidden_size // HEAD_SIZE)
        # Even, since a rotation turns numbers in pairs.
        self.head_size = hidden_size // self.num_heads // 2 * 2
        width = self.num_heads * self.head_size
        self.state_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.token_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.query = nn.Linear(2 * hidden_size, width, bias=False)
        self.key = nn.Linear(2 * hidden_size, width, bias=False)
        self.value = nn.Linear(2 * hidden_size, width, bias=False)
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(
        self, state_BQD: Tensor, token_BTD: Tensor, mask_BQ: Tensor, past: Prefix | None = None
    ) -> tuple[Tensor, Prefix]:
        """Read on in a text.

        Args:
            state_BQD: the backbone's, behind each new token.
            token_BTD: embeddings of these tokens, and of the one that follows the last of them.
            mask_BQ: 0 where a new token is padding.
            past: what was kept of the text before them; None at its beginning.

        Returns:
            [B, Q, D] what the first head starts from at each new position (of no meaning on padding), and what is to
            be kept of the text up to here; `past` itself stays as it is.
        """
        mask_BQ = mask_BQ.bool()
        position_BQ = mask_BQ.long().cumsum(dim=1) - 1
        if past is not None:
            position_BQ = position_BQ + past.mask_BM.sum(dim=1, keepdim=True)
        read_BQD, token_BTD = self.state_norm(state_BQD), self.token_norm(token_BTD)
        at_BQE = torch.cat([read_BQD, token_BTD[:, :-1]], dim=-1)
        behind_BQE = torch.cat([read_BQD, token_BTD[:, 1:]], dim=-1)
        query_BAQS = rotate(self._to_heads(self.query(behind_BQE)), position_BQ)
        key_BAQS = rotate(self._to_heads(self.key(at_BQE)), position_BQ)
        text = Prefix(key_BAQS, self._to_heads(self.value(behind_BQE)), mask_BQ)
        if past is not None:
            text = _joined(past, text)
        found_BAQS = scaled_dot_product_attention(
            query_BAQS, text.key_BAMS, text.value_BAMS, attn_mask=_visible(text.mask_BM, mask_BQ.shape[1])[:, None]
        )
        return state_BQD + self.out(found_BAQS.transpose(1, 2).flatten(2)), text

    def _to_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)


def rotate(vector_BAQS: Tensor, position_BQ: Tensor) -> Tensor:
    """[B, A, Q, S] with number i and number i + S/2 turned together, by the position times base^(-2i/S) radians."""
    half = vector_BAQS.shape[-1] // 2
    speed = ROTARY_BASE ** (-torch.arange(half, device=vector_BAQS.device, dtype=torch.float32) / half)
    angle = position_BQ[:, None, :, None] * speed
    cos, sin = angle.cos(), angle.sin()
    first, second = vector_BAQS.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(vector_BAQS.dtype)


def _joined(past: Prefix, new: Prefix) -> Prefix:
    return Prefix(
        torch.cat([past.key_BAMS, new.key_BAMS], dim=2),
        torch.cat([past.value_BAMS, new.value_BAMS], dim=2),
        torch.cat([past.mask_BM, new.mask_BM], dim=1),
    )


def _visible(mask_BM: Tensor, num_new: int) -> Tensor:
    """[B, Q, M] what each of the last Q positions reads: the text up to itself, without padding.

    Itself it reads in any case, so that on padding too there is something to share the attention out to.
    """
    place_M = torch.arange(mask_BM.shape[1], device=mask_BM.device)
    own_Q1 = place_M[-num_new:, None]
    return (place_M <= own_Q1) & mask_BM[:, None, :] | (place_M == own_Q1)
