"""What is kept of a text's routing: counts, by part of each domain, so that memory does not grow with the text.

Each domain's rows are dealt out to G groups in turn, and all is counted by domain and group. The groups are what a
bootstrap draws from (`measure.py`).

Shape letters: U = D * G parts (D domains, G groups), L gates, E experts, M = L * E, B rows, S tokens of a row,
T = B * S, K choices.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe_ext.router_study.gates.base import Routing

SMALLEST = 1e-38  # a normal float32 number; its logarithm is finite
CONFIDENCES = ("entropy", "top1", "mass", "margin")


@dataclass
class Counts:
    """Sums over the tokens of each part; padding is never among them.

    Args:
        tokens_U: tokens.
        chosen_ULE: tokens that chose the expert.
        first_ULE: tokens whose first choice it was.
        probability_ULE: sum of its probability.
        together_UMM: tokens that chose both (gate, expert) and (gate', expert').
        confidence_UL4: sums of `confidences`: entropy (nats), largest probability, probability of all that is
            chosen, and margin.
        neighbours_U: pairs of tokens that follow each other in a row.
        repeats_UL2: pairs with the same first choice, and pairs that share any choice.
        next_in_rank_ULEE: tokens that chose e and e' one rank after the other, in either order; empty unless asked
            for. This is what the OLMoE authors' script counts as co-activation.
    """

    tokens_U: Tensor
    chosen_ULE: Tensor
    first_ULE: Tensor
    probability_ULE: Tensor
    together_UMM: Tensor
    confidence_UL4: Tensor
    neighbours_U: Tensor
    repeats_UL2: Tensor
    next_in_rank_ULEE: Tensor

    @classmethod
    def empty(
        cls, num_parts: int, num_gates: int, num_experts: int, *, in_rank: bool = False, device: str = "cpu"
    ) -> "Counts":
        U, L, E = num_parts, num_gates, num_experts

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens_U=zeros(U),
            chosen_ULE=zeros(U, L, E),
            first_ULE=zeros(U, L, E),
            probability_ULE=zeros(U, L, E, dtype=torch.float64),
            together_UMM=zeros(U, L * E, L * E, dtype=torch.int32),
            confidence_UL4=zeros(U, L, len(CONFIDENCES), dtype=torch.float64),
            neighbours_U=zeros(U),
            repeats_UL2=zeros(U, L, 2),
            next_in_rank_ULEE=zeros(U, L, E, E) if in_rank else zeros(0, L, E, E),
        )

    @staticmethod
    def num_bytes(num_parts: int, num_gates: int, num_experts: int) -> int:
        """What the largest table, `together_UMM`, takes."""
        return 4 * num_parts * (num_gates * num_experts) ** 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """U, L, E."""
        return tuple(self.chosen_ULE.shape)

    def add(self, routing: Routing, mask_BS: Tensor, part_B: Tensor) -> None:
        """Count a batch.

        Args:
            routing: of its B * S tokens.
            mask_BS: true for tokens, false for padding.
            part_B: the part that each row belongs to, from 0.
        """
        (B, S), (_, L, E) = mask_BS.shape, self.shape
        real_BS = mask_BS.to(routing.logits_LTE.dtype)
        # Row first, so that what follows is one product for all gates of a row.
        chosen_BSLE = routing.mask_LTE().view(L, B, S, E).permute(1, 2, 0, 3) * real_BS[..., None, None]
        chosen_BSM = chosen_BSLE.reshape(B, S, L * E)
        self.tokens_U.index_add_(0, part_B, mask_BS.sum(dim=1))
        self.chosen_ULE.index_add_(0, part_B, chosen_BSM.sum(dim=1).view(B, L, E).long())
        together_BMM = torch.bmm(chosen_BSM.transpose(1, 2), chosen_BSM)
        self.together_UMM.index_add_(0, part_B, together_BMM.to(torch.int32))

        first_LBS = routing.first_LT.view(L, B, S)
        places_LBS = (part_B[None, :, None] * L + torch.arange(L, device=part_B.device)[:, None, None]) * E + first_LBS
        self.first_ULE += torch.bincount(
            of_tokens(places_LBS, mask_BS).flatten(), minlength=self.first_ULE.numel()
        ).view_as(self.first_ULE)

        probability_LBSE = routing.probabilities_LTE.view(L, B, S, E)
        self.probability_ULE.index_add_(0, part_B, torch.einsum("lbse,bs->ble", probability_LBSE, real_BS).double())
        confidence_LBS4 = confidences(routing).view(L, B, S, -1)
        self.confidence_UL4.index_add_(0, part_B, torch.einsum("lbsc,bs->blc", confidence_LBS4, real_BS).double())

        follows_BS = mask_BS[:, 1:] & mask_BS[:, :-1]
        same_LBS = (first_LBS[..., 1:] == first_LBS[..., :-1]) & follows_BS
        shared_BSL = (chosen_BSLE[:, 1:] * chosen_BSLE[:, :-1]).amax(dim=-1)  # padding is 0 in both
        self.neighbours_U.index_add_(0, part_B, follows_BS.sum(dim=1))
        repeats_BL2 = torch.stack([same_LBS.sum(dim=-1).t(), shared_BSL.sum(dim=1).long()], dim=-1)
        self.repeats_UL2.index_add_(0, part_B, repeats_BL2)
        if len(self.next_in_rank_ULEE):
            self._add_next_in_rank(routing.chosen_LTK.view(L, B, S, -1), mask_BS, part_B)

    def _add_next_in_rank(self, chosen_LBSK: Tensor, mask_BS: Tensor, part_B: Tensor) -> None:
        (L, B, S, K), E = chosen_LBSK.shape, self.shape[2]
        start_LBS = ((part_B[None, :, None] * L + torch.arange(L, device=part_B.device)[:, None, None]) * E).expand(
            L, B, S
        )
        for rank in range(K - 1):
            one, two = chosen_LBSK[..., rank], chosen_LBSK[..., rank + 1]
            there = mask_BS & (one < E) & (two < E)
            for e, other in ((one, two), (two, one)):
                cells = (start_LBS[there] + e[there]) * E + other[there]
                self.next_in_rank_ULEE += torch.bincount(cells, minlength=self.next_in_rank_ULEE.numel()).view_as(
                    self.next_in_rank_ULEE
                )

    def tensors(self) -> dict[str, Tensor]:
        """All tables by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: str) -> "Counts":
        return Counts(**{name: table.to(device) for name, table in self.tensors().items()})


