"""The gates of a routed LoRA mixture (`MoELoraConfig`, `attach_router`): one for each site of its router.

A gate that somebody listens to is called as a module of its own; else a layer multiplies it along with its experts.

Shape letters: T tokens, E experts, K choices, H width of the hidden state at a site.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.moe_router import Router, gate_key, site_of
from torch import Tensor, nn

from moe_ext.router_study.gates.base import Gates, Overrule, Routing


def router_of(model: nn.Module) -> Router | None:
    """The router of a routed LoRA mixture, or None."""
    return next((module for module in model.modules() if isinstance(module, Router)), None)


class LoraGates(Gates):
    """The sites of a router, in its own order.

    A dense router gives every expert a weight, so all that it chooses is its first choice: K is 1. With top-p K is E,
    and a token's places beyond its last expert hold E.
    """

    def __init__(self, model: nn.Module, router: Router, layers: Sequence[int] | None = None) -> None:
        self.model, self.router = model, router
        keys = list(router.gates)
        self.keys = [keys[place] for place in self._check_layers(layers, len(keys))]
        self.names = [site_of(key) for key in self.keys]
        self.labels = _short_names(self.names)
        self.num_experts = len(router.expert_names)
        self._place_of = {gate_key(name): place for place, name in enumerate(self.names)}
        self.is_dense = router.config.selection == "dense"
        if self.is_dense:
            self.num_chosen = 1
        else:
            self.num_chosen = router.config.top_k or self.num_experts

    def weights(self) -> list[Tensor]:
        gates = [self.router.gates[key] for key in self.keys]
        if without := [name for name, gate in zip(self.names, gates, strict=True) if not hasattr(gate, "weight")]:
            raise ValueError(
                f"The gate at {without[0]} is not a matrix of one row an expert, so it has no directions."
            )
        return [gate.weight.detach().float() for gate in gates]

    def modules(self) -> list[nn.Module]:
        return [self.router.gates[key] for key in self.keys]

    def layers_of(self, place: int) -> list[nn.Module]:
        """The LoRA layers that a gate decides for."""
        held = [module for module in self.model.modules() if getattr(module, "routing_port", None) is not None]
        return [layer for layer in held if layer.routing_port.site == self.names[place]]

    @contextmanager
    def listening(self) -> Iterator[dict[int, Any]]:
        heard: dict[int, Any] = {}

        def hear(_router: nn.Module, args: tuple, output: tuple) -> None:
            place = self._place_of.get(gate_key(args[0]))
            if place is not None:
                heard[place] = output

        with self._called_by_the_layers():
            handle = self.router.register_forward_hook(hear)
            try:
                yield heard
            finally:
                handle.remove()

    def routing(self, heard: dict[int, Any]) -> Routing:
        self._check_all_heard(heard)
        device = heard[0][0].device
        decided = [heard[place] for place in range(len(self))]

        def stacked(parts: list[Tensor]) -> Tensor:
            return torch.stack([part.flatten(0, -2).float().to(device) for part in parts])

        return self._routing_of(
            stacked([logits for logits, _ in decided]),
            stacked([routing.probabilities for _, routing in decided]),
            stacked([routing.weights for _, routing in decided]),
        )

    def decide(self, logits_LTE: Tensor) -> Routing:
        routing = self.router.select(self.names[0], logits_LTE, training=False)
        return self._routing_of(logits_LTE, routing.probabilities, routing.weights)

    def _routing_of(self, logits_LTE: Tensor, probabilities_LTE: Tensor, weights_LTE: Tensor) -> Routing:
        kept_LTK, chosen_LTK = weights_LTE.topk(self.num_chosen, dim=-1)
        return Routing(logits_LTE, probabilities_LTE, chosen_LTK.masked_fill(kept_LTK <= 0, self.num_experts))

    @contextmanager
    def overruled(self, place: int, overrule: Overrule) -> Iterator[None]:
        def replace(_router: nn.Module, args: tuple, output: tuple) -> tuple | None:
            if gate_key(args[0]) != self.keys[place]:
                return None
            logits, routing = output
            weights = overrule(routing.weights.flatten(0, -2), logits.flatten(0, -2))
            return logits, routing._replace(weights=weights.view_as(routing.weights))

        with self._called_by_the_layers():
            handle = self.router.register_forward_hook(replace)
            try:
                yield
            finally:
                handle.remove()

    @contextmanager
    def _called_by_the_layers(self) -> Iterator[None]:
        handles = [gate.register_forward_hook(lambda *_: None) for gate in set(self.router.gates.values())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _short_names(names: list[str]) -> list[str]:
    """`model.layers.3.self_attn.q_proj` as `3.q_proj`; `model.layers.3` as `3`."""
    shorts = []
    for name in names:
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        shorts.append(".".join([*numbers[:1], *([] if parts[-1].isdigit() else parts[-1:])]))
    return shorts if len(set(shorts)) == len(names) else list(names)
