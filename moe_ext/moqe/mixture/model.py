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
from moe_ext.moqe.experts.expert import Dtype, GgufBackend
from moe_ext.moqe.mixture.expert_caches import ExpertCaches
from moe_ext.moqe.mixture.expert_set import ExpertSet, load_experts
from moe_ext.moqe.mixture.router import Router, RouterConfig
from moe_ext.moqe.mixture.storage import StoredMixture, check_experts, read_mixture, write_mixture


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

    def save_pretrained(self, folder: str | Path, noted: dict[str, Any] | None = None, **_: Any) -> None:
        """Write router, tokenizer and which experts they belong to; the experts stay where they are.

        Args:
            folder: that is not there yet, or empty.
            noted: what to keep of its training.

        Raises:
            FileExistsError: the folder holds something.
        """
        identities = [expert.identity for expert in self.expert_set.experts]
        stored = StoredMixture(self.router, identities, self.static_weights, self.default_expert, noted or {})
        write_mixture(Path(folder), stored, self.expert_set.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        experts: Sequence[str | Path] | None = None,
        *,
        dtype: Dtype = "auto",
        gguf_backend: GgufBackend = "transformers",
    ) -> "MoQEModel":
        """Read a folder of `save_pretrained`, and its experts.

        Args:
            folder: the folder.
            experts: their paths, where they have moved.
            dtype, gguf_backend: as in `from_experts`.

        Raises:
            FileNotFoundError, ValueError: as `check_experts` and `read_mixture`.
        """
        paths = check_experts(Path(folder), experts)
        return cls.on_experts(folder, load_experts(paths, dtype=dtype, gguf_backend=gguf_backend))

    @classmethod
    def on_experts(cls, folder: str | Path, experts: ExpertSet) -> "MoQEModel":
        """The mixture of a folder on experts that are loaded already.

        Raises:
            ValueError: a router that cannot be read, or of another shape.
        """
        stored = read_mixture(Path(folder))
        return cls(experts, stored.router, static_weights=stored.static_weights, default_expert=stored.default_expert)

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
