"""Tiny models with random weights for all tests: a model of each family, one in a folder with the committed tokenizer,
a model that grows, and a mixture on it."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import MoELoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DeepseekV3PreTrainedModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dylo_moe.model import DyLoRA_MoE
from moe_common.models.base_model import COMMITTED_FOLDER

VOCAB = 64
NUM_EXPERTS = 4  # of a layer of a mixture
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SPECIAL,
}
MOE = {
    **SIZES,
    "intermediate_size": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
QWEN_MOE = {**MOE, "moe_intermediate_size": 32, "num_experts": NUM_EXPERTS}
DEEPSEEK = {
    **MOE,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **SPECIAL}
# The class of the config and what it is given, for each kind.
KINDS = {
    "llama": ("LlamaConfig", SIZES),
    "gpt2": ("GPT2Config", GPT2),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 8}),
    "mistral, window of 8": ("MistralConfig", {**SIZES, "sliding_window": 8}),
    "olmoe": ("OlmoeConfig", {**MOE, "num_experts": NUM_EXPERTS}),
    "mixtral": ("MixtralConfig", {**MOE, "num_local_experts": NUM_EXPERTS}),
    "qwen2_moe": ("Qwen2MoeConfig", {**QWEN_MOE, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", {**QWEN_MOE, "head_dim": 8}),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
}
MOE_KINDS = ("deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def tiny_model(kind: str = "llama", *, seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal language model of two blocks of width 32, in eval mode.

    Args:
        kind: one of KINDS, or the name of another config class, which gets SIZES.
        changes: fields of the config that differ from those of the kind.
    """
    if "window" in kind and not hasattr(Cache, "is_recording_past"):
        pytest.skip("sliding windows need transformers 5.21")
    if "deepseek" in kind and "router_logits" not in DeepseekV3PreTrainedModel._can_record_outputs:
        pytest.skip("DeepSeek's routers need transformers 5.19")
    name, sizes = KINDS.get(kind, (kind, SIZES))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**sizes, **changes})).eval()


def committed_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the committed base model, of 4096 tokens."""
    return AutoTokenizer.from_pretrained(COMMITTED_FOLDER)


def tiny_folder(folder: Path, kind: str = "llama", *, change=None, dtype=None, **changes) -> Path:
    """Save a tiny model that reads the committed tokenizer's tokens, and that tokenizer, in a folder.

    Args:
        change: a function of the model, called before it is saved.
        dtype: the precision of the weights; float32 if it is None.
    """
    tokenizer = committed_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(kind, **{"vocab_size": len(tokenizer), **ids, **changes})
    if change is not None:
        with torch.no_grad():
            change(model)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_mixture(num_experts: int = 3, *, base=None, **arguments) -> DyLoRA_MoE:
    """A DyLoRA-MoE whose experts change something and whose gates tell tokens apart, in eval mode."""
    chosen = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **arguments}
    model = DyLoRA_MoE(tiny_model() if base is None else base, num_experts, **chosen)
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


def lora_mixture(base=None, **changes):
    """A routed LoRA mixture of PEFT's, two of four experts a token; its experts are not zero; in eval mode."""
    settings = {"num_experts": 4, "top_k": 2, "r": 2, "target_modules": ["q_proj", "down_proj"], **changes}
    base = tiny_model(num_hidden_layers=3) if base is None else base
    torch.manual_seed(1)
    config = MoELoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return get_peft_model(base, config).eval()


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
