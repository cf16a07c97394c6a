"""An expert of packed weights as a folder: config, tokenizer, `packed.safetensors` and a plain `moqe_expert.json`.

The folder has no `model.safetensors`, so that transformers' own `from_pretrained` says that the weights are missing
and does not fill the packed layers with random numbers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moe_common.runs.whole_files import whole_folder, write_json
from moe_ext.moqe.experts.group_quant import GroupFormat, PackedLinear

RECORD, WEIGHTS = "moqe_expert.json", "packed.safetensors"


def is_packed_folder(folder: Path) -> bool:
    """Whether a folder is one of these."""
    return (folder / RECORD).is_file()


def save_packed(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: GroupFormat, record: dict[str, Any]
) -> None:
    """Write a packed model, whole or not at all.

    Args:
        folder: that is not there yet, or empty.
        model: whose layers `pack_linear_layers` has packed; what is not packed is stored in bfloat16.
        tokenizer: goes with it.
        form: of the packed weights.
        record: what else is to be noted: where it came from, with which options.

    Raises:
        FileExistsError: the folder holds something.
    """
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    tied = set(model._tied_weights_keys or ()) if model.config.get_text_config().tie_word_embeddings else set()
    tensors = {
        name: _stored(name, tensor, packed).cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    num_weights = sum(layer.in_features * layer.out_features for layer in packed.values())
    num_bytes = sum(layer.packed.nbytes + layer.scale.nbytes for layer in packed.values())
    with whole_folder(folder) as partial:
        model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        noted = {
            "bits": form.bits,
            "group_size": form.group_size,
            "bits_per_packed_weight": round(8 * num_bytes / num_weights, 4),
            "packed_weights": num_weights,
            "packed_bytes": num_bytes,
            "other_bytes": sum(tensor.nbytes for tensor in tensors.values()) - num_bytes,
            "layers": sorted(packed),
        }
        write_json(partial / RECORD, {**noted, **record})


def load_packed(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Read a packed model; what is not packed gets `dtype`.

    Raises:
        ValueError: files missing, or not those of the config.
    """
    try:
        noted = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        form = GroupFormat(bits=noted["bits"], group_size=noted["group_size"])
        tensors = load_file(folder / WEIGHTS)
        config = AutoConfig.from_pretrained(folder)
    except (OSError, KeyError, ValueError) as wrong:
        said = str(wrong).splitlines()[0]
        raise ValueError(f"{folder} is no whole packed expert: {said} Make it again with: quantize") from wrong
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name in noted["layers"]:
        layer: nn.Linear = model.get_submodule(name)
        empty = PackedLinear(layer.in_features, layer.out_features, form, has_bias=layer.bias is not None)
        model.set_submodule(name, empty)
    kept = {
        name: tensor if name.endswith((".packed", ".scale")) else tensor.to(dtype) for name, tensor in tensors.items()
    }
    if config.get_text_config().tie_word_embeddings:
        kept |= {tied: kept[source] for tied, source in model._tied_weights_keys.items()}
    model.load_state_dict(kept, assign=True)
    model.tie_weights()
    return model


def _stored(name: str, tensor: torch.Tensor, packed: dict[str, PackedLinear]) -> torch.Tensor:
    layer, _, part = name.rpartition(".")
    if layer in packed and part != "bias":
        return tensor
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
