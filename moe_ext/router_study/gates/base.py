"""The gates of a mixture: where it decides which experts see a token, how to listen to them and how to overrule them.

    gates = find_gates(model)
    with gates.listening() as heard:
        model(input_ids)
    routing = gates.routing(heard)       # what every gate decided about every token of that pass

A gate is a router module of a mixture of transformers (`FusedGates`) or a site of a routed LoRA mixture
(`lora_gates.LoraGates`). Both are found by structure, never by name.

Shape letters: L gates, T tokens (batch and length flattened), E experts, K choices of a token, H hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_ext.routers import MoeLayer, moe_layers

# (weights_TE, logits_TE) -> weights_TE; see `Gates.overruled`.
Overrule = Callable[[Tensor, Tensor], Tensor]
PROBED_TOKENS = 64


@dataclass(frozen=True)
class Routing:
    """What the gates decided in one forward pass.

    Args:
        logits_LTE: the scores, float32.
        probabilities_LTE: the scores as the model turns them into weights, before any choice; each row sums to 1.
        chosen_LTK: the experts chosen, the one of the largest weight first; E stands for "no further expert".
    """

    logits_LTE: Tensor
    probabilities_LTE: Tensor
    chosen_LTK: Tensor

    @property
    def first_LT(self) -> Tensor:
        """Each token's first choice."""
        return self.chosen_LTK[..., 0]

    def mask_LTE(self) -> Tensor:
        """1 where an expert was chosen, float32."""
        num_experts = self.logits_LTE.shape[-1]
        mask = self.logits_LTE.new_zeros(*self.logits_LTE.shape[:-1], num_experts + 1)
        return mask.scatter_(-1, self.chosen_LTK, 1.0)[..., :num_experts]


