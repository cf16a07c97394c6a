# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The learned router: one gate for each place that decides, and how its scores become weights.

A gate scores the experts from a hidden state, `logits = (x / rms(x)) @ W^T`. The input is normalised because hidden
states grow over the depth of a model by orders of magnitude; the scores then depend on direction alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, Optional, Union

import torch
from torch import nn

from .moe_product import project
from .moe_selection import Routing, Selection, select_experts


RouterScope = Literal["layer", "block", "model", "two_pass"]
SCOPES = ("layer", "block", "model", "two_pass")
SELECTIONS = ("dense", "top_k", "top_p", "hybrid")
INITS = ("normal", "zeros", "experts")


@dataclass
class RouterConfig:
    """Where a router looks, how it selects, and which losses train it.

    Args:
        scope: "layer" gates each adapted layer on its own input; "block" has one gate for each decoder block, on the
            block's input; "model" has one gate on the hidden state entering `block`, used from there on; "two_pass"
            first runs the base model without adapters and gates on its last hidden state, which costs a second base
            pass for each token and rules out the KV cache.
        selection: "dense", "top_k", "top_p" or "hybrid" (dense in training, top-k in eval); by default what
            `top_k` / `top_p` imply, else dense.
        top_k: experts kept for each token.
        top_p: probability that the kept experts must reach.
        temperature: divides the scores before the softmax.
        jitter: in training, the input of a [`Gate`] is multiplied by noise drawn from [1 - jitter, 1 + jitter].
        block: for scope "model", the index of the decoder block at which the gate looks (default: a quarter of the way
            up).
        init: "normal" (standard deviation 0.02), "zeros" (all experts alike), or "experts": each row is the direction
            that its trained expert responds to most, as Arrow does (https://huggingface.co/papers/2405.11157); the
            score is then the absolute value of the product, because such a direction has no sign.
        balance_coef, z_coef, entropy_coef: weights of the losses added to the model's loss in training.
    """

    scope: RouterScope = field(default="layer", metadata={"help": "Where the router looks."})
    selection: Optional[Selection] = field(default=None, metadata={"help": "How the router selects experts."})
    top_k: Optional[int] = field(default=None, metadata={"help": "Experts kept for each token."})
    top_p: Optional[float] = field(default=None, metadata={"help": "Probability the kept experts must reach."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the scores before the softmax."})
    jitter: float = field(default=0.0, metadata={"help": "Relative noise on the gate's input in training."})
    block: Optional[int] = field(default=None, metadata={"help": "Block at which a model-scope router looks."})
    init: str = field(default="normal", metadata={"help": "Initialisation of the gates."})
    balance_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    z_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy loss."})

    def __post_init__(self) -> None:
        if self.selection is None:
            self.selection = "top_k" if self.top_k is not None else "top_p" if self.top_p is not None else "dense"
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("selection", self.selection, SELECTIONS)
        _check_choice("init", self.init, INITS)
        if self.selection in ("top_k", "hybrid") and self.top_k is None:
            raise ValueError(
                f"selection='{self.selection}' needs top_k. Set top_k to the experts kept for each token."
            )
        if self.selection == "top_p" and self.top_p is None:
            raise ValueError("selection='top_p' needs top_p. Set top_p to a probability in (0, 1].")
        if self.top_k is not None and self.selection not in ("top_k", "hybrid"):
            raise ValueError(f"top_k={self.top_k} is not used by selection='{self.selection}'. Drop one of the two.")
        if self.top_p is not None and self.selection != "top_p":
            raise ValueError(f"top_p={self.top_p} is not used by selection='{self.selection}'. Drop one of the two.")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k}, but must be at least 1, a whole number.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must lie in (0, 1].")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, but must be positive and finite.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}, but must lie in [0, 1).")
        if self.block is not None and self.scope != "model":
            raise ValueError(f"block={self.block} is only used by scope='model', not by scope='{self.scope}'.")
        if self.init == "experts" and self.scope != "layer":
            raise ValueError(f"init='experts' needs scope='layer', because '{self.scope}' gates on another input.")
        for name in ("balance_coef", "z_coef", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative.")

    def check_num_experts(self, num_experts: int) -> None:
        if num_experts < 1:
            raise ValueError(f"A router needs at least one expert, got {num_experts}. Add LoRA adapters first.")
        if self.top_k is not None and self.top_k > num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but must lie between 1 and num_experts ({num_experts}). Lower top_k or add "
                "experts."
            )

    def to_dict(self) -> dict:
        return asdict(self)


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


