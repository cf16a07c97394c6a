"""Write a quantised mixture as a Hugging Face folder: packed safetensors, config, tokenizer, and `router_ft.json`.

`router_ft.json` holds the plan, the options and results of every step so far, and the versions of the libraries. The
quantisation scheme in `config.json` is what compressed-tensors reads; where experts have different formats plain
`from_pretrained` cannot follow it, and `moe_ext.router_ft.load` can.
"""

import importlib.metadata
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from moe_common.runs.whole_files import whole_folder, write_json
from moe_ext.router_ft.formats import SCALE_DTYPE, check_format, scheme_json
from moe_ext.router_ft.plan import Plan
from moe_ext.routers import router_parameters

RECORD = "router_ft.json"
PLAN = "plan"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VERSIONED = ("torch", "transformers", "compressed-tensors", "safetensors")


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    packed: dict[str, dict[str, Tensor]],
    record: dict[str, Any],
) -> None:
    """Write the folder whole or not at all.

    Args:
        folder: that is not there yet, or empty.
        model: what `quantize_model` changed.
        tokenizer: goes with it.
        plan: the formats.
        packed: of `quantize_model`.
        record: options and results by step, for `router_ft.json`.

    Raises:
        FileExistsError: the folder holds something.
    """
    with whole_folder(folder) as partial:
        model.config.save_pretrained(partial)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        write_json(partial / "config.json", {**config, "quantization_config": quantization_config(plan)})
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_torch_state_dict(checkpoint_tensors(model, packed), partial)
        _write_record(partial, plan, record)


def save_with_routers(
    folder: str | Path, source: Path, model: PreTrainedModel, plan: Plan, record: dict[str, Any]
) -> None:
    """Write a checkpoint that is another one but for its routers and its record.

    Args:
        folder: that is not there yet, or empty.
        source: folder of the other checkpoint; its packed tensors are copied bit by bit.
        model: whose routers are taken.
        plan, record: as in `save_checkpoint`.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: the source cannot be read.
    """
    tensors = read_tensors(source)
    routers = {name: parameter.data for name, parameter in router_parameters(model).items()}
    for name, tensor in revert_weight_conversion(model, routers).items():
        assert tensors[name].shape == tensor.shape, f"{name} of {source} is no router of the model"
        tensors[name] = _narrow(tensor).cpu().contiguous()
    with whole_folder(folder) as partial:
        for file in source.iterdir():
            if file.suffix != ".safetensors" and file.name not in (INDEX, RECORD):
                shutil.copyfile(file, partial / file.name)
        save_torch_state_dict(tensors, partial)
        _write_record(partial, plan, record)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, still packed.

    Raises:
        ValueError: a file is missing, truncated, or no safetensors.
    """
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        files = [
            folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        ]
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"The checkpoint {folder} lacks {file.name}: it was not copied whole. Copy it again.")
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
        except SafetensorError as broken:
            raise ValueError(
                f"{file} cannot be read ({broken}): it is truncated or damaged. Copy or write it again."
            ) from broken
    return tensors


def checkpoint_tensors(model: PreTrainedModel, packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of the model under the names of a checkpoint, the quantised matrices packed."""
    tied = set(model._tied_weights_keys or ()) if model.config.get_text_config().tie_word_embeddings else set()
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    tensors = {}
    for name, tensor in revert_weight_conversion(model, own).items():
        matrix = name.removesuffix(".weight")
        if matrix in packed:
            tensors |= {f"{matrix}.{part}": piece for part, piece in packed[matrix].items()}
        else:
            tensors[name] = _narrow(tensor)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The scheme of a plan in compressed-tensors' words."""
    targets = defaultdict(list)
    for name, given in plan.formats.items():
        if check_format(given).preset is not None:
            targets[given, plan.shapes[name][1]].append(name)
    groups = {
        f"{given}_{num_columns}": scheme_json(given, num_columns, names)
        for (given, num_columns), names in targets.items()
    }
    packings = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": packings.pop() if len(packings) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, given in plan.formats.items() if check_format(given).preset is None],
    }


def _write_record(folder: Path, plan: Plan, record: dict[str, Any]) -> None:
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    write_json(folder / RECORD, {"versions": versions, **record, PLAN: plan.to_dict()})


def _narrow(tensor: Tensor) -> Tensor:
    """In bfloat16 where that loses nothing: a model read in float32 from a bfloat16 checkpoint is stored as it was."""
    if tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(SCALE_DTYPE)
    return narrow if torch.equal(narrow.float(), tensor) else tensor
