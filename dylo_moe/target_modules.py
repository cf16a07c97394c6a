"""Which linear layers of a base model get LoRA experts, by the architecture's own name."""

from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

# config.model_type -> the linear layers of a decoder block. Bases that are mixtures of experts themselves keep their
# experts in one tensor each, which is no linear layer; there the attention is adapted.
TARGETS: dict[str, tuple[str, ...]] = {
    "llama": ATTENTION + GATED_MLP,
    "mistral": ATTENTION + GATED_MLP,
    "gemma": ATTENTION + GATED_MLP,
    "gemma2": ATTENTION + GATED_MLP,
    "gemma3_text": ATTENTION + GATED_MLP,
    "qwen2": ATTENTION + GATED_MLP,
    "qwen3": ATTENTION + GATED_MLP,
    "olmo": ATTENTION + GATED_MLP,
    "olmo2": ATTENTION + GATED_MLP,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": FUSED,
    "falcon": FUSED,
    "olmoe": ATTENTION,
    "mixtral": ATTENTION,
    "qwen2_moe": ATTENTION,
    "qwen3_moe": ATTENTION,
}


def find_target_modules(model: nn.Module) -> list[str]:
    """The names of the layers to adapt, as `LoraConfig.target_modules` takes them.

    Args:
        model: a causal language model of transformers.

    Raises:
        ValueError: the architecture is not in the table, or the model lacks a layer that the table names.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    held = _linear_layers(model)
    if model_type not in TARGETS:
        raise ValueError(
            f"No target modules are known for the architecture '{model_type}' ({type(model).__name__}); known are "
            f"{', '.join(TARGETS)}. Pass target_modules; its linear layers are {', '.join(held) or 'none'}."
        )
    targets = list(TARGETS[model_type])
    missing = [name for name in targets if name not in held]
    if missing:
        raise ValueError(
            f"This {type(model).__name__} of type '{model_type}' has no layers {', '.join(missing)}; its linear "
            f"layers are {', '.join(held) or 'none'}. Pass target_modules."
        )
    return targets


def has_transposed_weights(model: nn.Module) -> bool:
    """Whether the model's linear layers are GPT-2's, which hold their weights as [in, out] (LoRA: fan_in_fan_out)."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def _linear_layers(model: nn.Module) -> list[str]:
    """The last part of the name of every layer that maps one width to another, the output embedding left out."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = {}
    for name, module in model.named_modules():
        is_matrix = getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2
        # quantised layers keep their weights packed in other shapes but tell their widths
        is_linear = type(module).__name__ == "Conv1D" or hasattr(module, "in_features")
        if is_linear and module is not output and (is_matrix or hasattr(module, "out_features")):
            names[name.rpartition(".")[2]] = None
    return list(names)
