"""Tiny mixtures with trained-looking experts and a router that spreads tokens, for the tests of DyLoRA-MoE."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dylo_moe.model import DyLoRA_MoE

VOCAB = 64


def tiny_llama(*, seed: int = 0, **changes):
    """A random causal language model of two blocks of width 32."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def tiny_mixture(num_experts: int = 3, *, base=None, **arguments) -> DyLoRA_MoE:
    """A mixture whose experts change something and whose gates tell tokens apart, in eval mode."""
    chosen = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **arguments}
    model = DyLoRA_MoE(tiny_llama() if base is None else base, num_experts, **chosen)
    train_looking(model)
    return model.eval()


@torch.no_grad()
def train_looking(model: DyLoRA_MoE, seed: int = 1) -> None:
    """Give every B and every gate random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        elif "moe_router" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
