"""A TransformerEncoder whose attention takes a bias: pre-norm layers of self-attention and a feed-forward net.

Written out because torch's own is not the same function with and without gradients: in eval mode and without them
`nn.TransformerEncoder` (2.13) takes a fused path that reads a mask of numbers as one of yes and no, so that a penalty
on distance becomes "may not be seen".

Shape letters: B rows, L tokens, R width, A attention heads.
"""

from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)) (Vaswani et al. 2017, arXiv:1706.03762; the norms before
    them as in Xiong et al. 2020, arXiv:2002.04745).

    Args:
        width: R; a multiple of num_heads.
        num_heads: A.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_BLR: Tensor, bias_BALL: Tensor) -> Tensor:
        """The next hidden states [B, L, R].

        Args:
            bias_BALL: added to the attention scores; -inf where nothing may be seen.
        """
        joined_BLR3 = self.query_key_value(self.attention_norm(hidden_BLR))
        query, key, value = (
            part_BLR.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part_BLR in joined_BLR3.chunk(3, dim=-1)
        )
        seen_BALR = scaled_dot_product_attention(query, key, value, attn_mask=bias_BALL)
        hidden_BLR = hidden_BLR + self.output(seen_BALR.transpose(1, 2).flatten(-2))
        return hidden_BLR + self.down(gelu(self.up(self.forward_norm(hidden_BLR))))


class Encoder(nn.Module):
    """Layers one after another, and a norm behind the last.

    Args:
        width, num_heads: see `EncoderLayer`.
        num_layers: how many.
    """

    def __init__(self, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden_BLR: Tensor, bias_BALL: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_BLR = layer(hidden_BLR, bias_BALL)
        return self.norm(hidden_BLR)
