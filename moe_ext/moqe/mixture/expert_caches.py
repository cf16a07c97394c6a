"""What a mixture remembers of a text it is continuing: the keys and values of each expert, and the tokens so far.

In sequence mode each row has one expert, and that expert's cache holds its rows alone.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class ExpertCaches(Cache):
    """One cache for each expert; handed to `generate` in place of a single one.

    Args:
        caches: of the experts, as `Expert.new_cache` makes them.
    """

    def __init__(self, caches: list[Any]) -> None:
        super().__init__(layers=[])
        self.caches = caches
        self.input_ids_BL: Tensor | None = None
        self.rows_of_expert: list[Tensor] | None = None

    def read(self, input_ids_BL: Tensor) -> Tensor:
        """Take in new tokens; returns all so far, which the router reads anew: it is small and has no cache."""
        known = self.input_ids_BL
        self.input_ids_BL = input_ids_BL if known is None else torch.cat([known, input_ids_BL], dim=1)
        return self.input_ids_BL

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.input_ids_BL is None else self.input_ids_BL.shape[1]

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search.

        Raises:
            ValueError: rows have experts of their own.
        """
        if self.rows_of_expert is not None:
            raise ValueError("Beams cannot be followed in sequence mode: rows differ in expert. Use num_beams=1.")
        for cache in self.caches:
            cache.reorder_cache(beam_idx)
        self.input_ids_BL = self.input_ids_BL[beam_idx]
