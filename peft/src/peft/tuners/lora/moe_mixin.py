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
"""Routing as methods of `LoraModel`: explicit weights, attaching a router, what it did, and what it forbids."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Optional, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import nn

from .moe_adapter_names import is_of_adapter
from .moe_context import RoutingContext, RoutingPort, is_encoder_decoder
from .moe_freeze import freeze_routing
from .moe_layer import RoutedLayerMixin, why_unroutable
from .moe_losses import router_losses, summarize
from .moe_router import GateFactory, Router, RouterConfig, RouterSite, gate_key
from .moe_sites import find_sites


ROUTER_ATTRIBUTE = "moe_router"
ROUTER_CONFIG_NAME = "router_config.json"
ROUTER_WEIGHTS_NAME = "router_model.safetensors"


class RoutedLoraMixin:
    """Routing for `LoraModel`. Without a router and without `routing_weights`, nothing here runs."""

    # -- explicit weights --------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's forward; `routing_weights` reach it when the tuner is called by itself, not by its `PeftModel`."""
        weights = kwargs.pop("routing_weights", None)
        if weights is None:
            return super().forward(*args, **kwargs)
        with self._explicit_routing(*args, routing_weights=weights, **kwargs):
            return super().forward(*args, **kwargs)

    @contextmanager
    def _explicit_routing(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Route the calls made inside by `kwargs["routing_weights"]`; used by `_enable_peft_forward_hooks`."""
        weights, expand = kwargs["routing_weights"], False
        if isinstance(weights, GenerationWeights):
            weights, expand = weights.weights, True
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(f"routing_weights and {name} cannot be combined. Pass only one of them.")
        layers = self._adapted_layers()
        active = next(iter(layers.values())).active_adapters if layers else []
        _check_explicit(weights, active)
        _refuse_unroutable(layers)
        held = {name for layer in layers.values() for name in (*layer.lora_A, *layer.lora_embedding_A)}
        if not held.issuperset(active):
            unknown = [name for name in active if name not in held]
            raise ValueError(
                f"The active adapters {unknown} have no LoRA weights in this model, which holds {sorted(held)}. "
                "Activate adapters that it holds with base_model.set_adapter([...])."
            )

        context = self._routing_context()
        temporary = self._hook_model(context) if context.router is None else []
        context.set_explicit(weights, expand)
        try:
            yield
        finally:
            context.set_explicit(None)
            for handle in temporary:
                handle.remove()
            if temporary:
                context.unwatch_checkpoints()

    # -- routers -----------------------------------------------------------------------------------------------------

    def attach_router(
        self,
        router: Optional[Union[RouterConfig, nn.Module, GateFactory]] = None,
        *,
        experts: Optional[Sequence[str]] = None,
        config: Optional[RouterConfig] = None,
    ) -> Router:
        """Let a learned router weigh LoRA adapters for each token, in one pass of the base model.

        The experts become the active adapters. While the router is attached and its experts are active, every forward
        is routed; in training the router's losses are added to `outputs.loss`.

        Args:
            router: a [`RouterConfig`]; or a module that maps hidden states `[..., in_features]` to logits
                `[..., num_experts]`, used at every site; or a function `(site, num_experts) -> module`.
            experts: names of the adapters to mix, in the order of the router's columns; by default the active ones.
            config: the [`RouterConfig`] to go with a module or function.

        Returns:
            The attached [`Router`], registered as a submodule so that optimizers see it.

        Raises:
            ValueError: an unknown expert, an adapter that cannot be routed, an option that would be ignored, or a router
                is attached already.
        """
        if isinstance(router, RouterConfig):
            if config is not None:
                raise ValueError("Two RouterConfigs were passed. Pass one; config goes with a module or function.")
            router, config = None, router
        experts = self._active_experts() if experts is None else experts
        return self._attach(router, RouterConfig() if config is None else config, list(experts), initialise=True)

    def _attach(
        self,
        gate: Optional[Union[nn.Module, GateFactory]],
        config: RouterConfig,
        experts: list[str],
        *,
        initialise: bool,
    ) -> Router:
        """Make and install a router; without `initialise`, its weights are to be loaded, so init="experts" can wait."""
        if self._router_of() is not None:
            raise ValueError("A router is already attached. Call detach_router() first.")
        unknown = [name for name in experts if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Unknown experts {unknown}; this model holds the adapters {list(self.peft_config)}.")
        if len(set(experts)) != len(experts):
            raise ValueError(f"Each expert can be mixed once, got {experts}.")
        config.check_num_experts(len(experts))
        self._activate_keeping_gradients(experts)

        sites = find_sites(self.model, self._layers_with(experts), config)
        router = Router(config, experts, sites, gate=gate)
        for site in sites:
            _place_gate(router, site)
        if initialise and config.init == "experts":
            router.point_at_experts(sites)
        self._install(router, sites)
        return router

    def detach_router(self) -> Router:
        """Remove the router and all its hooks; the adapters stay as they are. Returns the router."""
        router = self._router_of()
        if router is None:
            raise ValueError("No router is attached.")
        context = self._routing_context()
        for handle in self._router_hooks:
            handle.remove()
        self._router_hooks = []
        context.unwatch_checkpoints()
        context.router = None
        context.forget_statistics()
        for layer in self._adapted_layers().values():
            if layer.routing_port is not None:
                layer.routing_port.decide_at(None)
        delattr(self, ROUTER_ATTRIBUTE)
        return router

    def routing_summary(self) -> dict[str, dict]:
        """Usage, entropy and balance of each gate in the last forward; see [`moe_losses.summarize`]."""
        context = self._routing_context()
        if self._router_of() is None:
            raise ValueError("No router is attached, so there is nothing to summarise. Call attach_router first.")
        return summarize(context.statistics, self._router_of().expert_names)

    def routing_losses(self) -> dict[str, torch.Tensor]:
        """The router's losses of the last forward by name, detached; empty before the first."""
        statistics = self._routing_context().statistics
        return router_losses(statistics) if statistics else {}

    @contextmanager
    def record_routing(self) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Collect the weights of every forward made inside: for each site a list of `[batch, seq, num_experts]`."""
        context = self._routing_context()
        if context.records is not None:
            raise ValueError("record_routing is already active.")
        context.records = {}
        try:
            yield context.records
        finally:
            context.records = None

    def save_router(self, save_directory: str, state_dict: Optional[dict[str, torch.Tensor]] = None) -> None:
        """Write the attached router: `router_config.json` and `router_model.safetensors`, each whole or not at all.

        Args:
            state_dict: the model's, gathered, where its parameters are sharded.
        """
        router = self._router_of()
        if router is None:
            raise ValueError("No router is attached, so there is none to save.")
        gathered = {
            key.rpartition(f"{ROUTER_ATTRIBUTE}.")[2]: value
            for key, value in (state_dict or {}).items()
            if f"{ROUTER_ATTRIBUTE}." in key
        }
        # A module that serves all sites has a name for each; its tensors are written once.
        names = {name for name, _ in (*router.named_parameters(), *router.named_buffers())}
        tensors = {
            name: value.contiguous() for name, value in (gathered or router.state_dict()).items() if name in names
        }
        os.makedirs(save_directory, exist_ok=True)
        weights_path = os.path.join(save_directory, ROUTER_WEIGHTS_NAME)
        save_file(tensors, weights_path + ".partial", metadata={"format": "pt"})
        os.replace(weights_path + ".partial", weights_path)
        config_path = os.path.join(save_directory, ROUTER_CONFIG_NAME)
        with open(config_path + ".partial", "w") as file:
            json.dump({"expert_names": router.expert_names, "router": router.config.to_dict()}, file, indent=2)
        os.replace(config_path + ".partial", config_path)

    def load_router(self, directory: str, gate: Optional[Union[nn.Module, GateFactory]] = None) -> Router:
        """Attach the router that [`save_router`] wrote; its experts must be loaded. `gate` as in [`attach_router`].

        Raises:
            ValueError: the folder is not one that `save_router` wrote, or its router is not for this model's adapters.
        """
        for name in (ROUTER_CONFIG_NAME, ROUTER_WEIGHTS_NAME):
            if not os.path.isfile(os.path.join(directory, name)):
                raise ValueError(f"'{directory}' holds no {name}; pass a folder that save_router wrote.")
        try:
            with open(os.path.join(directory, ROUTER_CONFIG_NAME)) as file:
                saved = json.load(file)
            config, experts = RouterConfig(**saved["router"]), saved["expert_names"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{ROUTER_CONFIG_NAME} in '{directory}' is damaged, or was written by another version: {error!r}. Save "
                "the router again."
            ) from error
        router = self._attach(gate, config, experts, initialise=False)
        try:
            load_model(router, os.path.join(directory, ROUTER_WEIGHTS_NAME))
        except (RuntimeError, SafetensorError) as error:
            self.detach_router()
            raise ValueError(
                f"The router in '{directory}' does not fit these adapters, or its file is damaged: {error}. Load the "
                "adapters it was saved with, and pass the same kind of gate."
            ) from error
        return router

    def export_expert(self, name: str, save_directory: str) -> None:
        """Write one adapter as a plain LoRA that stock PEFT loads: `adapter_config.json`, `adapter_model.safetensors`.

        Raises:
            ValueError: there is no LoRA adapter of that name.
        """
        from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType, get_peft_model_state_dict
        from peft.utils.save_and_load import _validate_lora_adapter_state_dict

        config = self.peft_config.get(name)
        if config is None or config.peft_type != PeftType.LORA:
            held = [key for key, value in self.peft_config.items() if value.peft_type == PeftType.LORA]
            raise ValueError(f"There is no LoRA adapter '{name}' to export; this model holds {held}.")
        os.makedirs(save_directory, exist_ok=True)
        # PEFT leaves out every weight with the name of another adapter in its path, also where that is a module's name,
        # as numbers are names of layers: it gets the weights of one adapter, and shall know of no other.
        others, adapters = self.peft_config.keys() - {name}, self.peft_config
        weights = {k: v for k, v in self.state_dict().items() if not any(is_of_adapter(k, other) for other in others)}
        try:
            self.peft_config = {name: config}
            state_dict = get_peft_model_state_dict(self, state_dict=weights, adapter_name=name)
        finally:
            self.peft_config = adapters
        _validate_lora_adapter_state_dict(state_dict, name)  # left out above for weights that are given
        tensors = {f"base_model.{key}": value.detach().contiguous() for key, value in state_dict.items()}
        path = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
        save_file(tensors, path + ".partial", metadata={"format": "pt"})
        os.replace(path + ".partial", path)
        exported = copy.deepcopy(config)
        exported.inference_mode = True
        exported.base_model_name_or_path = self.model.__dict__.get("name_or_path") or None
        exported.save_pretrained(save_directory)

    def freeze_routing(
        self, weights: Optional[Sequence[float]] = None, *, adapter_name: str = "frozen", **inputs: Any
    ) -> str:
        """Fix the routing and add it to the model as one plain LoRA adapter; see [`moe_freeze.freeze_routing`]."""
        return freeze_routing(self, weights, adapter_name=adapter_name, **inputs)

    # -- what routing changes in LoraModel ---------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        router = self._router_of()
        layers = self._adapted_layers()
        if router is not None and any(
            self._routing_context().mixes(layer.active_adapters) for layer in layers.values()
        ):
            raise ValueError(
                "A routed model cannot be merged: its weights differ for each token. Fix them first, with "
                "freeze_routing(...), and merge the adapter that gives; or export single experts."
            )
        super()._check_merge_allowed()

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any):
        if merge:
            self._check_merge_allowed()
        if self._router_of() is not None:
            self.detach_router()
        return super()._unload_and_optionally_merge(merge=merge, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._adopt_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        router = self._router_of()
        if router is not None and adapter_name in router.expert_names:
            raise ValueError(
                f"Adapter '{adapter_name}' is an expert of the attached router. Call detach_router() first; a mixture "
                "made by MoELoraConfig can drop it with delete_expert."
            )
        super().delete_adapter(adapter_name)

    def _adopt_layers(self) -> None:
        """Give layers that were created after the router was attached, or after the first routed call, their port."""
        if "_moe_context" in self.__dict__:
            context = self._routing_context()
            for name, layer in self._adapted_layers().items():
                if layer.routing_port is None:
                    layer.routing_port = RoutingPort(context, name)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # A router belongs to the mixture, never to one of its adapters.
        return {key: value for key, value in selected.items() if f"{ROUTER_ATTRIBUTE}." not in key}

    # -- internals ---------------------------------------------------------------------------------------------------

    def _router_of(self) -> Optional[Router]:
        return self._modules.get(ROUTER_ATTRIBUTE)

    def _routing_context(self) -> RoutingContext:
        if "_moe_context" not in self.__dict__:
            self.__dict__["_moe_context"] = RoutingContext()
            self.__dict__["_router_hooks"] = []
            self._adopt_layers()
        return self.__dict__["_moe_context"]

    def _adapted_layers(self) -> dict[str, nn.Module]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, RoutedLayerMixin)}

    def _layers_with(self, experts: Sequence[str]) -> dict[str, nn.Module]:
        layers = {
            name: layer
            for name, layer in self._adapted_layers().items()
            if any(expert in layer.lora_A or expert in layer.lora_embedding_A for expert in experts)
        }
        _refuse_unroutable(layers)
        return layers

    def _active_experts(self) -> list[str]:
        return list(self.active_adapters)

    def _activate_keeping_gradients(self, names: list[str]) -> None:
        """Make adapters active without touching what trains (`set_adapter` makes every active adapter trainable)."""
        trains = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.set_adapter(names)
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)

    def _install(self, router: Router, sites: list[RouterSite]) -> None:
        """Register the router, tell each layer its site, and hook the model and the blocks that hold a gate."""
        context = self._routing_context()
        self.add_module(ROUTER_ATTRIBUTE, router)
        router.train(self.training)
        context.router = router
        self._router_hooks = self._hook_model(context)
        for site in sites:
            for layer in site.layers.values():
                layer.routing_port.decide_at(site.name)
            if site.module is self.model or isinstance(site.module, RoutedLayerMixin):
                continue
            enter = partial(context.enter_block, site.name)
            self._router_hooks.append(site.module.register_forward_pre_hook(enter, with_kwargs=True))
            if router.config.scope == "block":
                leave = partial(context.leave_block, site.name)
                self._router_hooks.append(site.module.register_forward_hook(leave, always_call=True))

    def _rebuild_router(self, router: Router) -> None:
        """Attach the router anew after its experts changed: sites without experts lose their gate, new ones get one"""
        self.detach_router()
        sites = find_sites(self.model, self._layers_with(router.expert_names), router.config)
        router.rebuild(sites)
        for site in sites:
            _place_gate(router, site)
        self._install(router, sites)

    def _hook_model(self, context: RoutingContext) -> list:
        handles = []
        entrances = [self.model]
        backbone = getattr(self.model, "base_model", None)
        if isinstance(backbone, nn.Module) and backbone is not self.model:
            entrances.append(backbone)
        if is_encoder_decoder(self.model):
            encoder = self.model.get_encoder()  # `generate` calls it alone
            handles.append(encoder.register_forward_hook(context.leave_encoder))
            entrances.append(encoder)
        for module in entrances:
            handles.append(module.register_forward_pre_hook(context.begin, with_kwargs=True))
            handles.append(module.register_forward_hook(context.end, with_kwargs=True, always_call=True))
        return handles


def _refuse_unroutable(layers: dict[str, nn.Module]) -> None:
    """Raise a `ValueError` that names the first of these layers that cannot be routed, and the modules that can."""
    reasons = {name: reason for name, layer in layers.items() if (reason := why_unroutable(layer))}
    if reasons:
        name, reason = next(iter(reasons.items()))
        modules = sorted({other.rpartition(".")[2] for other in layers if other not in reasons})
        advice = f" The other modules can be routed: target_modules={modules}." if modules else ""
        raise ValueError(f"'{name}' cannot be routed. {reason}{advice}")


def _place_gate(router: Router, site: RouterSite) -> None:
    """Move a gate to the device of the layers it serves.

    The library's own gates are float32 whatever the base model's dtype, as adapters are; float64 for float64 models.
    """
    layer = next(iter(site.layers.values()))
    reference = next(layer.parameters(), None)
    gate = router.gates[gate_key(site.name)]
    if reference is None or reference.is_meta or any(parameter.is_meta for parameter in gate.parameters()):
        return
    gate.to(reference.device)
    if router.built_in and reference.dtype == torch.float64:
        gate.double()


def _check_explicit(weights: Any, active: Sequence[str]) -> None:
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, torch.Tensor) else type(weights).__name__
        raise ValueError(f"routing_weights must be a floating-point tensor, got {got}.")
    if not 1 <= weights.dim() <= 3:
        raise ValueError(
            f"routing_weights has shape {tuple(weights.shape)}, but must be [num_experts], [batch, num_experts] or "
            "[batch, seq, num_experts]."
        )
    if weights.shape[-1] != len(active):
        raise ValueError(
            f"routing_weights has {weights.shape[-1]} columns but {len(active)} adapters are active ({list(active)}). "
            "Pass one column for each active adapter, in that order; base_model.set_adapter([...]) activates several."
        )


class GenerationWeights(NamedTuple):
    """Explicit weights for `generate`: their rows are repeated as often as it repeats its inputs."""

    weights: torch.Tensor