class Gates(ABC):
    """All gates of a model, first to last.

    Args:
        names: full names of the modules or sites.
        labels: short names for tables and plots.
        num_experts: E, the same for every gate.
        num_chosen: K, the most experts that a token gets.
    """

    names: list[str]
    labels: list[str]
    num_experts: int
    num_chosen: int

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def weights(self) -> list[Tensor]:
        """The rows [E, H] that score the experts, one matrix a gate; H may differ between gates."""

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The module of each gate; its first argument is the hidden state [..., H] that it scores."""

    @abstractmethod
    @contextmanager
    def listening(self) -> Iterator[dict[int, Any]]:
        """Inside, every forward pass leaves in the yielded mapping what each gate decided last."""

    @abstractmethod
    def routing(self, heard: dict[int, Any]) -> Routing:
        """What was heard in a pass, in one form for all kinds of gates.

        Raises:
            RuntimeError: a gate was not asked in that pass.
        """

    @abstractmethod
    def decide(self, logits_LTE: Tensor) -> Routing:
        """What these gates would decide of other scores; a choice limited to groups of experts is left out."""

    @abstractmethod
    @contextmanager
    def overruled(self, place: int, overrule: Overrule) -> Iterator[None]:
        """Inside, one gate's weights [T, E] are replaced before the experts run.

        Args:
            place: number of the gate, from 0.
            overrule: is given the weights, zero where an expert was not chosen, and the logits; must leave at most K
                weights of a token that are not zero.
        """

    @contextmanager
    def inputs(self) -> Iterator[dict[int, Tensor]]:
        """Inside, every pass leaves the hidden states [T, H] that each gate scored."""
        seen: dict[int, Tensor] = {}

        def look(place: int, _module: nn.Module, args: tuple) -> None:
            seen[place] = args[0].detach().flatten(0, -2)

        handles = [
            module.register_forward_pre_hook(partial(look, place)) for place, module in enumerate(self.modules())
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _check_all_heard(self, heard: dict[int, Any]) -> None:
        if silent := [self.names[place] for place in range(len(self)) if place not in heard]:
            raise RuntimeError(f"The gate {silent[0]} decided nothing in this pass. Run the whole model once.")

    def _check_layers(self, layers: Sequence[int] | None, count: int) -> list[int]:
        places = list(range(count)) if layers is None else list(layers)
        if wrong := [place for place in places if not 0 <= place < count]:
            raise ValueError(
                f"There is no layer {wrong[0]}: the model has {count} layers with a router, 0 to {count - 1}."
            )
        return places


class FusedGates(Gates):
    """The routers of a mixture of transformers, which return logits, weights and indices of their choice."""

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        found = moe_layers(model)
        self.layers: list[MoeLayer] = [found[place] for place in self._check_layers(layers, len(found))]
        self.names = [layer.router_name for layer in self.layers]
        self.labels = [str(layer.index) for layer in self.layers]
        counts = {layer.num_experts for layer in self.layers}
        if len(counts) > 1:
            raise ValueError(
                f"The layers hold {sorted(counts)} experts, but are compared with each other and must agree."
            )
        self.num_experts = counts.pop()
        self.num_chosen = self.layers[0].router.top_k
        self._score: Callable[[Tensor], Tensor] | None = None

    def weights(self) -> list[Tensor]:
        return [layer.router.weight.detach().float() for layer in self.layers]

    def modules(self) -> list[nn.Module]:
        return [layer.router for layer in self.layers]

    @contextmanager
    def listening(self) -> Iterator[dict[int, Any]]:
        heard: dict[int, Any] = {}

        def hear(place: int, _module: nn.Module, _args: tuple, output: tuple) -> None:
            heard[place] = output

        handles = [layer.router.register_forward_hook(partial(hear, place)) for place, layer in enumerate(self.layers)]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    def routing(self, heard: dict[int, Any]) -> Routing:
        self._check_all_heard(heard)
        device = heard[0][0].device
        logits_LTE, weights_LTK, chosen_LTK = (
            torch.stack([heard[place][part].flatten(0, -2).to(device) for place in range(len(self))])
            for part in range(3)
        )
        logits_LTE = logits_LTE.float()
        if self._score is None:
            self._score = scoring_of(logits_LTE[0], weights_LTK[0], chosen_LTK[0])
        if bool((weights_LTK[..., :-1] < weights_LTK[..., 1:]).any()):  # DeepSeek leaves its choices unsorted
            order_LTK = weights_LTK.argsort(dim=-1, descending=True, stable=True)
            chosen_LTK = chosen_LTK.gather(-1, order_LTK)
        return Routing(logits_LTE, self._score(logits_LTE), chosen_LTK)

    def decide(self, logits_LTE: Tensor) -> Routing:
        probabilities_LTE = (self._score or softmax_scores)(logits_LTE)
        return Routing(logits_LTE, probabilities_LTE, probabilities_LTE.topk(self.num_chosen, dim=-1).indices)

    @contextmanager
    def overruled(self, place: int, overrule: Overrule) -> Iterator[None]:
        def replace(_module: nn.Module, _args: tuple, output: tuple) -> tuple:
            logits, weights, indices = output
            full_TE = weights.new_zeros(*logits.shape).scatter_(-1, indices, weights)
            weights, indices = overrule(full_TE, logits).topk(indices.shape[-1], dim=-1)
            return logits, weights, indices

        handle = self.layers[place].router.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def softmax_scores(logits_TE: Tensor) -> Tensor:
    """Probabilities of a router that weighs by softmax."""
    return logits_TE.softmax(dim=-1)


def sigmoid_scores(logits_TE: Tensor) -> Tensor:
    """Probabilities of a router that weighs by sigmoids (DeepSeek V3): those, divided by their sum."""
    scores = logits_TE.sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True)


def scoring_of(logits_TE: Tensor, weights_TK: Tensor, chosen_TK: Tensor) -> Callable[[Tensor], Tensor]:
    """How this router turns scores into weights, from what it did: the function whose chosen entries fit.

    Softmax where the two cannot be told apart, as with one choice a token.
    """
    few = slice(0, PROBED_TOKENS)
    given = _proportions(weights_TK[few].float())

    def error(score: Callable[[Tensor], Tensor]) -> float:
        return float((_proportions(score(logits_TE[few]).gather(-1, chosen_TK[few])) - given).abs().mean())

    return sigmoid_scores if error(sigmoid_scores) < error(softmax_scores) else softmax_scores


def _proportions(weights_TK: Tensor) -> Tensor:
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(1e-30)


def find_gates(model: nn.Module, layers: Sequence[int] | None = None) -> Gates:
    """The gates of a mixture of transformers or of a routed LoRA mixture.

    Args:
        model: a transformers model, or a PEFT model with a router.
        layers: study these gates alone, by number from 0; None takes all.

    Raises:
        ValueError: no router was found, or there is no such layer.
    """
    from moe_ext.router_study.gates.lora import LoraGates, router_of

    router = router_of(model)
    if router is not None:
        return LoraGates(model, router, layers)
    return FusedGates(model, layers)
