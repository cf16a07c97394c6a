"""What the heads say next, one after another.

Shape letters: B rows, K drafted tokens, D hidden size.
"""

import torch
from torch import Tensor

from moe_ext.multi_token.model import MultiTokenMoE


def draft(model: MultiTokenMoE, state_BD: Tensor, token_B: Tensor, num_drafts: int) -> Tensor:
    """[B, K] the most likely token of each head in turn, on the backbone's device.

    Args:
        model: heads and backbone.
        state_BD: what the lm_head read when `token_B` was chosen.
        token_B: the window's first token, the backbone's own.
        num_drafts: heads to ask; K is smaller where a head says OFF in any row.
    """
    first_BD = state_BD = state_BD.to(model.device, model.dtype)
    drafted = []
    for place in range(num_drafts):
        state_BD = model.heads.step(place, first_BD, state_BD, model.embed(token_B))
        token_B = model.heads.logits(place, state_BD, model.lm_head).argmax(dim=-1).to(model.backbone_device)
        if (token_B == model.off_id).any():
            break
        drafted.append(token_B)
    return torch.stack(drafted, dim=1) if drafted else token_B.new_empty(token_B.shape[0], 0)
