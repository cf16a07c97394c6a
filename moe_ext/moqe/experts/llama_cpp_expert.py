"""A GGUF expert that llama.cpp computes: its weights stay packed, tokens go in and logits come out.

Its keys and values are llama.cpp's own and hold one text at a time, so rows are computed one after another, and a text
that goes on is read again from its beginning.

Shape letters: B rows, L tokens, V vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moe_ext.moqe.experts.gguf_files import tokenizer_of_file
from moe_ext.moqe.experts.identity import ExpertIdentity


class LlamaCppExpert(nn.Module):
    """A GGUF file behind llama-cpp-python; used as `moe_ext.moqe.experts.expert.Expert` is.

    Args:
        path: the file.
        identity: of the file.
        context: most tokens of a text; 0 takes what the file says.

    Raises:
        ModuleNotFoundError: llama-cpp-python is not installed.
    """

    kind = "GGUF, llama.cpp"
    embedding = None
    head = None
    has_plain_head = False
    device = torch.device("cpu")

    def __init__(self, path: Path, identity: ExpertIdentity, *, context: int = 0) -> None:
        super().__init__()
        try:
            from llama_cpp import Llama
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(
                "The backend llama.cpp needs the package llama-cpp-python, which is not installed: "
                "pip install '.[llama-cpp]'"
            ) from missing
        self.llama = Llama(model_path=str(path), n_ctx=context, logits_all=True, verbose=False)
        self.tokenizer = tokenizer_of_file(path)
        self.identity, self.name = identity, identity.name
        self.vocab_size = self.state_size = self.llama.n_vocab()

    def new_cache(self) -> list[list[int]]:
        """The tokens of each row so far."""
        return []

    def states(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        cache: list[list[int]] | None = None,
        embedding_BLH: Tensor | None = None,
    ) -> Tensor:
        """The logits [B, L, V]; zeros on padding. `cache` holds the tokens of each row so far, and grows."""
        num_new = input_ids_BL.shape[1]
        logits_BLV = torch.zeros(*input_ids_BL.shape, self.vocab_size)
        new_mask_BL = attention_mask_BL[:, -num_new:].bool()
        for row, (tokens_L, real_L) in enumerate(zip(input_ids_BL, new_mask_BL, strict=True)):
            new = tokens_L[real_L.to(tokens_L.device)].tolist()
            if cache is not None and len(cache) <= row:
                cache.append([])
            before = cache[row] if cache is not None else []
            logits_BLV[row, real_L] = torch.from_numpy(self._logits([*before, *new])[len(before) :])
            if cache is not None:
                cache[row] = [*before, *new]
        return logits_BLV

    def logits_of(self, states: Tensor) -> Tensor:
        return states

    def memory_bytes(self) -> int:
        """Bytes of the file, which llama.cpp maps as it is."""
        return self.identity.num_bytes

    def _logits(self, tokens: list[int]) -> np.ndarray:
        self.llama.reset()
        self.llama.eval(tokens)
        return np.array(self.llama.scores[: len(tokens)], dtype=np.float32)
