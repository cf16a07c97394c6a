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
"""What PEFT computes without routing, as hashes: run by the fork and by the pinned release, they must be the same.

As a script it prints where `peft` came from and the hashes, as JSON.
"""

import hashlib
import json
import warnings

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import peft
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict


class OneOfEach(nn.Module):
    """An embedding, a convolution and linear layers, so that every float layer type takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.linear = nn.Linear(8, 6)

    def forward(self, ids):
        return self.linear(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))


def digest(*tensors: torch.Tensor) -> str:
    joined = hashlib.sha256()
    for tensor in tensors:
        joined.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        joined.update(tensor.detach().contiguous().numpy().tobytes())
    return joined.hexdigest()


def state_digest(model: nn.Module, adapter_name: str) -> str:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return digest(*state.values()) + " " + " ".join(state)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return GPT2LMHeadModel(config)


def stock_outputs() -> dict[str, str]:
    """Hashes of outputs, gradients and state dicts of LoRA models, by what they are of."""
    warnings.filterwarnings("ignore")
    hashes = {}
    ids = torch.randint(3, 16, (3, 5), generator=torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    shared = {"init_lora_weights": False, "lora_dropout": 0.1}
    model = get_peft_model(OneOfEach(), LoraConfig(r=4, target_modules=["embed", "conv", "linear"], **shared), "x")
    model.add_adapter("y", LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "linear"], lora_bias=True, **shared))
    model.base_model.set_adapter(["x", "y"])
    torch.manual_seed(1)
    out = model(ids)
    out.square().sum().backward()
    hashes["training, several adapters"] = digest(out)
    hashes["gradients"] = digest(*(p.grad for p in model.parameters() if p.grad is not None))
    model.eval()
    hashes["eval, several adapters"] = digest(model(ids))
    with model.disable_adapter():
        hashes["disabled"] = digest(model(ids))
    hashes["state dict"] = state_digest(model, "x") + state_digest(model, "y")
    hashes["all keys"] = " ".join(model.state_dict())

    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **shared), "x")
    model.add_adapter("y", LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **shared))
    model.eval()
    hashes["adapter_names"] = digest(model(ids, adapter_names=["x", "y", "__base__"]).logits)
    hashes["generate"] = digest(model.generate(ids, max_new_tokens=4, do_sample=False))
    model.add_adapter("z", LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True, **shared))
    model.base_model.set_adapter(["x", "y", "z"])
    model.eval()
    hashes["DoRA beside LoRA"] = digest(model(ids).logits)
    hashes["DoRA state dict"] = state_digest(model, "z")
    model.merge_adapter()
    hashes["merged"] = digest(model(ids).logits)
    return hashes


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"peft": peft.__file__, "hashes": stock_outputs()}))
