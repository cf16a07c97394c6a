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
"""Single adapted layers, and the slow truths that routed layers are compared with: plain loops, and stock PEFT."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer


# float64: only the order in which the sums are taken differs (eps 2e-16, a few dozen terms of order one).
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# What a mixture may differ in: rank, alpha, how the rank scales. The ranks are even because a convolution of two groups
# needs that.
EXPERTS = {
    "one": {"r": 2, "lora_alpha": 4},
    "two": {"r": 4, "lora_alpha": 2},
    "three": {"r": 2, "lora_alpha": 3, "use_rslora": True},
}
# name: (base layer, input of a batch of two)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "transformers Conv1D": (lambda: Conv1D(4, 5), (2, 3, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), (2, 3)),
    "padded embedding": (lambda: nn.Embedding(7, 4, padding_idx=1), (2, 3)),
    "scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(7, 4, padding_idx=0, embed_scale=3.0), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 6)),
    "conv1d of same padding": (lambda: nn.Conv1d(3, 4, 3, padding="same"), (2, 3, 6)),
    "conv1d of two groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 4, 5)),
    "conv2d of two groups": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, padding=1), (2, 4, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), (2, 3, 3, 4, 2)),
    "conv3d of two groups": (lambda: nn.Conv3d(2, 4, 2, groups=2), (2, 2, 3, 2, 2)),
}


def adapted(base_layer: nn.Module, experts: dict[str, dict], *, dtype=torch.float64, seed: int = 0) -> nn.Module:
    """The LoRA layer around `base_layer` that holds these experts (random, all active), in eval mode."""
    return adapted_model(base_layer, experts, dtype=dtype, seed=seed).base_model.model.layer


def adapted_model(base_layer: nn.Module, experts: dict[str, dict], *, dtype=torch.float64, seed: int = 0):
    """A PEFT model of the one layer `layer`."""

    class OneLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = base_layer

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(seed)
    for parameter in base_layer.parameters():  # also those that are initialised to zero, such as biases
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.5)
    names = list(experts)
    model = OneLayer().to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1.*|.*has no bias.*")
        model = get_peft_model(model, _config(base_layer, experts[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, _config(base_layer, experts[name]))
    model.base_model.set_adapter(names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.5)
    return model.eval()


def with_experts(base: nn.Module, experts: dict[str, dict], **common):
    """A PEFT model on `base` with these experts, all active, in eval mode; `common` are arguments of every expert."""
    common = {"init_lora_weights": False, "task_type": "CAUSAL_LM", **common}
    torch.manual_seed(1)
    names = list(experts)
    model = get_peft_model(base, LoraConfig(**{**common, **experts[names[0]]}), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**{**common, **experts[name]}))
    model.base_model.set_adapter(names)
    return model.eval()


@contextmanager
def looped(model: nn.Module, weights: torch.Tensor):
    """Let every LoRA layer of a model compute the plain loop over tokens and experts."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.forward = partial(token_loop, layer, weights=weights)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _config(base_layer: nn.Module, expert: dict) -> LoraConfig:
    return LoraConfig(target_modules=["layer"], fan_in_fan_out=isinstance(base_layer, Conv1D), **expert)


def example(kind: str, experts: dict[str, dict] = EXPERTS, **arguments) -> tuple[nn.Module, torch.Tensor]:
    """The adapted layer of a kind listed in `LAYERS`, in float64, and an input for it."""
    make, shape = LAYERS[kind]
    layer = adapted(make(), experts, **arguments)
    generator = torch.Generator().manual_seed(11)
    if "embedding" in kind:
        return layer, torch.randint(0, 7, shape, generator=generator)
    return layer, torch.randn(shape, generator=generator, dtype=torch.float64)


def token_shape(layer: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    """What `routing_weights` count as tokens: positions, for a convolution those of its output."""
    if len(layer.lora_embedding_A):
        return tuple(x.shape)
    if is_convolution(layer):
        with torch.no_grad():
            return (x.shape[0], layer.base_layer(x)[0, 0].numel())
    return tuple(x.shape[:-1])


def is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer.get_base_layer(), nn.modules.conv._ConvNd)


def random_weights(*shape: int, seed: int = 7, dtype=torch.float64) -> torch.Tensor:
    """Weights of either sign that do not sum to one."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spread(weights: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    """`[*tokens, num_experts]`: every token's own row, written out."""
    num_experts = weights.shape[-1]
    if weights.dim() == 1:
        return weights.expand(*tokens, num_experts)
    if weights.dim() == 2 and len(tokens) == 2:
        return torch.stack([row.expand(tokens[1], num_experts) for row in weights])
    return weights.reshape(*tokens, num_experts)


def scaling_of(layer: nn.Module, name: str) -> float:
    rank = layer.r[name]
    return layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora[name] else rank)


def token_loop(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Oracle for linear layers and embeddings: for each token, for each expert, w * s * (B (A x) + bias)."""
    embedding = len(layer.lora_embedding_A) > 0
    held = layer.lora_embedding_A if embedding else layer.lora_A
    tokens = tuple(x.shape) if embedding else tuple(x.shape[:-1])
    rows = spread(weights, tokens).reshape(-1, weights.shape[-1])
    inputs = x.reshape(-1) if embedding else x.reshape(-1, x.shape[-1])
    updates = []
    for token, row in zip(inputs, rows):
        update = 0.0
        for weight, name in zip(row, layer.active_adapters):
            if name not in held:
                continue
            if embedding:
                column = layer.lora_embedding_A[name][:, token]
                if token == layer.get_base_layer().padding_idx:
                    column = column.detach()  # torch trains no entry for padding
                scale = getattr(layer.get_base_layer(), "embed_scale", torch.ones(()))
                moved = layer.lora_embedding_B[name] @ column * scale
            else:
                moved = layer.lora_B[name].weight @ (layer.lora_A[name].weight @ token)
                if layer.lora_B[name].bias is not None:
                    moved = moved + layer.lora_B[name].bias
            update = update + weight * scaling_of(layer, name) * moved
        updates.append(update)
    base = layer.base_layer(x)
    return base + torch.stack(updates).reshape(base.shape)


def one_expert_at_a_time(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Oracle for every layer: what stock PEFT's forward adds for each single expert, times that expert's weight."""
    rows = spread(weights, token_shape(layer, x))
    names, base = list(layer.active_adapters), layer.base_layer(x)
    result = base
    for column, name in enumerate(names):
        with only(layer, name):
            update = layer(x) - base
        weight = rows[..., column]
        if is_convolution(layer):
            result = result + update * weight.reshape(base.shape[0], 1, *base.shape[2:])
        else:
            result = result + update * weight.unsqueeze(-1)
    return result


@contextmanager
def only(layer: nn.Module, name: str):
    """Run one adapter alone, without touching which parameters train."""
    active, layer._active_adapter = layer._active_adapter, [name]
    try:
        yield
    finally:
        layer._active_adapter = active


class Recorder(TorchDispatchMode):
    """Notes every operator that runs, and the number of elements of every tensor it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operators.append(func.overloadpacket.__name__)
        self.sizes += [
            item.numel() for item in (out if isinstance(out, (tuple, list)) else [out]) if hasattr(item, "numel")
        ]
        return out


def concatenations(run) -> int:
    """How many times `run` concatenates tensors."""
    with Recorder() as recorder:
        run()
    return recorder.operators.count("cat")
