"""The experts of a mixture by name: made, activated, frozen and removed while the mixture lives."""

import difflib
from collections.abc import Iterable
from typing import Any

from peft.tuners.lora.moe_adapter_names import is_of_adapter
from torch import nn


class ExpertManager:
    """Everything that is done to the experts of a `DyLoRA_MoE`.

    Experts are LoRA adapters. Either all are active and the router weighs them, or one is active alone as a plain
    LoRA. An expert that was frozen stays so, whatever is activated, until `unfreeze`.

    Args:
        model: the `DyLoRA_MoE` that holds them.
        frozen: names of experts that are frozen from the start.
    """

    def __init__(self, model, *, frozen: Iterable[str] = ()) -> None:
        self._model = model
        self._frozen = set(frozen)
        self._apply_frozen()

    @property
    def num_experts(self) -> int:
        return len(self.get_all_adapter_names())

    @property
    def active_expert(self) -> str | None:
        """The expert that is active alone; None while all are."""
        active = self._tuner.active_adapter
        active = active if isinstance(active, str) else active[0]
        return None if active == self._tuner.mixture_name else active

    @property
    def frozen(self) -> list[str]:
        """The frozen experts, in the order of the router's columns."""
        return [name for name in self.get_all_adapter_names() if name in self._frozen]

    def get_all_adapter_names(self) -> list[str]:
        """The experts' names in the order of the router's columns."""
        return list(self._tuner.mixture_config.expert_names)

    def create_expert(self, name: str | None = None, r: int | None = None, **changes: Any) -> str:
        """Add an expert that changes nothing yet (its B is zero), and a column of the router for it; activates all.

        Optimizers made before do not know the new parameters: make a new one.

        Args:
            name: by default `expert_<n>` with the first number that is free.
            r: rank, and with it alpha, so that alpha / r stays; by default the mixture's.
            changes: other LoRA arguments in which it differs, or `source`, the folder of a trained LoRA adapter.

        Returns:
            The expert's name.

        Raises:
            ValueError: the name is taken or unusable, or r is below 1.
        """
        names = self.get_all_adapter_names()
        if name is None:
            name = next(free for i in range(len(names) + 1) if (free := f"expert_{i}") not in names)
        if r is not None:
            if r < 1:
                raise ValueError(f"r is {r}, but must be at least 1.")
            config = self._tuner.mixture_config
            changes = {"r": r, "lora_alpha": config.lora_alpha * r / config.r, **changes}
        self._model.router.grow(name, **changes)
        self.activate_all_experts()
        return name

    def remove_expert(self, name: str) -> None:
        """Delete an expert and its column of the router; activates those that are left.

        Raises:
            ValueError: there is no such expert, or it is the last one.
        """
        self._check(name)
        self._model.router.shrink(name)
        self._frozen.discard(name)
        self.activate_all_experts()

    def set_active_expert(self, expert: str | int) -> None:
        """Run one expert alone, as a plain LoRA without the router; only it trains, unless it is frozen.

        Args:
            expert: its name, or its column.
        """
        self._model.set_adapter(self.name_of(expert))
        self._apply_frozen()

    def activate_all_experts(self) -> None:
        """Run all experts, weighed by the router; all that are not frozen train."""
        self._model.set_adapter(self._tuner.mixture_name)
        self._apply_frozen()

    def freeze(self, names: str | Iterable[str]) -> None:
        """Keep experts from training until `unfreeze`. The router is not an expert: it keeps training."""
        names = self._as_names(names)
        self._frozen.update(names)
        self._apply_frozen()

    def unfreeze(self, names: str | Iterable[str]) -> None:
        """Let experts train again."""
        names = self._as_names(names)
        self._frozen.difference_update(names)
        for name in names:
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(True)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The LoRA weights of one expert."""
        self._check(name)
        return lora_weights(self._model, name)

    def name_of(self, expert: str | int) -> str:
        """The name of an expert given by name or column.

        Raises:
            ValueError: there is no such expert.
        """
        names = self.get_all_adapter_names()
        if isinstance(expert, bool) or not isinstance(expert, (str, int)):
            raise ValueError(f"An expert is given by its name or its number, got {expert!r}.")
        if isinstance(expert, int):
            if not 0 <= expert < len(names):
                raise ValueError(f"There is no expert number {expert}: the experts are 0 to {len(names) - 1}.")
            return names[expert]
        self._check(expert)
        return expert

    @property
    def _tuner(self):
        return self._model.base_model

    def _check(self, name: str) -> None:
        names = self.get_all_adapter_names()
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"Closest: '{close[0]}'. " if close else ""
            raise ValueError(f"There is no expert '{name}'. {hint}The experts are {', '.join(names)}.")

    def _as_names(self, names: str | Iterable[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            self._check(name)
        return names

    def _apply_frozen(self) -> None:
        for name in self._frozen:
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(False)


def lora_weights(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """The LoRA weights of one adapter of a PEFT model; modules of the base that have its name are left out."""
    return [parameter for key, parameter in model.named_parameters() if is_of_adapter(key, adapter)]
