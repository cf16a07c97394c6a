"""A bounded part of the text whose scores are kept, for what counts cannot tell: shuffled controls, paths, pictures.

Shape letters: R rows kept, S tokens of a row, L gates, E experts, K choices, T = R * S.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from moe_ext.router_study.collect.counts import Counts
from moe_ext.router_study.collect.vocabulary_counts import VocabularyCounts
from moe_ext.router_study.gates.base import Gates, Routing

Shuffle = Literal["tokens", "columns", "labels"]


@dataclass
class Sample:
    """Whole rows.

    Args:
        ids_RS, predicted_RS: the tokens, and what the model predicts after each.
        mask_RS: true for tokens, false for padding.
        part_R: the part of `Counts` that each row belongs to.
        logits_RLSE: the scores, float32.
        chosen_RLSK: what was chosen of them.
    """

    ids_RS: Tensor
    predicted_RS: Tensor
    mask_RS: Tensor
    part_R: Tensor
    logits_RLSE: Tensor
    chosen_RLSK: Tensor

    @staticmethod
    def num_bytes(num_tokens: int, num_gates: int, num_experts: int, num_chosen: int) -> int:
        return num_tokens * num_gates * (4 * num_experts + 2 * num_chosen)

    @property
    def num_tokens(self) -> int:
        return int(self.mask_RS.sum())

    def routing(self, gates: Gates) -> Routing:
        """What was decided of these tokens."""
        logits_LTE = self.logits_RLSE.transpose(0, 1).flatten(1, 2)
        chosen_LTK = self.chosen_RLSK.transpose(0, 1).flatten(1, 2).long()
        return Routing(logits_LTE, gates.decide(logits_LTE).probabilities_LTE, chosen_LTK)

    def shuffled(self, gates: Gates, shuffle: Shuffle, *, seed: int) -> Routing:
        """The same text with a routing that is left to chance in one respect.

        Args:
            gates: whose scores these are.
            shuffle: "tokens" deals out what a gate decided to other tokens, for each gate anew: who chose what no
                longer depends on the token, but every gate's loads and pairs stay. "columns" deals out the scores of
                each expert by themselves, and chooses again: loads stay nearly, pairs are chance. "labels" renames
                the experts for every token anew: loads are even but for chance.
            seed: of the shuffle.
        """
        generator = torch.Generator().manual_seed(seed)
        routing, real_T = self.routing(gates), self.mask_RS.flatten()
        places_N = real_T.nonzero()[:, 0]
        (L, _, E), N = routing.logits_LTE.shape, len(places_N)
        logits_LTE, chosen_LTK = routing.logits_LTE.clone(), routing.chosen_LTK.clone()
        if shuffle == "tokens":
            probabilities_LTE = routing.probabilities_LTE.clone()
            for gate in range(L):
                from_N = places_N[torch.randperm(N, generator=generator)]
                logits_LTE[gate, places_N] = routing.logits_LTE[gate, from_N]
                probabilities_LTE[gate, places_N] = routing.probabilities_LTE[gate, from_N]
                chosen_LTK[gate, places_N] = routing.chosen_LTK[gate, from_N]
            return Routing(logits_LTE, probabilities_LTE, chosen_LTK)
        for gate in range(L):
            order_NE = torch.rand(N, E, generator=generator).argsort(dim=0 if shuffle == "columns" else 1)
            held_NE = routing.logits_LTE[gate, places_N]
            logits_LTE[gate, places_N] = held_NE.gather(0 if shuffle == "columns" else 1, order_NE)
        return gates.decide(logits_LTE)

    def counts(self, routing: Routing, num_parts: int, *, in_rank: bool = False) -> Counts:
        """Counts of these rows under that routing."""
        L, _, E = routing.logits_LTE.shape
        counts = Counts.empty(num_parts, L, E, in_rank=in_rank)
        counts.add(routing, self.mask_RS, self.part_R)
        return counts

    def vocabulary(self, routing: Routing, num_ids: int) -> VocabularyCounts:
        """Counts by token id of these rows under that routing."""
        L, _, E = routing.logits_LTE.shape
        counts = VocabularyCounts.empty(L, num_ids, E)
        counts.add(routing.first_LT, self.ids_RS, self.predicted_RS, self.mask_RS)
        return counts

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def joined(cls, pieces: "list[Sample]") -> "Sample":
        """The rows of all pieces, in order."""
        return cls(*(torch.cat([getattr(piece, field.name) for piece in pieces]) for field in fields(cls)))
