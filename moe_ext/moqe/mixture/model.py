"""A mixture of quantised experts (after MoQE, arXiv:2508.09204): frozen versions of one model and a small router.

Token mode mixes *logits*: log p(v) = sum_e w_e z_e(v) - log Z, a weighted geometric mean of the experts' predictions.
Since the weights sum to one, mixing log-probabilities would be the same function. What rounding does to the logits of
a model is much like noise, different in each expert, and the mean of logits cancels it; the mean of probabilities (a
mixture of hypotheses) would keep every expert's false peaks. It is also cheaper: where experts share their head, the
head of the mean of their states is the mean of their logits, so one product of the vocabulary's size does for all.

Every expert reads every token in token mode, also with top_k: one that is silent now needs its keys and values later.
Sequence mode chooses one expert by the first tokens of the prompt, and that one alone runs.

Shape letters: B rows, L tokens, H size of the embedding, D size of a state, E experts, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from moe_common.text.packing import IGNORED_LABEL
from moe_ext.moqe.experts.expert import Dtype, Expert, GgufBackend, load_expert
from moe_ext.moqe.experts.tokenizer_contract import check_tokenizers
from moe_ext.moqe.mixture.expert_caches import ExpertCaches
from moe_ext.moqe.mixture.placement import place_experts
from moe_ext.moqe.mixture.router import Router, RouterConfig


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


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names, a number behind each that stands there before."""
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]


class MoQEConfig(PreTrainedConfig):
    """What `generate` asks a model's config for; `moe_ext.moqe.mixture.storage` describes the rest of a mixture."""

    model_type = "moqe"


class MoQEModel(PreTrainedModel, GenerationMixin):
    """The mixture as a causal language model.

    Args:
        experts: the frozen experts.
        router: trained for them, or new.
        static_weights: learned weights [E] that no input changes, for comparison.
        default_expert: the best single expert on the training text.
    """

    config_class = MoQEConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        experts: ExpertSet,
        router: Router,
        *,
        static_weights: Sequence[float] | None = None,
        default_expert: int = 0,
    ) -> None:
        tokenizer = experts.tokenizer
        super().__init__(
            MoQEConfig(
                vocab_size=experts.vocab_size,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.expert_set, self.router = experts, router.to(experts.embedding.weight.device)
        self.static_weights = list(static_weights or [1 / len(experts)] * len(experts))
        self.default_expert = default_expert
        self.eval()

    @classmethod
    def from_experts(
        cls,
        paths: Sequence[str | Path],
        config: RouterConfig | None = None,
        *,
        dtype: Dtype = "auto",
        gguf_backend: GgufBackend = "transformers",
        seed: int = 0,
    ) -> "MoQEModel":
        """Experts and a new router, which begins with the uniform mixture.

        Args:
            paths: of the experts, as `load_expert` takes them.
            config: of the router.
            dtype: of what is not packed.
            gguf_backend: who computes GGUF files.
            seed: of the router's weights.
        """
        experts = load_experts(paths, dtype=dtype, gguf_backend=gguf_backend)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = Router(config or RouterConfig(), input_size=experts.input_size, num_experts=len(experts))
        return cls(experts, router)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write router, tokenizer and which experts they belong to; the experts stay where they are."""
        from moe_ext.moqe.mixture.storage import save

        save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, experts: Sequence[str | Path] | None = None, **how: Any):
        """Read a folder of `save_pretrained`, and its experts.

        Args:
            folder: the folder.
            experts: their paths, where they have moved.
            how: `dtype` and `gguf_backend` as in `from_experts`.
        """
        from moe_ext.moqe.mixture.storage import load

        return load(Path(folder), experts=experts, **how)

    @property
    def device(self) -> torch.device:
        return self.expert_set.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.expert_set.embedding.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: ExpertCaches | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Mixed logits.

        In sequence mode the logits at the first `prefix_length` tokens come from an expert that was chosen by reading
        those very tokens: do not score a text by them.

        Args:
            input_ids: [B, L]; with a cache those that are new.
            attention_mask: [B, L so far].
            past_key_values: of `new_caches`, grown in place.
            labels: [B, L], shifted here; -100 is left out.
            logits_to_keep: only those of the last so many places; 0 keeps all.
        """
        seen_BL = input_ids if past_key_values is None else past_key_values.read(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(seen_BL)
        if self.router.config.mode == "sequence":
            logits_BLV = self._by_one_expert(input_ids, seen_BL, attention_mask, past_key_values, logits_to_keep)
        else:
            weights_BLE = self.routing_weights(seen_BL, attention_mask)[:, -input_ids.shape[1] :]
            caches = None if past_key_values is None else past_key_values.caches
            states = self.expert_set.states(input_ids, attention_mask, caches)
            kept = slice(-logits_to_keep if logits_to_keep else None, None)
            logits_BLV = self.expert_set.mix([state[:, kept] for state in states], weights_BLE[:, kept])
        loss = None
        if labels is not None:
            loss = cross_entropy(
                logits_BLV[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits_BLV, past_key_values=past_key_values)

    def routing_weights(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """The weights of the experts at every token [B, L, E]; in sequence mode 1 for the chosen one."""
        mask_BL = attention_mask_BL.to(self.device)
        scores_BLE = self.router(self.expert_set.embed(input_ids_BL), mask_BL)
        if self.router.config.mode == "token":
            return self.router.weights(scores_BLE)
        chosen_BE = one_hot(self.router.choice(scores_BLE, mask_BL), len(self.expert_set)).float()
        return chosen_BE[:, None].expand(-1, input_ids_BL.shape[1], -1)

    def new_caches(self) -> ExpertCaches:
        """A cache for each expert."""
        return ExpertCaches([expert.new_cache() for expert in self.expert_set.experts])

    def generate(self, inputs: Tensor | None = None, **settings: Any):
        """As transformers' `generate`, each expert with its own keys and values."""
        if settings.get("use_cache", True) and settings.get("past_key_values") is None:
            settings["past_key_values"] = self.new_caches()
        return super().generate(inputs, **settings)

    def _by_one_expert(
        self,
        input_ids_BL: Tensor,
        seen_BL: Tensor,
        attention_mask_BL: Tensor,
        caches: ExpertCaches | None,
        logits_to_keep: int,
    ) -> Tensor:
        """The logits of the expert that each row's prefix chose; the others do not run."""
        rows_of_expert = None if caches is None else caches.rows_of_expert
        if rows_of_expert is None:
            chosen_B = self.routing_weights(seen_BL, attention_mask_BL)[:, 0].argmax(-1)
            rows_of_expert = [(chosen_B == expert).nonzero().flatten() for expert in range(len(self.expert_set))]
            if caches is not None:
                caches.rows_of_expert = rows_of_expert
        kept = logits_to_keep or input_ids_BL.shape[1]
        logits_BLV = torch.empty(
            len(input_ids_BL), kept, self.expert_set.vocab_size, device=self.device, dtype=self.dtype
        )
        for number, rows_R in enumerate(rows_of_expert):
            if len(rows_R):
                expert = self.expert_set.experts[number]
                cache = None if caches is None else caches.caches[number]
                rows_R = rows_R.to(input_ids_BL.device)
                states = expert.states(input_ids_BL[rows_R], attention_mask_BL[rows_R], cache)[:, -kept:]
                logits_BLV[rows_R] = self.expert_set.logits_of(number, states).to(logits_BLV)
        return logits_BLV


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
