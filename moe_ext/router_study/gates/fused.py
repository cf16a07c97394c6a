"""The gates of a mixture of transformers: router modules that return logits, weights and indices of their choice.

Shape letters: L gates, T tokens (batch and length flattened), E experts, K choices of a token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_ext.router_study.gates.base import Gates, Overrule, Routing
from moe_ext.routers import MoeLayer, moe_layers

PROBED_TOKENS = 64


class FusedGates(Gates):
    """The routers of a mixture of transformers, first layer to last."""

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
