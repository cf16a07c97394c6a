"""The router of a mixture that grows: all experts weighed in training, the best few at inference.

    p = softmax(W x / (rms(x) * temperature));  training: w = p;  inference: w = p of the top k, renormalised

The fork computes this (`RouterConfig(selection="hybrid")`, one `Gate` at each place that decides; with `"top_k"` the
best few are weighed in training too) and can grow a gate by a column. Added here: `top_k` follows the number of
experts, and one object to ask, to grow and to shrink.

Shape letters: T any number of leading dimensions (tokens), E experts.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.tuners.lora.moe_router import Router, gate_key, site_of
from torch import Tensor


@dataclass(kw_only=True)
class HybridRouterConfig:
    """How a DyLoRA-MoE weighs its experts."""

    top_k: int = field(default=2, metadata={"help": "Experts kept for each token at inference; fewer if there are."})
    dense_training: bool = field(
        default=True, metadata={"help": "Weigh all experts while training, and keep top_k of them at inference only."}
    )
    router_scope: Literal["layer", "block", "model", "two_pass"] = field(
        default="block", metadata={"help": "Where the router looks: at each layer's, block's or one block's input."}
    )
    router_temperature: float = field(default=1.0, metadata={"help": "Divides the scores before the softmax."})
    router_jitter: float = field(default=0.0, metadata={"help": "Relative noise on a gate's input in training."})
    balance_coefficient: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    router_z_coefficient: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    router_entropy_coefficient: float = field(default=0.0, metadata={"help": "Weight of the entropy loss."})

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but must be at least 1.")

    def as_peft_arguments(self, num_experts: int) -> dict[str, Any]:
        """The arguments of `MoELoraConfig` that say the same for so many experts."""
        return {
            "router_selection": "hybrid" if self.dense_training else "top_k",
            "top_k": min(self.top_k, num_experts),
            "router_scope": self.router_scope,
            "router_temperature": self.router_temperature,
            "router_jitter": self.router_jitter,
            "router_balance_coef": self.balance_coefficient,
            "router_z_coef": self.router_z_coefficient,
            "router_entropy_coef": self.router_entropy_coefficient,
        }


class DynamicHybridRouter:
    """The attached router of a model: what it decides, and how it grows and shrinks.

    It owns no weights: those are in the fork's `Router`, a submodule of the model, where optimizers find them.

    Args:
        model: a PeftModel whose tuner holds a mixture (`MoELoraModel`) with the selection "hybrid" or "top_k".
        top_k: experts to keep at inference once there are as many.
    """

    def __init__(self, model, *, top_k: int) -> None:
        selection = model.base_model.mixture_config.router_config().selection
        if selection not in ("hybrid", "top_k"):
            raise ValueError(
                f"The mixture's router selects by '{selection}', but a DynamicHybridRouter needs 'hybrid' or 'top_k'. "
                "Make it with router_selection='hybrid'."
            )
        self._model = model
        self.wanted_top_k = top_k

    @property
    def attached(self) -> Router:
        """The fork's router: an nn.Module with one gate for each site."""
        return self._model.base_model.moe_router

    @property
    def sites(self) -> list[str]:
        """The places that decide, in the order of the model: layers, blocks, or one for the whole model."""
        return [site_of(key) for key in self.attached.gates]

    @property
    def num_experts(self) -> int:
        return len(self.attached.expert_names)

    @property
    def top_k(self) -> int:
        """Experts kept for each token at inference, never more than there are."""
        return self.attached.config.top_k

    @property
    def temperature(self) -> float:
        return self.attached.config.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"temperature is {value}, but must be positive.")
        self.attached.config.temperature = self._model.base_model.mixture_config.router_temperature = value

    def logits(self, site: str, hidden_states: Tensor) -> Tensor:
        """Scores of the experts, [*T, E], for hidden states [*T, in_features] that enter a site."""
        return self._ask(site, hidden_states)[0]

    def __call__(self, site: str, hidden_states: Tensor) -> Tensor:
        """Weights of the experts, [*T, E], each row summing to one: at most top_k; all in dense training."""
        return self._ask(site, hidden_states)[1].weights

    def grow(self, name: str, **changes: Any) -> None:
        """Add an expert and a column for it; what the gates say of the other experts stays as it is."""
        self._model.base_model.add_expert(name, **changes)
        self._follow(self.num_experts)

    def shrink(self, name: str) -> None:
        """Take an expert and its column out; what the gates say of the other experts stays as it is."""
        if self.num_experts == 1:
            raise ValueError(f"'{name}' is the last expert, and a mixture needs at least one. Add another one first.")
        self._follow(self.num_experts - 1)
        try:
            self._model.base_model.delete_expert(name)
        finally:
            self._follow(self.num_experts)

    def _follow(self, num_experts: int) -> None:
        kept = min(self.wanted_top_k, num_experts)
        self.attached.config.top_k = self._model.base_model.mixture_config.top_k = kept

    def _ask(self, site: str, hidden_states: Tensor):
        if gate_key(site) not in self.attached.gates:
            raise ValueError(f"No gate looks at '{site}'. The router's sites are {', '.join(self.sites)}.")
        return self.attached(site, hidden_states)
