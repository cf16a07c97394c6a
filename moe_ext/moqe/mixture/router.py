"""The router: a small causal TransformerEncoder that scores the experts at every token.

It reads the frozen embedding of the text, cut down to a low rank. Its attention is causal and leaves padding out, so
that the scores at a token depend on that token and those before it alone: without the causal mask the scores would
know the tokens that the mixture is to predict, and a perplexity measured so would be no perplexity. Where a token
stands is told by a penalty on distance (ALiBi, Press et al. 2021, arXiv:2108.12409), which holds for any length and
does not change with padding on the left.

Shape letters: B rows, L tokens, H size of the embedding, R rank, A attention heads, E experts.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from moe_ext.moqe.mixture.encoder import Encoder

Mode = Literal["token", "sequence"]


@dataclass(kw_only=True)
class RouterConfig:
    mode: Mode = field(
        default="token",
        metadata={"help": "Mixing; token: the experts' logits at every token; sequence: one expert, by the prompt."},
    )
    top_k: int = field(default=0, metadata={"help": "Experts mixed at a token; 0 mixes all. Mode token."})
    prefix_length: int = field(default=32, metadata={"help": "Tokens that choose the expert. Mode sequence."})
    rank: int = field(default=16, metadata={"help": "Width of the router."})
    num_layers: int = field(default=1, metadata={"help": "Layers of the router."})
    num_heads: int = field(default=2, metadata={"help": "Attention heads of the router."})
    temperature_start: float = field(default=1.0, metadata={"help": "Temperature of the weights as training begins."})
    temperature: float = field(default=1.0, metadata={"help": "The same as training ends, and ever after."})
    noise: float = field(default=0.0, metadata={"help": "Deviation of normal noise on the scores in training."})
    balance: float = field(
        default=0.0, metadata={"help": "Weight of the loss that asks for equal use of the experts."}
    )

    def __post_init__(self):
        for name in ("prefix_length", "rank", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        for name in ("top_k", "noise", "balance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative.")
        for name in ("temperature_start", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0.")
        if self.rank % self.num_heads:
            raise ValueError(
                f"rank is {self.rank}, but must be a multiple of num_heads ({self.num_heads}). Change one of them."
            )

    def check_experts(self, num_experts: int) -> None:
        """Refuse a top_k that there are too few experts for."""
        if self.top_k > num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but there are {num_experts} experts. Lower top_k, or give 0 for all of them."
            )


class Router(nn.Module):
    """Scores of the experts at every token.

    Args:
        config: how large it is.
        input_size: H, of the embedding that it reads.
        num_experts: E.

    `current_temperature` is what training anneals; it is that of the config otherwise.
    """

    def __init__(self, config: RouterConfig, *, input_size: int, num_experts: int) -> None:
        super().__init__()
        config.check_experts(num_experts)
        self.config, self.input_size, self.num_experts = config, input_size, num_experts
        self.current_temperature = config.temperature
        self.gradient_checkpointing = False
        # The embedding's own scale is a matter of its training; it must not decide how fast the router learns.
        self.norm = nn.LayerNorm(input_size, elementwise_affine=False)
        self.down = nn.Linear(input_size, config.rank, bias=False)
        self.encoder = Encoder(config.rank, config.num_heads, config.num_layers)
        self.score = nn.Linear(config.rank, num_experts)
        nn.init.zeros_(self.score.weight)  # it begins with the uniform mixture
        nn.init.zeros_(self.score.bias)

    def forward(self, embedding_BLH: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Scores [B, L, E] in float32; in training with noise.

        Args:
            embedding_BLH: of the tokens.
            attention_mask_BL: 1 for tokens, 0 for padding, on either side.
        """
        hidden_BLR = self.down(self.norm(embedding_BLH.float()))
        bias_BALL = attention_bias(attention_mask_BL, self.config.num_heads)
        if self.gradient_checkpointing and self.training:
            hidden_BLR = checkpoint(self.encoder, hidden_BLR, bias_BALL, use_reentrant=False)
        else:
            hidden_BLR = self.encoder(hidden_BLR, bias_BALL)
        scores_BLE = self.score(hidden_BLR)
        if self.training and self.config.noise:
            scores_BLE = scores_BLE + self.config.noise * torch.randn_like(scores_BLE)
        return scores_BLE

    def weights(self, scores_BLE: Tensor) -> Tensor:
        """The weights of the experts [..., E], which sum to one; with top_k all but the k highest are zero."""
        weights_BLE = (scores_BLE / self.current_temperature).softmax(-1)
        if not 0 < self.config.top_k < self.num_experts:
            return weights_BLE
        kept_BLK = weights_BLE.topk(self.config.top_k, dim=-1).indices
        kept_BLE = one_hot(kept_BLK, self.num_experts).sum(-2)
        if self.config.top_k == 1:
            # Renormalised, a single weight is 1 whatever its score: in training the dense weights' gradient stands in
            # (straight-through, Bengio et al. 2013, arXiv:1308.3432).
            return kept_BLE + (weights_BLE - weights_BLE.detach() if self.training else 0.0)
        return weights_BLE * kept_BLE / (weights_BLE * kept_BLE).sum(-1, keepdim=True)

    def choice(self, scores_BLE: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """The expert of each row [B], by the last token of its prefix."""
        real_BL = attention_mask_BL.cumsum(-1)
        behind_BL = (attention_mask_BL == 1) & (real_BL <= self.config.prefix_length)
        last_B = (behind_BL * torch.arange(1, behind_BL.shape[1] + 1, device=behind_BL.device)).argmax(-1)
        return scores_BLE[torch.arange(len(last_B), device=last_B.device), last_B].argmax(-1)


def attention_bias(attention_mask_BL: Tensor, num_heads: int) -> Tensor:
    """What is added to the attention scores [B, A, L, L]: a penalty on distance, and -inf where nothing may be seen.

    A token sees itself and the tokens before it that are no padding. Padding sees itself, so that no row of the
    softmax is empty.
    """
    length = attention_mask_BL.shape[1]
    places_L = torch.arange(length, device=attention_mask_BL.device)
    distance_LL = places_L[:, None] - places_L[None, :]
    slopes_A = 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=places_L.device) / num_heads)
    penalty_ALL = -slopes_A[:, None, None] * distance_LL.clamp(min=0)
    seen_BLL = (distance_LL >= 0) & ((attention_mask_BL[:, None, :] == 1) | (distance_LL == 0))
    return torch.where(seen_BLL[:, None], penalty_ALL, -torch.inf)
