"""Tiny random models of every family of mixtures that the tools support."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV3PreTrainedModel,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

NUM_EXPERTS = 4
SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DEEPSEEK = {
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
FAMILIES = {
    "olmoe": (OlmoeConfig, {"intermediate_size": 32, "num_experts": NUM_EXPERTS}),
    "mixtral": (MixtralConfig, {"intermediate_size": 32, "num_local_experts": NUM_EXPERTS}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "intermediate_size": 32,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": NUM_EXPERTS,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"intermediate_size": 32, "moe_intermediate_size": 32, "num_experts": NUM_EXPERTS, "head_dim": 8},
    ),
    "deepseek_v2": (DeepseekV2Config, DEEPSEEK),
    "deepseek_v3": (DeepseekV3Config, DEEPSEEK),
}


def tiny_moe(family: str, *, seed: int = 0, **changed) -> PreTrainedModel:
    """A random model of two layers, width 32 and four experts, in eval mode; DeepSeek's first layer is dense."""
    if family.startswith("deepseek") and "router_logits" not in DeepseekV3PreTrainedModel._can_record_outputs:
        pytest.skip("DeepSeek's routers need transformers 5.19")
    config_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_class(**{**SHARED, **own, **changed})).eval()
