"""What drafts that nobody checked cost: the backbone's negative log-likelihood of them.

Shape letters: B rows, L tokens, V vocabulary.
"""

import torch
from torch import Tensor

from moe_common.models.perplexity import token_losses
from moe_ext.multi_token.model.mixture import MultiTokenMoE


@torch.inference_mode()
def negative_log_likelihood(model: MultiTokenMoE, sequence_1L: Tensor, prompt_length: int) -> float:
    """Nats a new token, of one sequence whose first `prompt_length` tokens were given."""
    tokens_1L = sequence_1L.to(model.backbone_device)
    logits_1LV = model.backbone(input_ids=tokens_1L, use_cache=False).logits
    return token_losses(logits_1LV[0, prompt_length - 1 : -1], tokens_1L[0, prompt_length:]).mean().item()
