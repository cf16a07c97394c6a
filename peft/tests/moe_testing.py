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
"""Tiny random base models and mixtures for the tests of routed LoRA. Every one is seeded and needs no network."""

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from peft import get_peft_model


VOCAB = 64
PAD = 0
FAMILIES = ("llama", "gpt2", "olmoe")
SCOPES = ("layer", "block", "model", "two_pass")
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "olmoe": ["q_proj", "v_proj", "o_proj"],
}
# GPT-2 runs in float64, where only the order of sums differs. The other two upcast their norms to float32, whose
# rounding (6e-8 relative) grows over two blocks with logits of order one.
TOLERANCE = {
    "gpt2": {"rtol": 0, "atol": 1e-10},
    "llama": {"rtol": 0, "atol": 1e-5},
    "olmoe": {"rtol": 0, "atol": 1e-5},
}


def tiny_base(family: str = "llama", *, seed: int = 0, **changes) -> nn.Module:
    """A causal language model of two blocks of width 32 with random weights, in eval mode."""
    torch.manual_seed(seed)
    special = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **{**sizes, **special, **changes})).eval()
    if family == "olmoe":
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
        return OlmoeForCausalLM(OlmoeConfig(vocab_size=VOCAB, **{**sizes, **special, **moe, **changes})).eval()
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **{**sizes, **special, **dropout, **changes})).double().eval()


def tiny_mixture(family: str = "llama", scope: str = "layer", *, seed: int = 0, base=None, **config):
    """A mixture of three random experts on a tiny base, in eval mode; `config` are arguments of `MoELoraConfig`."""
    from peft import MoELoraConfig  # here, because the tests of routers without mixtures also import this file

    base = tiny_base(family, seed=seed) if base is None else base
    torch.manual_seed(seed + 1)
    arguments = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS[family],
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
        "fan_in_fan_out": family == "gpt2",
        "router_scope": scope,
        **config,
    }
    if "experts" not in arguments:
        arguments.setdefault("num_experts", 3)
    model = get_peft_model(base, MoELoraConfig(**arguments))
    if family == "gpt2":
        model.double()
    spread_gates(model)
    return model.eval()


@torch.no_grad()
def spread_gates(model: nn.Module, seed: int = 5) -> None:
    """Random gates wide enough that the tokens of a batch choose different experts."""
    generator = torch.Generator().manual_seed(seed)
    for gate in model.base_model.moe_router.gates.values():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator, dtype=torch.float64) * 0.3)


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def trainable_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every trainable parameter by name; a parameter without one is a test failure."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            gradients[name] = parameter.grad.clone()
    return gradients


def count_hooks(model: nn.Module) -> int:
    """All forward and backward hooks in a model."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)
