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
"""Finds the places of a model at which a router can look: its adapted layers and its decoder blocks."""

from __future__ import annotations

import re

from torch import nn

from .moe_context import MODEL_SITE
from .moe_router import RouterConfig, RouterSite


def find_sites(model: nn.Module, layers: dict[str, nn.Module], config: RouterConfig) -> list[RouterSite]:
    """The sites of a router of the given scope, in the order of the model.

    Args:
        model: the base model.
        layers: the LoRA layers that hold experts, by their name in the model.
        config: the router's config; its scope decides what a site is.

    Raises:
        ValueError: the model has no decoder blocks or no such block, or a layer cannot be gated.
    """
    if config.scope == "layer":
        return [_layer_site(name, layer) for name, layer in layers.items()]
    blocks = _blocks_by_name(model, layers)
    if config.scope == "block":
        inside: dict[str, dict[str, nn.Module]] = {}
        for name, layer in layers.items():
            inside.setdefault(_block_of(name) or name, {})[name] = layer
        return [
            RouterSite(name, hidden_size(model), model.get_submodule(name), members)
            if name in blocks
            else _layer_site(name, layers[name])
            for name, members in inside.items()
        ]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"Router scope '{config.scope}' needs one stack of blocks, but {type(model).__name__} is an "
            "encoder-decoder. Use scope 'layer' or 'block'."
        )
    if config.scope == "two_pass":
        return [RouterSite(MODEL_SITE, hidden_size(model), model, layers)]
    name = _chosen_block(model, blocks, config.block)
    return [RouterSite(MODEL_SITE, hidden_size(model), model.get_submodule(name), layers)]


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden states between decoder blocks."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "n_embd", "d_model"):
        if getattr(text, name, None) is not None:
            return getattr(text, name)
    raise ValueError(
        f"Cannot tell the hidden size of {type(model).__name__} from its config. Use router scope 'layer', which "
        "looks at the input of each adapted layer."
    )


def _layer_site(name: str, layer: nn.Module) -> RouterSite:
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in layer.lora_A.values()):
        raise ValueError(
            f"Layer '{name}' is a convolution, whose input positions are not its output positions, so it cannot gate "
            "on its own input. Use router scope 'block' or 'model', or exclude it from target_modules."
        )
    features = layer.out_features if len(layer.lora_embedding_A) else layer.in_features
    return RouterSite(name, features, layer, {name: layer})


def _block_of(name: str) -> str | None:
    """`model.layers.3.self_attn.q_proj` lies in the block `model.layers.3`."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else None


def _blocks_by_name(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    blocks = {block for block in map(_block_of, layers) if block is not None}
    if not blocks:
        raise ValueError(
            f"None of the adapted layers of {type(model).__name__} lies in a numbered decoder block (such as "
            "'model.layers.0'). Use router scope 'layer'."
        )
    return blocks


def _chosen_block(model: nn.Module, blocks: set[str], index: int | None) -> str:
    stacks = {name.rsplit(".", 1)[0] for name in blocks}
    if len(stacks) > 1:
        raise ValueError(
            f"Router scope 'model' needs one stack of decoder blocks, but adapted layers lie in {sorted(stacks)}. Use "
            "scope 'layer' or 'block'."
        )
    (stack,) = stacks
    count = len(model.get_submodule(stack))
    index = count // 4 if index is None else index
    if not 0 <= index < count:
        raise ValueError(f"block is {index}, but '{stack}' has blocks 0 to {count - 1}.")
    return f"{stack}.{index}"
