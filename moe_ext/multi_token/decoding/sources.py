"""Where drafts come from: token heads, and copies of the text so far. Each is an expert of the mixture that drafts.

A source first says what it promises, the router's gates: the probability that its tokens 1..k all stand. A plan
compares the sources (planning.py), and the one it takes writes.

Shape letters: B rows, P tokens of the prompt, L tokens so far, Q of them new to the source, K drafted tokens,
D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_ext.multi_token.model.copying import Copy, CopyIndex
from moe_ext.multi_token.model.mixture import MultiTokenMoE
from moe_ext.multi_token.model.prefix_attention import Prefix
from moe_ext.multi_token.model.router import gates_of

SourceName = Literal["heads", "copies"]


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow, [B, K], and which source wrote them; None where K is 0."""

    source: SourceName | None
    tokens_BK: Tensor

    @property
    def num_tokens(self) -> int:
        return self.tokens_BK.shape[1]


class DraftSource(Protocol):
    """What drafts."""

    name: SourceName
    longest: int  # tokens it can draft

    def start(self, ids_BP: Tensor, mask_BP: Tensor) -> None:
        """New texts begin with these tokens; 0 in the mask is padding."""

    def gates(self, state_BQD: Tensor, ids_BL: Tensor) -> Tensor:
        """[B, K] the probability that drafts 1..k all stand; K is 0 where there is nothing to draft.

        Called behind a pass, with what came since the last call, so that a source sees every state of the text once.

        Args:
            state_BQD: the backbone's states that the last Q tokens were chosen by; at first those of the prompt too.
            ids_BL: the texts, those tokens included.
        """

    def write(self, token_B: Tensor, num_drafts: int) -> Tensor:
        """[B, K] the draft, on the backbone's device; called after `gates`, with the texts' last token."""


class HeadSource:
    """The token heads, one after another.

    Args:
        model: heads, their router and backbone.
    """

    name: SourceName = "heads"

    def __init__(self, model: MultiTokenMoE) -> None:
        self.model = model
        self.longest = model.config.num_heads
        self.vocabulary = model.vocabulary()
        self.past: Prefix | None = None

    def start(self, ids_BP: Tensor, mask_BP: Tensor) -> None:
        self.mask_BP, self.past = mask_BP, None

    def gates(self, state_BQD: Tensor, ids_BL: Tensor) -> Tensor:
        num_new = state_BQD.shape[1]
        mask_BL = pad(self.mask_BP, (0, ids_BL.shape[1] - self.mask_BP.shape[1]), value=1)
        first_BQD, self.past = self.model.first_states(
            state_BQD, ids_BL[:, -num_new - 1 :], mask_BL[:, -num_new - 1 : -1], self.past
        )
        self.first_BD = first_BQD[:, -1]
        return gates_of(self.model.router(self.first_BD))

    def write(self, token_B: Tensor, num_drafts: int) -> Tensor:
        """Shorter where a head says OFF in any row."""
        model = self.model
        first_BD = state_BD = self.first_BD
        drafted = []
        for place in range(num_drafts):
            state_BD = model.heads.step(place, first_BD, state_BD, model.embed(token_B))
            class_B = model.heads.logits(place, state_BD, self.vocabulary.score).argmax(dim=-1)
            token_B = self.vocabulary.token_C[class_B].to(model.backbone_device)
            if (token_B == model.off_id).any():
                break
            drafted.append(token_B)
        return torch.stack(drafted, dim=1) if drafted else token_B.new_empty(token_B.shape[0], 0)


class CopySource:
    """Copies of each row's own text.

    Args:
        model: its copy router says how far a copy is likely to stand.
    """

    name: SourceName = "copies"

    def __init__(self, model: MultiTokenMoE) -> None:
        self.model = model
        self.longest = model.config.max_copy
        self.indices: list[CopyIndex] = []
        self.copies: list[Copy] = []

    def start(self, ids_BP: Tensor, mask_BP: Tensor) -> None:
        self.indices = [CopyIndex(tokens) for tokens in ids_BP.tolist()]

    def gates(self, state_BQD: Tensor, ids_BL: Tensor) -> Tensor:
        known = len(self.indices[0].tokens)
        for index, new in zip(self.indices, ids_BL[:, known:].tolist(), strict=True):
            index.extend(new)
        self.copies = [index.copy(self.longest) for index in self.indices]
        matched_B = torch.tensor([copy.matched for copy in self.copies], device=self.model.device)
        if not matched_B.any():
            return state_BQD.new_zeros(len(self.copies), 0)
        logits_BK = self.model.copy_router(state_BQD[:, -1].to(self.model.device, self.model.dtype), matched_B)
        return gates_of(logits_BK) * (matched_B > 0)[:, None]

    def write(self, token_B: Tensor, num_drafts: int) -> Tensor:
        """In a row with nothing to copy the last token stands in for a draft."""
        tokens = [
            copy.tokens[:num_drafts] or [token] * num_drafts
            for copy, token in zip(self.copies, token_B.tolist(), strict=True)
        ]
        return torch.tensor(tokens, device=token_B.device).view(len(tokens), -1)


def sources_of(model: MultiTokenMoE, names: Sequence[SourceName]) -> list[DraftSource]:
    """The named sources of a model.

    Raises:
        ValueError: a name that is none.
    """
    known: dict[str, type] = {"heads": HeadSource, "copies": CopySource}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"sources is {', '.join(names) or 'empty'}, but must name heads, copies, or both.")
    return [known[name](model) for name in names]