class Gate(nn.Module):
    """Linear scores of the experts.

    Computed in the weight's dtype: float32 unless base model or gate is float64, or the gate was cast. Where the gate of
    a linear layer looks at what its experts look at, and they are multiplied in the same dtype, one product serves both.

    Args:
        in_features: width of the hidden state.
        num_experts: number of scores.
        jitter: see [`RouterConfig`].
        absolute: take the absolute value of the scores.
    """

    def __init__(self, in_features: int, num_experts: int, *, jitter: float = 0.0, absolute: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.jitter = jitter
        self.absolute = absolute

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to logits `[..., num_experts]`."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.training and self.jitter > 0:
            x = x.to(self.weight.dtype)
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        _, scores = project(x, [self.weight], len(self.weight), self.weight.dtype)
        return self.logits_of(scores.reshape(*hidden_states.shape[:-1], len(self.weight)))

    @property
    def must_be_called(self) -> bool:
        """Whether the product with the weight is not all there is: noise is asked for, or somebody listens."""
        return (self.training and self.jitter > 0) or bool(self._forward_hooks or self._forward_pre_hooks)

    def logits_of(self, scores: torch.Tensor) -> torch.Tensor:
        """Logits from the products of the normalised input with the gate's rows."""
        return scores.abs() if self.absolute else scores


class RouterSite:
    """A place that decides: its name, the width of the hidden state there, and the adapted layers it serves."""

    def __init__(self, name: str, in_features: int, module: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.name = name
        self.in_features = in_features
        self.module = module
        self.layers = layers


GateFactory = Callable[[RouterSite, int], nn.Module]


class Router(nn.Module):
    """The gates of a model, keyed by the name of their site.

    Args:
        config: a [`RouterConfig`].
        expert_names: the adapters that are mixed; the columns of all weights follow this order.
        gate: a module that maps `[..., in_features]` to logits `[..., num_experts]` and serves all sites, or a
            function `(site, num_experts) -> module` called for each site; by default a [`Gate`].
    """

    def __init__(
        self,
        config: RouterConfig,
        expert_names: list[str],
        sites: list[RouterSite],
        gate: Optional[Union[nn.Module, GateFactory]] = None,
    ) -> None:
        super().__init__()
        config.check_num_experts(len(expert_names))
        if gate is not None and (config.jitter > 0 or config.init != "normal"):
            raise ValueError(
                f"jitter={config.jitter} and init='{config.init}' are for this library's own gates. Leave them out and "
                "let your gate add noise and initialise itself."
            )
        self.config = config
        self.expert_names = list(expert_names)
        self.built_in = gate is None
        self.gates = nn.ModuleDict({gate_key(site.name): self._make_gate(site, gate) for site in sites})

    def _make_gate(self, site: RouterSite, gate) -> nn.Module:
        if isinstance(gate, nn.Module):
            return gate
        if gate is not None:
            return gate(site, len(self.expert_names))
        made = Gate(
            site.in_features,
            len(self.expert_names),
            jitter=self.config.jitter,
            absolute=self.config.init == "experts",
        )
        if self.config.init == "zeros":
            nn.init.zeros_(made.weight)
        else:
            nn.init.normal_(made.weight, std=0.02)
        return made

    def forward(self, site: str, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """Logits and weights at a site, each `[..., num_experts]`, for `hidden_states` `[..., in_features]`."""
        logits = self.gates[gate_key(site)](hidden_states)
        return logits, self.select(site, logits, training=self.training)

    def select(self, site: str, logits: torch.Tensor, *, training: bool) -> Routing:
        """What the logits `[..., num_experts]` of a gate say of each token."""
        if logits.shape[-1] != len(self.expert_names):
            raise ValueError(
                f"The gate at '{site}' scores {logits.shape[-1]} experts but the router mixes "
                f"{len(self.expert_names)} ({self.expert_names}); the counts must match."
            )
        return select_experts(
            logits,
            selection=self.config.selection,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            training=training,
        )

    @property
    def kept_experts(self) -> Optional[int]:
        """How many experts a token keeps; None where all of them, or a number that varies."""
        sparse = self.config.selection == "top_k" or (self.config.selection == "hybrid" and not self.training)
        return self.config.top_k if sparse else None

    @torch.no_grad()
    def add_expert(self, name: str) -> None:
        """Grow a column at the end of every gate; the scores of the other experts stay as they are."""
        self._require_built_in("add an expert")
        for gate in self.gates.values():
            row = torch.empty_like(gate.weight[:1])
            nn.init.zeros_(row) if self.config.init == "zeros" else nn.init.normal_(row, std=0.02)
            gate.weight = nn.Parameter(torch.cat([gate.weight, row]), requires_grad=gate.weight.requires_grad)
        self.expert_names.append(name)

    @torch.no_grad()
    def delete_expert(self, name: str) -> None:
        """Take an expert's column out of every gate; the scores of the other experts stay as they are."""
        self._require_built_in("delete an expert")
        self.config.check_num_experts(len(self.expert_names) - 1)
        kept = [i for i, expert in enumerate(self.expert_names) if expert != name]
        for gate in self.gates.values():
            gate.weight = nn.Parameter(gate.weight[kept].clone(), requires_grad=gate.weight.requires_grad)
        self.expert_names.remove(name)

    def rebuild(self, sites: list[RouterSite]) -> None:
        """Keep the gates of these sites, make those that are missing, drop the others."""
        gates = {gate_key(site.name): site for site in sites}
        trains = all(parameter.requires_grad for parameter in self.parameters())
        self.gates = nn.ModuleDict(
            {key: self.gates[key] if key in self.gates else self._make_gate(site, None) for key, site in gates.items()}
        )
        self.requires_grad_(trains)

    @torch.no_grad()
    def point_at_experts(self, sites: list[RouterSite]) -> None:
        """Set each gate's rows to its experts' directions: the first right singular vector of B_e A_e."""
        for site in sites:
            (layer,) = site.layers.values()
            weight = self.gates[gate_key(site.name)].weight
            for row, name in zip(weight, self.expert_names):
                if name in layer.lora_A:
                    A, B = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
                    if not B.any():
                        raise ValueError(
                            f"Expert '{name}' has an untrained (zero) B in layer '{site.name}' and so no direction. "
                            "Train the experts before init='experts', or use init='normal'."
                        )
                    # The right singular vectors of B A are those of R_B A, with R_B from the QR of B: rank x in.
                    _, _, directions = torch.linalg.svd(torch.linalg.qr(B).R @ A, full_matrices=False)
                    row.copy_(directions[0])

    def _require_built_in(self, action: str) -> None:
        if not self.built_in:
            raise ValueError(
                f"Cannot {action}: the gates are not this library's own. Detach the router and attach one for the new "
                "set of experts."
            )


def gate_key(site: str) -> str:
    """The name of a site's gate: one that holds dots, or names a method of the dict of gates, cannot be a module's.

    `model.layers.0` becomes `model/layers/0`, and `keys` becomes `keys/`.
    """
    return f"{site}/" if hasattr(nn.ModuleDict, site) else site.replace(".", "/")


def site_of(key: str) -> str:
    """The site whose gate has this name: `model.layers.0` for `model/layers/0`."""
    return key.removesuffix("/").replace("/", ".")
