"""The gates of a mixture: where it decides which experts see a token, how to listen to them and how to overrule them.

    gates = find_gates(model)
    with gates.listening() as heard:
        model(input_ids)
    routing = gates.routing(heard)       # what every gate decided about every token of that pass

A gate is a router module of a mixture of transformers (`fused.FusedGates`) or a site of a routed LoRA mixture
(`lora.LoraGates`). Both are found by structure, never by name (`find.find_gates`).

Shape letters: L gates, T tokens (batch and length flattened), E experts, K choices of a token, H hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

# (weights_TE, logits_TE) -> weights_TE; see `Gates.overruled`.
Overrule = Callable[[Tensor, Tensor], Tensor]


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
