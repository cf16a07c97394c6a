"""Which layers get experts: every family that the table names, on tiny random models."""

import pytest
from tiny_models import tiny_model

from dylo_moe.model import DyLoRA_MoE
from dylo_moe.target_modules import TARGETS, find_target_modules, has_transposed_weights

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

# config class, what it needs besides the usual sizes, the layers expected
FAMILIES = {
    "llama": ("LlamaConfig", {}, ALL_SEVEN),
    "mistral": ("MistralConfig", {"num_key_value_heads": 1, "head_dim": 8}, ALL_SEVEN),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 8}, ALL_SEVEN),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 1, "head_dim": 8}, ALL_SEVEN),
    "gemma3_text": ("Gemma3TextConfig", {"num_key_value_heads": 1, "head_dim": 8}, ALL_SEVEN),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 1}, ALL_SEVEN),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 1, "head_dim": 8}, ALL_SEVEN),
    "olmo": ("OlmoConfig", {}, ALL_SEVEN),
    "olmo2": ("Olmo2Config", {}, ALL_SEVEN),
    "phi3": ("Phi3Config", {}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": ("GPT2Config", {}, ["c_attn", "c_proj", "c_fc"]),
    "gpt_neox": ("GPTNeoXConfig", {}, FUSED),
    "falcon": ("FalconConfig", {}, FUSED),
    "olmoe": ("OlmoeConfig", MOE, ALL_SEVEN[:4]),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_key_value_heads": 1}, ALL_SEVEN[:4]),
    "qwen2_moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 8}, ALL_SEVEN[:4]),
    "qwen3_moe": ("Qwen3MoeConfig", {**MOE, "num_key_value_heads": 1, "head_dim": 8}, ALL_SEVEN[:4]),
}


def tiny(family: str):
    name, extra, _ = FAMILIES[family]
    return tiny_model(name, **extra)


def test_every_architecture_of_the_table_is_tested():
    assert set(FAMILIES) == set(TARGETS)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_put_on_the_layers_of_each_family_and_nowhere_else(family):
    base = tiny(family)
    assert find_target_modules(base) == FAMILIES[family][2]
    model = DyLoRA_MoE(base, 2, 2, 4)
    adapted = [name for name, module in model.named_modules() if name.endswith("lora_A")]
    assert {name.split(".")[-2] for name in adapted} == set(FAMILIES[family][2])
    # in each of the two blocks, once for each place of that name: GPT-2 has two c_proj
    places = {"gpt2": 4}.get(family, len(FAMILIES[family][2]))
    assert len(adapted) == 2 * places


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_only_gpt2_keeps_its_weights_transposed(family):
    assert has_transposed_weights(tiny(family)) == (family == "gpt2")


def test_an_unknown_architecture_is_refused_and_its_layers_are_named():
    base = tiny_model("OPTConfig", ffn_dim=24)
    with pytest.raises(ValueError, match="'opt'.*llama.*fc1"):
        DyLoRA_MoE(base)


def test_an_unknown_architecture_takes_layers_that_are_named_for_it():
    base = tiny_model("OPTConfig", ffn_dim=24)
    model = DyLoRA_MoE(base, 2, 2, 4, target_modules=["fc1"])
    assert {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith("lora_A")} == {"fc1"}


def test_a_model_without_the_layers_of_its_type_is_refused():
    base = tiny("llama")
    for block in base.model.layers:
        block.mlp.gate_proj = None
    with pytest.raises(ValueError, match="'llama'.*gate_proj"):
        find_target_modules(base)
