"""Backbones that decide clearly, heads beside them, and drafts whose quality is known."""

import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.multi_token.decoding.generation import DecodingLoop
from moe_ext.multi_token.decoding.planning import FixedPlan
from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE

VOCABULARY = 40
END = 1
SPECIAL = {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": 2}
FAMILIES = ("gpt2", "llama", "qwen2", "gemma", "mistral, window of 8")


def make_backbone(family: str = "llama", *, seed: int = 0, end: int | None = END) -> PreTrainedModel:
    """A random backbone whose greedy text does not repeat one token; float64 where rounding must not matter."""
    backbone = tiny_model(family, seed=seed, vocab_size=VOCABULARY, **SPECIAL)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(4.0)  # decided scores: no near ties
    backbone.generation_config.eos_token_id = end
    backbone.generation_config.pad_token_id = 2
    return backbone


def make_model(family: str = "llama", *, num_heads: int = 3, seed: int = 0, **settings) -> MultiTokenMoE:
    """Heads beside a random backbone, themselves random too, so that they say something else than the backbone."""
    backbone = make_backbone(family, seed=seed)
    model = MultiTokenMoE(backbone, MultiTokenConfig(num_heads=num_heads, **{"k_max": 1, **settings}))
    with torch.no_grad():
        for block in model.heads.blocks:
            torch.nn.init.normal_(block.down.weight, std=0.1)
        if model.heads.prefix is not None:
            torch.nn.init.normal_(model.heads.prefix.out.weight, std=0.3)
    return model.eval()


class OracleSource:
    """Drafts what is known to come, each token wrong with some probability.

    Args:
        future_BL: sequences the backbone is known to write.
        wrong: probability that a drafted token is another one.
        longest: tokens of a draft.
    """

    name = "heads"

    def __init__(self, future_BL: Tensor, *, wrong: float, longest: int) -> None:
        self.future_BL = future_BL
        self.wrong = wrong
        self.longest = longest
        self.generator = torch.Generator().manual_seed(0)

    def start(self, ids_BL, mask_BL):
        self.place = ids_BL.shape[1]

    def gates(self, state_BQD, ids_BL):
        self.place = ids_BL.shape[1]
        return torch.ones(len(ids_BL), self.longest)

    def write(self, token_B, num_drafts):
        draft_BK = self.future_BL[:, self.place : self.place + num_drafts]
        draft_BK = torch.nn.functional.pad(draft_BK, (0, num_drafts - draft_BK.shape[1]), value=5)
        other_BK = torch.rand(draft_BK.shape, generator=self.generator) < self.wrong
        return torch.where(other_BK, (draft_BK + 1) % VOCABULARY, draft_BK)


def oracle_loop(future_BL: Tensor, *, wrong: float, drafted: int = 3, **settings) -> DecodingLoop:
    """A loop that drafts what is known to come; see `OracleSource`."""
    return DecodingLoop([OracleSource(future_BL, wrong=wrong, longest=drafted)], FixedPlan(drafted), **settings)
