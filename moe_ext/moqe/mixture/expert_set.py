"""The frozen experts of a mixture together: one tokenizer, and one embedding and one head where theirs are equal.

Shape letters: B rows, L tokens, H size of the embedding, D size of a state, E experts, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ext.moqe.experts.expert import Dtype, Expert, GgufBackend, load_expert
from moe_ext.moqe.experts.tokenizer_contract import check_tokenizers
from moe_ext.moqe.mixture.placement import place_experts


class ExpertSet:
    """The frozen experts of a mixture, and what they share.

    Args:
        experts: at least two, with the same tokenizer.

    Raises:
        ValueError: fewer than two; tokenizers that differ; no expert whose embedding the router could read.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        if len(experts) < 2:
            raise ValueError(f"A mixture needs at least two experts, but {len(experts)} was given.")
        for other in experts[1:]:
            check_tokenizers((experts[0].name, experts[0].tokenizer), (other.name, other.tokenizer))
        self.experts = list(experts)
        self.names = _told_apart([expert.name for expert in experts])
        self.tokenizer = experts[0].tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Rows that pad the vocabulary to a round number have no token; sizes may differ in them alone.
        self.vocab_size = min(len(self.tokenizer), *(expert.vocab_size for expert in experts))
        read = next((expert for expert in experts if expert.embedding is not None), None)
        if read is None:
            raise ValueError(
                "The router reads the embedding of an expert, but llama.cpp shows none. Give at least one expert that "
                "transformers loads."
            )
        self.embedding = read.embedding
        self.shares_embedding = self._share("embedding")
        self.shares_head = self._share("head")

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def input_size(self) -> int:
        """H, of the embedding that the router reads."""
        return self.embedding.weight.shape[1]

    @torch.no_grad()
    def embed(self, input_ids_BL: Tensor) -> Tensor:
        """What the router reads [B, L, H]."""
        return self.embedding(input_ids_BL.to(self.embedding.weight.device))

    def states(
        self, input_ids_BL: Tensor, attention_mask_BL: Tensor, caches: Sequence[Any] | None = None
    ) -> list[Tensor]:
        """The states of every expert, each [B, L, D]; the shared embedding is looked up once."""
        embedding_BLH = self.embed(input_ids_BL) if self.shares_embedding else None
        caches = caches if caches is not None else [None] * len(self)
        return [
            expert.states(input_ids_BL, attention_mask_BL, cache, embedding_BLH)
            for expert, cache in zip(self.experts, caches, strict=True)
        ]

    def logits_of(self, expert: int, states: Tensor) -> Tensor:
        """Logits [..., V] of one expert."""
        return self.experts[expert].logits_of(states)[..., : self.vocab_size]

    def mix(self, states: Sequence[Tensor], weights: Tensor) -> Tensor:
        """The mixed logits [..., V], differentiable in the weights.

        Args:
            states: of every expert, [..., D].
            weights: [..., E].
        """
        place = states[0].device
        parts = [weights[..., [number]].to(state) for number, state in enumerate(states)]
        if self.shares_head:
            return self.logits_of(0, sum(part * state for part, state in zip(parts, states, strict=True)))
        return sum(
            (part * self.logits_of(number, state)).to(place)
            for number, (part, state) in enumerate(zip(parts, states, strict=True))
        )

    def memory_bytes(self) -> int:
        """Bytes of all weights as they lie in memory, what is shared counted once."""
        kept: dict[int, int] = {}
        for expert in self.experts:
            tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*expert.parameters(), *expert.buffers())}
            kept |= tensors or {id(expert): expert.memory_bytes()}
        return sum(kept.values())

    def _share(self, part: str) -> bool:
        """Let all experts have one embedding, or one head, where theirs are equal and lie on one device."""
        modules = [getattr(expert, part) for expert in self.experts]
        if any(module is None or getattr(module, "bias", None) is not None for module in modules):
            return False
        first = modules[0].weight
        if any(other.weight.shape != first.shape or other.weight.device != first.device for other in modules[1:]):
            return False
        if any(not torch.equal(other.weight, first) for other in modules[1:]):
            return False
        setter = "set_input_embeddings" if part == "embedding" else "set_output_embeddings"
        for expert in self.experts[1:]:
            getattr(expert.model, setter)(modules[0])
        return True


def load_experts(
    paths: Sequence[str | Path], *, dtype: Dtype = "auto", gguf_backend: GgufBackend = "transformers"
) -> ExpertSet:
    """Load, compare and place experts.

    Raises:
        ValueError, FileNotFoundError: as `load_expert` and `ExpertSet`.
    """
    if len(paths) < 2:
        raise ValueError(f"A mixture needs at least two experts, but {len(paths)} was given. Name more of them.")
    experts = [load_expert(path, dtype=dtype, gguf_backend=gguf_backend) for path in paths]
    place_experts([expert.model for expert in experts if isinstance(expert, Expert)])
    return ExpertSet(experts)


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names, a number behind each that stands there before."""
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]
