"""The rows of a batch while they grow, and which of them have ended: as `generate` of transformers keeps them.

Shape letters: B rows, L tokens so far, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from moe_ext.multi_token.decoding.verification import choose


class GrowingRows:
    """Tokens so far.

    Args:
        ids_BL: the prompts.
        processors: change the backbone's scores before a token is chosen.
        criteria: say which rows have ended.
        settings: whether to sample; the padding behind a row that has ended; the longest row.
    """

    def __init__(
        self,
        ids_BL: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        settings: GenerationConfig,
    ) -> None:
        self.ids_BL = ids_BL
        self.processors = processors
        self.criteria = criteria
        self.sampled = settings.do_sample
        self.max_length = settings.max_length
        # As in `generate`: without an end token, rows that a stop string has ended go on until all have.
        ends = [criterion.eos_token_id for criterion in criteria if hasattr(criterion, "eos_token_id")]
        pad = settings.pad_token_id
        self.padding = (int(ends[0].flatten()[0]) if pad is None else pad) if ends else None
        self.unfinished_B = torch.ones(ids_BL.shape[0], dtype=torch.bool, device=ids_BL.device)
        self.num_new_tokens = 0

    @property
    def last_B(self) -> Tensor:
        return self.ids_BL[:, -1]

    @property
    def room(self) -> int:
        """Tokens that each row may still get."""
        return self.max_length - self.ids_BL.shape[1]

    @property
    def live_B(self) -> Tensor:
        """Rows whose tokens matter: all, or all that have not ended where those that have are padded."""
        return self.unfinished_B if self.padding is not None else torch.ones_like(self.unfinished_B)

    def choose(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's next token of each row, [B], and the scores it was chosen by, [B, V]."""
        scores_BV = self.processors(self.ids_BL, logits_BV.to(torch.float32, copy=len(self.processors) > 0))
        return self.pad_finished(choose(scores_BV, sampled=self.sampled)), scores_BV

    def pad_finished(self, token_B: Tensor) -> Tensor:
        """The tokens, with padding for rows that have ended."""
        return token_B if self.padding is None else torch.where(self.unfinished_B, token_B, self.padding)

    def agree(self, first_B: Tensor, second_B: Tensor) -> bool:
        """Whether two tokens are the same in all rows that matter."""
        return bool(((first_B == second_B) | ~self.live_B).all())

    def add(self, token_B: Tensor, scores_BV: Tensor) -> bool:
        """Append a token to each row; returns whether any row goes on.

        Args:
            token_B: as `choose` gives it.
            scores_BV: the backbone's, for criteria that look at them.
        """
        self.num_new_tokens += int(self.unfinished_B.sum())
        self.ids_BL = torch.cat([self.ids_BL, token_B[:, None]], dim=1)
        self.unfinished_B = self.unfinished_B & ~self.criteria(self.ids_BL, scores_BV)
        return bool(self.unfinished_B.any())
