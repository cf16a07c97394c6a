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

from __future__ import annotations

import copy
from typing import Any, Optional

from torch import nn

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.moe_adapter_names import is_of_adapter, refuse_unusable_names
from peft.tuners.lora.moe_mixin import RoutedLoraMixin
from peft.tuners.lora.moe_router import Router
from peft.tuners.tuners_utils import (
    BaseTuner,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    cast_adapter_dtype,
    set_requires_grad,
)
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.other import _set_adapter, set_additional_trainable_modules

from .config import MoELoraConfig


class MoELoraModel(LoraModel):
    """
    A mixture of LoRA experts with a learned router, from one [`MoELoraConfig`].

    The experts are ordinary LoRA adapters of the model, each with its own entry in `peft_config`; the mixture is the
    adapter that ties them to their router. Activating the mixture activates all experts and the router; activating one
    expert runs it as a plain LoRA adapter.

    Example:
        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import MoELoraConfig, get_peft_model

        >>> base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> config = MoELoraConfig(num_experts=4, top_k=2, r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        ```
    """

    mixture_name: Optional[str] = None
    uses_shared_state: bool = True  # the router; without the tuner around the model, it would not train or be saved

    # -- making the mixture ------------------------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        if not isinstance(config, MoELoraConfig):
            super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
            return
        if self.mixture_name is not None:
            raise ValueError(
                f"This model already holds the mixture '{self.mixture_name}'. Use add_expert to add to it, or wrap a "
                "base model of its own."
            )
        taken = [name for name in config.expert_names if name in self.peft_config]
        if taken:
            raise ValueError(f"Experts cannot have the names of other adapters: {taken}. Rename them.")

        # The caller's config stays as it is, to be used again: what the mixture becomes is noted in a copy.
        config = self.peft_config[adapter_name] = copy.copy(config)
        recorded, sources = config.expert_configs, config.experts if isinstance(config.experts, dict) else {}
        expert_configs = {}
        for name in config.expert_names:
            if recorded is not None:
                changes = {"inference_mode": config.inference_mode, "task_type": config.task_type}
                expert_configs[name] = LoraConfig(**{**recorded[name], **changes})
            elif name in sources:
                expert_configs[name] = _load_lora_config(name, sources[name], config.inference_mode)
            else:
                expert_configs[name] = config.new_expert_config()

        model.peft_config = self.peft_config
        self.mixture_name = adapter_name
        for name, expert_config in expert_configs.items():
            self.peft_config[name] = expert_config
            super().inject_adapter(model, name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
            if recorded is None and name in sources:
                self._load_expert(name, sources[name], low_cpu_mem_usage)
        config.experts = []
        for name, expert_config in expert_configs.items():
            config.record_expert(name, expert_config)
        config.target_modules = _union_of_targets(expert_configs.values())
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=True,
        )
        # Of a recorded mixture, the experts' weights follow, and the saved gates with them.
        self._attach(None, config.router_config(), config.expert_names, initialise=recorded is None)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def _load_expert(self, name: str, source: str, low_cpu_mem_usage: bool) -> None:
        loaded = set_peft_model_state_dict(
            self.model, load_peft_weights(source, device="cpu"), name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        missing = [key for key in loaded.missing_keys if is_of_adapter(key, name)]
        if loaded.unexpected_keys or missing:
            raise ValueError(
                f"The adapter '{source}' for expert '{name}' does not fit this base model: unexpected "
                f"{loaded.unexpected_keys[:3]}, missing {missing[:3]}. Load it onto the base it was trained for."
            )

    # -- experts -----------------------------------------------------------------------------------------------------

    @property
    def mixture_config(self) -> MoELoraConfig:
        return self.peft_config[self.mixture_name]

    def add_expert(self, name: str, source: Optional[str] = None, **changes: Any) -> None:
        """Add an expert and grow the router by a column, without changing the other experts or their scores.

        Optimizers made before do not know the new parameters: make a new one.

        Args:
            name: the new expert's name.
            source: folder or Hub id of a trained LoRA adapter; by default the expert is made from nothing.
            changes: LoRA arguments in which a new expert differs from the mixture's, e.g. `r=4`.

        Raises:
            ValueError: the name is taken or unusable, or `changes` are given for a trained adapter.
        """
        refuse_unusable_names([name])
        if name in self.peft_config:
            raise ValueError(f"'{name}' is taken; this model holds the adapters {list(self.peft_config)}.")
        if source is not None and changes:
            raise ValueError(f"A trained adapter keeps its own config; drop {sorted(changes)}.")
        router = self._require_router()
        router._require_built_in("add an expert")
        config = self.mixture_config
        expert_config = (
            _load_lora_config(name, source, config.inference_mode)
            if source is not None
            else config.new_expert_config(**changes)
        )
        trained_before = self._what_trains()
        self.peft_config[name] = expert_config
        try:
            super().inject_adapter(self.model, name)
            if source is not None:
                self._load_expert(name, source, low_cpu_mem_usage=False)
        except Exception:
            self.peft_config.pop(name)
            for layer in self._adapted_layers().values():
                if name in layer._all_available_adapter_names():
                    layer.delete_adapter(name)
            self._restore_what_trains(trained_before)
            raise
        cast_adapter_dtype(self.model, adapter_name=name, autocast_adapter_dtype=True)
        config.record_expert(name, expert_config)
        self._restore_what_trains(trained_before)  # making the adapter activated the mixture
        router.add_expert(name)
        self._take_up_changed_experts(router, trained_before)

    def delete_expert(self, name: str) -> None:
        """Delete an expert and its column of the router; the other experts and their scores stay as they are."""
        router = self._require_router()
        if name not in router.expert_names:
            raise ValueError(f"There is no expert '{name}'; the experts are {router.expert_names}.")
        trained_before = self._what_trains()
        router.delete_expert(name)
        for layer in self._adapted_layers().values():
            if name in layer._all_available_adapter_names():
                layer.delete_adapter(name)
        del self.peft_config[name]
        self.mixture_config.forget_expert(name)
        self._take_up_changed_experts(router, trained_before)

    def _take_up_changed_experts(self, router: Router, trained_before: list[tuple[nn.Parameter, bool]]) -> None:
        """Attach the router anew and activate the mixture; gates and what was held before train as before."""
        self._rebuild_router(router)
        gates = [(parameter, parameter.requires_grad) for parameter in router.parameters()]
        self.set_adapter(self.mixture_name, inference_mode=self.mixture_config.inference_mode)
        self._restore_what_trains(trained_before + gates)

    def _what_trains(self) -> list[tuple[nn.Parameter, bool]]:
        return [(parameter, parameter.requires_grad) for parameter in self.parameters()]

    def _restore_what_trains(self, trained_before: list[tuple[nn.Parameter, bool]]) -> None:
        for parameter, requires_grad in trained_before:
            parameter.requires_grad_(requires_grad)

    def _require_router(self) -> Router:
        router = self._router_of()
        if router is None:
            raise ValueError("The mixture's router is detached. Attach one before changing the experts.")
        return router

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name == self.mixture_name:
            raise ValueError(
                f"'{adapter_name}' is the mixture itself. Use delete_expert for one expert, or unload() for the base "
                "model."
            )
        super().delete_adapter(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter can become plain LoRA: an expert is one, the mixture needs `freeze_routing` first."""
        return adapter_name != self.mixture_name and super().supports_lora_conversion(adapter_name)

    # -- activating --------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate the mixture (all experts and the router), or a single adapter as plain LoRA."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if self.mixture_name is None or names != [self.mixture_name]:
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            return
        config = self.mixture_config
        for layer in self._adapted_layers().values():
            if layer.merged:
                layer.unmerge()
            layer.set_adapter(config.expert_names, inference_mode=inference_mode or not config.train_experts)
        _set_adapter(self.model, self.mixture_name, inference_mode=inference_mode)
        self.active_adapter = self.mixture_name
        if self._router_of() is not None:
            self._router_of().requires_grad_(not inference_mode)

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        """Enable or disable gradients of experts by name; the mixture's name stands for the router and, if they train,
        all experts."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.mixture_name in names:
            names.remove(self.mixture_name)
            if self._router_of() is not None:
                self._router_of().requires_grad_(requires_grad)
            set_requires_grad(self.model, adapter_names=self.mixture_name, requires_grad=requires_grad)
            if self.mixture_config.train_experts or not requires_grad:
                names += [name for name in self.mixture_config.expert_names if name not in names]
        super().set_requires_grad(names, requires_grad)

    def _active_experts(self) -> list[str]:
        if self.active_adapter == self.mixture_name:
            return self.mixture_config.expert_names
        return super()._active_experts()

    def _activate_keeping_gradients(self, names: list[str]) -> None:
        if set(names) == set(self.mixture_config.expert_names):
            trained_before = self._what_trains()
            self.set_adapter(self.mixture_name)
            self._restore_what_trains(trained_before)
        else:
            super()._activate_keeping_gradients(names)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        names = [adapter_name]
        if adapter_name == self.mixture_name:
            names += self.mixture_config.expert_names
        for name in names:
            super()._cast_adapter_dtype(name, autocast_adapter_dtype=autocast_adapter_dtype)

    # -- saving and loading ------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # All experts and the router; RoutedLoraMixin would leave the router out.
        return super(RoutedLoraMixin, cls)._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # experts keep their names in the file; the mixture's own name is in no key

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        held = model.state_dict()
        others = [name for name in model.peft_config if name not in (adapter_name, *config.expert_names)]
        expected = {
            key
            for key in _filter_state_dict_by_key_prefixes(held, _get_tuner_state_dict_key_prefixes(model))
            if not any(is_of_adapter(key, name) for name in others)
        }
        missing, unexpected = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - held.keys())
        if missing or unexpected:
            raise ValueError(
                f"The weights do not fit this mixture of {config.expert_names}: {len(missing)} tensors are missing "
                f"({missing[:3]}) and {len(unexpected)} are unknown ({unexpected[:3]}). Load them with the config "
                "they were saved with, onto the base model they were trained for."
            )
        return state_dict


def _load_lora_config(name: str, source: str, inference_mode: bool) -> LoraConfig:
    config = LoraConfig.from_pretrained(source)
    if type(config) is not LoraConfig:
        raise ValueError(f"Expert '{name}' must be a LoRA adapter, but '{source}' holds {config.peft_type}.")
    if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            f"Expert '{name}' ('{source}') also trains biases, whole modules or tokens of the base model, which "
            "cannot be weighted per token. Use an adapter with LoRA weights alone."
        )
    config.inference_mode = inference_mode
    return config


def _union_of_targets(configs) -> Any:
    targets = [config.target_modules for config in configs]
    if all(isinstance(target, (set, list)) for target in targets):
        return set().union(*targets)
    return targets[0] if len({str(target) for target in targets}) == 1 else None
