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
"""Carries the weights of a forward pass to the layers, and what the gates measured back to the loss.

A [`RoutingContext`] belongs to one model. While the model runs, a [`Frame`] holds what layers need: weights that were
decided outside of them (explicit ones, a block's or the model's gate), the mask of real tokens, and the statistics of
the gates that ran. Every LoRA layer holds a [`RoutingPort`] through which it asks for the weights of its tokens.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, Union

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .moe_checkpoint import RoutedCheckpoint
from .moe_frame import Frame, input_shape
from .moe_layer import OwnGate, fit_to_tokens
from .moe_losses import CarryLoss, gate_statistics, report_losses, router_losses
from .moe_router import Gate, Router, gate_key
from .moe_selection import Routing


EXPLICIT = "routing_weights"
MODEL_SITE = "model"
# In eval, logits of at most so many elements are kept and measured when somebody asks; 256 KiB a gate.
KEPT_LOGITS = 2**16


class RoutingPort:
    """A LoRA layer's access to the routing of its model: the context, and the site that decides for this layer."""

    def __init__(self, context: RoutingContext, layer_name: str) -> None:
        self.context = context
        self.layer_name = layer_name
        self.site: Optional[str] = None  # set while a router is attached
        self._scores_own_gate: Optional[bool] = None

    def decide_at(self, site: Optional[str]) -> None:
        """Take the weights from this site of the router from now on; None while there is no router."""
        self.site, self._scores_own_gate = site, None

    def weights_for(self, layer: nn.Module, x: torch.Tensor) -> Union[torch.Tensor, OwnGate, None]:
        """Weights of the layer's tokens, columns as in `layer.active_adapters`; None if the layer is not routed.

        A linear layer gets its own gate instead, to be scored along with its experts.
        """
        if layer.disable_adapters:
            return None
        context, frame = self.context, self.context.frame
        if EXPLICIT in frame.weights:
            return context.fit_explicit(frame, x, embedding=len(layer.lora_embedding_A) > 0, where=self.layer_name)
        if self.site is None or not context.mixes(layer.active_adapters):
            return None
        if self.site == self.layer_name:
            gate = context.router.gates[gate_key(self.site)]
            if self._scores_own_gate is None:
                self._scores_own_gate = type(gate) is Gate and _multiplies_linearly(layer)
            if self._scores_own_gate and not gate.must_be_called:
                return OwnGate(gate.weight, partial(self._weights_of_scores, layer, gate, x))
            weights = context.decide(self.site, _gate_input(layer, x))
        elif not self.is_decided:  # before the block at which a model-scope router looks
            return x.new_zeros(len(layer.active_adapters), dtype=torch.float32)
        elif frame.reads_encoder(x):  # the block decided for its own tokens, and only they are measured
            weights = context.router(self.site, x)[1].weights
        else:
            weights = frame.kept(frame.weights[self.site].to(x.device), x)
        return context.in_order_of(layer.active_adapters, weights)

    def _weights_of_scores(self, layer: nn.Module, gate: Gate, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        weights = self.context.weigh(self.site, gate.logits_of(scores), x)
        return self.context.in_order_of(layer.active_adapters, weights)

    @property
    def kept_experts(self) -> Optional[int]:
        """How many experts the router keeps for a token; None if that is not fixed or others decide."""
        if self.site is None or EXPLICIT in self.context.frame.weights:
            return None
        return self.context.router.kept_experts

    @property
    def is_decided(self) -> bool:
        """Whether a layer that runs now gets weights from the router: from its own gate, or from one before it."""
        return self.site == self.layer_name or self.site in self.context.frame.weights


def _multiplies_linearly(layer: nn.Module) -> bool:
    return isinstance(next(iter(layer.lora_A.values()), None), nn.Linear)


def _gate_input(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer.base_layer(x) if len(layer.lora_embedding_A) else x


class RoutingContext:
    """The routing of one model: its router, if attached, and the frames of the forward that is running."""

    def __init__(self) -> None:
        self.router: Optional[Router] = None
        self.explicit: Optional[torch.Tensor] = None
        self.expand = False
        self.owner: Optional[nn.Module] = None
        self.frames: list[Frame] = [Frame()]
        self._statistics: dict[str, torch.Tensor] = {}
        self._kept_logits: list[tuple[str, torch.Tensor, Optional[torch.Tensor]]] = []
        self.records: Optional[dict[str, list[torch.Tensor]]] = None
        self.checkpoints: list[nn.Module] = []

    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    @property
    def running(self) -> bool:
        """Whether the model is in its forward, as opposed to a block being recomputed for its backward."""
        return self.owner is not None

    # -- decisions ---------------------------------------------------------------------------------------------------

    def mixes(self, active_adapters: list[str]) -> bool:
        """Whether the router applies: all its experts are active. A single other adapter runs as plain LoRA."""
        if self.router is None:
            return False
        experts = self.router.expert_names
        if active_adapters == experts or set(active_adapters) == set(experts):
            return True
        if len(active_adapters) <= 1:
            return False
        raise ValueError(
            f"The router mixes {experts} but the active adapters are {list(active_adapters)}. Activate all experts "
            "with set_adapter, a single adapter to run it alone, or call detach_router()."
        )

    def in_order_of(self, active_adapters: list[str], weights: torch.Tensor) -> torch.Tensor:
        experts = self.router.expert_names
        if active_adapters == experts:
            return weights
        return torch.stack([weights[..., experts.index(name)] for name in active_adapters], dim=-1)

    def decide(self, site: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the gate of a site, measure it, and return the weights `[..., num_experts]`."""
        logits, routing = self.router(site, hidden_states)
        self._count(site, logits, routing, hidden_states)
        return routing.weights

    def weigh(self, site: str, logits: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The same, for logits that a layer made of these hidden states."""
        routing = self.router.select(site, logits, training=self.router.training)
        self._count(site, logits, routing, hidden_states)
        return routing.weights

    def _count(self, site: str, logits: torch.Tensor, routing: Routing, hidden_states: torch.Tensor) -> None:
        if self.running or len(self.frames) > 1:
            mask = self.frame.mask_for(hidden_states)
            if self.router.training or logits.numel() > KEPT_LOGITS:
                self.frame.count(site, gate_statistics(logits, routing, mask))
            else:
                self.frame.kept_logits.append((site, logits.detach(), mask))
        if self.records is not None and self.running:
            self.records.setdefault(site, []).append(routing.weights.detach())

    @property
    def statistics(self) -> dict[str, torch.Tensor]:
        """What the gates of the last forward measured, by site; see [`moe_losses.gate_statistics`]."""
        for site, logits, mask in self._kept_logits:
            vector = gate_statistics(logits, self.router.select(site, logits, training=False), mask)
            held = self._statistics.get(site)
            self._statistics[site] = vector if held is None else held + vector
        self._kept_logits = []
        return self._statistics

    def forget_statistics(self) -> None:
        self._statistics, self._kept_logits = {}, []

    def fit_explicit(self, frame: Frame, x: torch.Tensor, *, embedding: bool, where: str) -> torch.Tensor:
        weights = frame.weights[EXPLICIT].to(x.device)
        if weights.dim() == 3 and not embedding:
            weights = frame.kept(weights, x)
        batch = x.shape[0]
        if weights.dim() == 2 and x.dim() == 2 and not embedding and frame.num_tokens is not None:
            if batch not in (len(weights), frame.num_tokens):
                raise ValueError(
                    f"routing_weights of shape {tuple(weights.shape)} cannot be matched to the {batch} tokens that "
                    f"enter '{where}': the model selects or adds tokens before it (this call has {frame.num_tokens}). "
                    "Pass [num_experts], or leave this layer out of target_modules."
                )
        if frame.expand and weights.dim() == 2 and batch != len(weights) and batch % len(weights) == 0:
            weights = weights.repeat_interleave(batch // len(weights), dim=0)
        if weights.dim() == 3 and (x.dim() == 2 or embedding):
            # report here, where the layer's name is known
            fit_to_tokens(weights, tuple(x.shape if embedding else x.shape[:-1]), where=f"input of '{where}'")
        return weights

    # -- the forward of the model ------------------------------------------------------------------------------------

    def set_explicit(self, weights: Optional[torch.Tensor], expand: bool = False) -> None:
        """Route by these weights until called again: every forward of the model, and what runs between two of them,
        such as the encoder that `generate` calls by itself."""
        self.explicit, self.expand = weights, expand
        self.frames, self.owner = [self._frame_between_forwards()], None

    def _frame_between_forwards(self) -> Frame:
        frame = Frame(expand=self.expand)
        if self.explicit is not None:
            frame.weights[EXPLICIT] = self.explicit
        return frame

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of base model, backbone and encoder: whichever is called first opens the frame."""
        if self.owner is not None and self.owner is not model:
            return
        self.owner = model
        self.forget_statistics()
        given = _named_arguments(model, args, kwargs)
        frame = Frame(given, expand=self.expand, encoder_decoder=is_encoder_decoder(model))
        if self.explicit is not None:
            self._check_fits_input(input_shape(given), given)
            frame.weights[EXPLICIT] = self.explicit
        self.frames = [Frame(), frame]
        if torch.is_grad_enabled() and model.training:
            self._watch_checkpoints(model)
        if self.explicit is None and self.router is not None and self.router.config.scope == "two_pass":
            frame.weights[MODEL_SITE] = self._first_pass(model, given)

    def end(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the same, called also when the forward raised: closes the frame, adds the losses."""
        if self.owner is not model:
            return output
        frame, self.frames, self.owner = self.frame, [self._frame_between_forwards()], None
        if output is None:
            return output
        self._statistics = {site: vector.detach() for site, vector in frame.statistics.items()}
        self._kept_logits = frame.kept_logits
        if not frame.statistics or not (model.training and torch.is_grad_enabled()):
            return output
        self._check_differentiable(frame.statistics)
        return self._add_losses(model, output, frame.statistics, _named_arguments(model, args, kwargs))

    def leave_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the encoder of an encoder-decoder model: from here on, the decoder's tokens run."""
        self.frame.encoder_states = output[0]

    def enter_block(self, site: str, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a block with a gate: decides for the layers inside (scope "model": from here on)."""
        if EXPLICIT in self.frame.weights or not self._block_is_routed(block):
            return
        hidden_states = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden_states, torch.Tensor):
            raise ValueError(  # noqa: TRY004 the model is at fault, not a type that the caller passed
                f"Block '{site}' ({type(block).__name__}) does not take its hidden states as first argument, so its "
                "gate has nothing to look at. Use router scope 'layer' for this model."
            )
        self.frame.weights[site] = self.decide(site, hidden_states)

    def leave_block(self, site: str, block: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of a block, called also when it raised."""
        self.frame.weights.pop(site, None)

    def _block_is_routed(self, block: nn.Module) -> bool:
        layer = next((m for m in block.modules() if getattr(m, "routing_port", None) is not None), None)
        return layer is None or (not layer.disable_adapters and self.mixes(layer.active_adapters))

    def _first_pass(self, model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
        """Scope "two_pass": the hidden states of the base model without adapters, then the gate."""
        cache = given.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "A two_pass router cannot use the KV cache: the keys of its first pass are not in it. Pass "
                "use_cache=False, or use router scope 'layer', 'block' or 'model'."
            )
        backbone = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, model.base_model_prefix)
        inputs = {key: given[key] for key in FIRST_PASS_INPUTS if given.get(key) is not None}
        layers = [m for m in model.modules() if getattr(m, "routing_port", None) is not None]
        if not layers or layers[0].disable_adapters or not self.mixes(layers[0].active_adapters):
            return torch.zeros(len(self.router.expert_names))
        try:
            self.owner = self  # the hooks of what runs now have nothing to do, also where backbone and model are one
            for layer in layers:
                layer._disable_adapters = True
            with torch.no_grad():
                hidden_states = backbone(**inputs, use_cache=False).last_hidden_state
        finally:
            self.owner = model
            for layer in layers:
                layer._disable_adapters = False
        return self.decide(MODEL_SITE, hidden_states)

    def _check_fits_input(self, tokens: Optional[tuple[int, ...]], given: dict[str, Any]) -> None:
        weights = self.explicit
        if tokens is None or weights.dim() == 1 or self.expand:
            return
        if given.get("decoder_input_ids") is not None and weights.dim() == 3:
            return  # encoder and decoder differ in length: each layer checks for itself
        if tuple(weights.shape[:-1]) != tokens[: weights.dim() - 1]:
            raise ValueError(
                f"routing_weights of shape {tuple(weights.shape)} does not fit an input of batch {tokens[0]}"
                + (f" and sequence length {tokens[1]}" if len(tokens) > 1 else "")
                + ". Pass [num_experts], [batch, num_experts] or [batch, seq, num_experts]."
            )

    # -- losses ------------------------------------------------------------------------------------------------------

    def _check_differentiable(self, statistics: dict[str, torch.Tensor]) -> None:
        trains = any(parameter.requires_grad for parameter in self.router.parameters())
        if trains and not all(vector.requires_grad for vector in statistics.values()):
            raise RuntimeError(
                "The router trains but its gates ran without gradients, so its losses would be silently wrong. The "
                "model recomputes its blocks in a way that is not known here; use "
                "model.gradient_checkpointing_enable() of transformers."
            )

    def _add_losses(
        self, model: nn.Module, output: Any, statistics: dict[str, torch.Tensor], given: dict[str, Any]
    ) -> Any:
        losses = router_losses(statistics)
        config = self.router.config
        total = (
            config.balance_coef * losses["router_balance_loss"]
            + config.z_coef * losses["router_z_loss"]
            + config.entropy_coef * losses["router_entropy"]
        )
        total = total * _share_of_batch(model, given)
        if isinstance(output, dict):
            if output.get("loss") is not None:
                output["loss"] = output["loss"] + total.to(output["loss"].device)
            log_probs = output.get("log_probs")
            if isinstance(log_probs, torch.Tensor):
                output["log_probs"] = CarryLoss.apply(log_probs, output.get("label_mask"), total.to(log_probs.device))
            output = report_losses(output, losses)
        elif isinstance(output, tuple) and given.get("labels") is not None:
            output = (output[0] + total.to(output[0].device), *output[1:])
        return output

    # -- gradient checkpointing --------------------------------------------------------------------------------------

    def _watch_checkpoints(self, model: nn.Module) -> None:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                function = getattr(module, "_gradient_checkpointing_func", None)
                if function is not None and not isinstance(function, RoutedCheckpoint):
                    module._gradient_checkpointing_func = RoutedCheckpoint(function, self)
                    self.checkpoints.append(module)

    def unwatch_checkpoints(self) -> None:
        for module in self.checkpoints:
            if isinstance(module._gradient_checkpointing_func, RoutedCheckpoint):
                module._gradient_checkpointing_func = module._gradient_checkpointing_func.function
        self.checkpoints = []

    @contextmanager
    def within(self, frame: Frame):
        self.frames.append(frame)
        try:
            yield frame
        finally:
            self.frames.pop()


# -- reading the arguments of a forward ------------------------------------------------------------------------------

FIRST_PASS_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def _named_arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    return {**dict(zip(names, args)), **kwargs}


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _share_of_batch(model: nn.Module, given: dict[str, Any]) -> Any:
    """This call's share of an accumulated batch, so that the losses of its micro-batches add up to one mean.

    transformers' Trainer passes `num_items_in_batch`, the labels of all micro-batches of a step together, and then
    does not divide the loss by the accumulation steps. Labels are counted as it counts them: a loss that shifts its
    labels never predicts the first.
    """
    num_items, labels, shifted = (given.get(key) for key in ("num_items_in_batch", "labels", "shift_labels"))
    if num_items is None or not isinstance(labels, torch.Tensor):
        return 1.0
    if isinstance(shifted, torch.Tensor):
        labels = shifted
    elif LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not is_encoder_decoder(model):
        labels = labels[..., 1:]
    return (labels != -100).sum() / num_items