def confidences(routing: Routing) -> Tensor:
    """Entropy, top-1 probability, mass of the chosen and margin of each token, [L, T, 4]; see `CONFIDENCES`.

    The margin is the probability of the last expert chosen less that of the best one not chosen: the step from rank K
    to K + 1 where the choice is by probability; 0 where all experts are chosen.
    """
    p_LTE, chosen_LTK = routing.probabilities_LTE, routing.chosen_LTK
    num_experts, num_chosen = p_LTE.shape[-1], chosen_LTK.shape[-1]
    # One entry more, of probability 0, for places that hold no expert.
    padded_LTE = torch.nn.functional.pad(p_LTE, (0, 1))
    taken_LTK = padded_LTE.gather(-1, chosen_LTK)
    last_LT = taken_LTK.masked_fill(chosen_LTK == num_experts, float("inf")).amin(dim=-1)
    margin_LT = last_LT - padded_LTE.scatter(-1, chosen_LTK, 0.0)[..., :num_experts].amax(dim=-1)
    if num_chosen == num_experts:
        margin_LT = margin_LT.masked_fill((chosen_LTK < num_experts).all(dim=-1), 0.0)
    # Not torch.special.entr: its kernel takes several times as long.
    entropy_LT = -(p_LTE * p_LTE.clamp_min(SMALLEST).log()).sum(dim=-1)
    return torch.stack([entropy_LT, p_LTE.amax(dim=-1), taken_LTK.sum(dim=-1), margin_LT], dim=-1)


def of_tokens(values_xBS: Tensor, mask_BS: Tensor) -> Tensor:
    """The entries of tokens, [..., N], padding left out."""
    if bool(mask_BS.all()):
        return values_xBS.flatten(-2)  # a look-up by mask would copy number by number
    return values_xBS[..., mask_BS]
