"""What heads and router are trained on.

The heads: mean negative log-likelihood of the targets of those that are on. The routers: five terms on their logits r
and gates g (see router.py), each a mean over positions.

- bce: sigmoid(r_j) against whether head j was right, where all it read was the text.
- copy_bce: the same for the copy router and copied tokens.
- balance: H sum_j f_j P_j with f_j the share of head j in what is on and P_j its share of the gates' sum; 1 when all
  heads are used alike (Fedus et al. 2021, arXiv:2101.03961, equation 4).
- entropy: of the gates as yes-or-no choices, in nats; less of it makes them decide.
- budget: the square of what the gates of a position add up to beyond the heads that may be on.

Shape letters: N positions, H heads, K copied tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from moe_ext.multi_token.model.router import gates_of


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each of the routers' losses counts beside that of the heads."""

    bce: float
    balance: float
    entropy: float
    budget: float

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what `router_losses` gives, and of `copy_bce`."""
        return (
            self.bce * (losses["bce"] + losses["copy_bce"])
            + self.balance * losses["balance"]
            + self.entropy * losses["entropy"]
            + self.budget * losses["budget"]
        )


def head_loss(nll_NH: Tensor, on_NH: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of the targets of heads that are on; 0 where none is."""
    return torch.where(on_NH, nll_NH, 0.0).sum() / on_NH.sum().clamp(min=1)


def router_losses(
    logits_NH: Tensor, *, right_NH: Tensor, judged_NH: Tensor, on_NH: Tensor, budget: float
) -> dict[str, Tensor]:
    """The router's losses by name; see the top of this file.

    Args:
        logits_NH: the router's.
        right_NH: whether the head drafted its target.
        judged_NH: where that can be said: the target is known and all the head read was the text.
        on_NH: heads that are on.
        budget: how many may be on at a position.
    """
    gates_NH = gates_of(logits_NH)
    bce_NH = binary_cross_entropy_with_logits(logits_NH, right_NH.float(), reduction="none")
    share_on_H = on_NH.float().sum(dim=0) / on_NH.sum().clamp(min=1)
    share_gate_H = gates_NH.sum(dim=0) / gates_NH.sum().clamp(min=1e-9)
    certain = torch.finfo(gates_NH.dtype).eps
    open_NH = gates_NH.clamp(certain, 1 - certain)
    entropy_NH = -open_NH * open_NH.log() - (1 - open_NH) * (1 - open_NH).log()
    return {
        "bce": torch.where(judged_NH, bce_NH, 0.0).sum() / judged_NH.sum().clamp(min=1),
        "balance": gates_NH.shape[1] * (share_on_H * share_gate_H).sum(),
        "entropy": entropy_NH.mean(),
        "budget": (gates_NH.sum(dim=1) - budget).clamp(min=0).square().mean(),
    }


def copy_loss(logits_NK: Tensor, right_NK: Tensor, judged_NK: Tensor) -> Tensor:
    """The copy router's binary cross-entropy.

    Args:
        logits_NK: its own.
        right_NK: whether the copied token was right.
        judged_NK: where that can be said, and all before it were.
    """
    bce_NK = binary_cross_entropy_with_logits(logits_NK, right_NK.float(), reduction="none")
    return torch.where(judged_NK, bce_NK, 0.0).sum() / judged_NK.sum().clamp(min=1)
