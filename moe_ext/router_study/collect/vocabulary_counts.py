"""How often each token id met each expert: as the input, as the true next token, as the predicted next token.

Shape letters: L gates, V vocabulary, E experts, B rows, S tokens of a row.
"""

import torch
from torch import Tensor

from moe_ext.router_study.collect.counts import of_tokens

KINDS = ("input", "next", "predicted")


class VocabularyCounts:
    """First choices by token id; a bounded table, whatever the length of the text.

    Args:
        table_3LVE: int32, for each of `KINDS`; the last token of a row has no true next one and is left out of that.
    """

    def __init__(self, table_3LVE: Tensor) -> None:
        self.table_3LVE = table_3LVE

    @classmethod
    def empty(cls, num_gates: int, num_ids: int, num_experts: int, *, device: str = "cpu") -> "VocabularyCounts":
        shape = (len(KINDS), num_gates, num_ids, num_experts)
        return cls(torch.zeros(shape, dtype=torch.int32, device=device))

    @staticmethod
    def num_bytes(num_gates: int, num_ids: int, num_experts: int) -> int:
        return 4 * len(KINDS) * num_gates * num_ids * num_experts

    def add(self, first_LT: Tensor, ids_BS: Tensor, predicted_BS: Tensor, mask_BS: Tensor) -> None:
        """Count a batch.

        Args:
            first_LT: first choices of its B * S tokens.
            ids_BS, predicted_BS: its tokens, and what the model predicts after each.
            mask_BS: true for tokens, false for padding.
        """
        first_LBS = first_LT.view(-1, *ids_BS.shape)
        next_BS = torch.roll(ids_BS, -1, dims=1)
        has_next_BS = mask_BS & torch.roll(mask_BS, -1, dims=1)
        has_next_BS[:, -1] = False
        for kind, (tokens_BS, counted_BS) in enumerate(
            ((ids_BS, mask_BS), (next_BS, has_next_BS), (predicted_BS, mask_BS))
        ):
            self._add(self.table_3LVE[kind], of_tokens(first_LBS, counted_BS), of_tokens(tokens_BS, counted_BS))

    @staticmethod
    def _add(table_LVE: Tensor, first_LN: Tensor, tokens_N: Tensor) -> None:
        L, V, E = table_LVE.shape
        starts_L = torch.arange(L, device=tokens_N.device)[:, None] * V
        cells = ((starts_L + tokens_N) * E + first_LN).flatten()
        table_LVE.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))


def predictions(logits_BSV: Tensor) -> Tensor:
    """The most likely token ids, [B, S]."""
    if logits_BSV.device.type == "cpu" and logits_BSV.dtype == torch.float32:
        return torch.from_numpy(logits_BSV.numpy().argmax(axis=-1))  # a fifth of the time of torch's kernel
    return logits_BSV.argmax(dim=-1)
