"""Read a checkpoint of this tool: each matrix is unpacked by its own format and handed to the model class.

    model, tokenizer, record = load("out")

Plain `from_pretrained` keeps one format for all experts of a layer, because in memory they are one parameter. A
checkpoint of mixed formats it refuses, or reads wrongly without a word where two formats are packed alike.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_common.runs.whole_files import whole_file
from moe_ext.router_ft.checkpoint import PLAN, RECORD, read_tensors
from moe_ext.router_ft.formats import check_format, unpack
from moe_ext.router_ft.matrices import find_matrices
from moe_ext.router_ft.plan import Plan


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Args:
        model: with its weights as numbers again, in eval mode.
        tokenizer: None where a `.pt` file was read, which holds none.
        plan: the format of each matrix.
        record: what `router_ft.json` holds beside the plan.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    plan: Plan
    record: dict[str, Any]


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> Loaded:
    """Read a checkpoint folder, or a `.pt` file of `export_pt`.

    Args:
        path: of the folder or file.
        dtype: of the model; by default float32 without a GPU, and the checkpoint's own with one.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: no checkpoint of this tool, a truncated file, tensors that are missing or do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path}. Check the path.")
    return load_pt(path, dtype=dtype) if path.is_file() else _load_folder(path, dtype)


def read_record(folder: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan of a checkpoint folder, and the rest of its `router_ft.json`."""
    file = folder / RECORD
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {RECORD}, so it is no checkpoint of this tool. Write one with: "
            "python -m moe_ext.router_ft quantize"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as wrong:
        raise ValueError(f"{file} is not JSON: {wrong}.") from wrong
    return Plan.from_dict(record.pop(PLAN, None), str(file)), record


def unpack_tensors(tensors: dict[str, Tensor], plan: Plan, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint with every quantised matrix as one `weight` again.

    Raises:
        ValueError: a matrix of the plan lacks its tensors.
    """
    tensors = dict(tensors)
    for name, given in plan.formats.items():
        parts = {key.rpartition(".")[2]: key for key in _parts_of(name) if key in tensors}
        held = {part: tensors.pop(key) for part, key in parts.items()}
        if check_format(given).preset is None:
            tensors[f"{name}.weight"] = _part(held, "weight", name, where)
            continue
        _part(held, "weight_scale", name, where)
        if not {"weight", "weight_packed"} & held.keys():
            _part(held, "weight_packed", name, where)
        rows, columns = plan.shapes[name]
        weight = unpack(held, given, columns)
        if tuple(weight.shape) != (rows, columns):
            raise ValueError(f"{where} holds {name} as {list(weight.shape)}, but its plan says {rows} x {columns}.")
        tensors[f"{name}.weight"] = weight
    return tensors


def build_model(config, tensors: dict[str, Tensor], *, dtype: torch.dtype, where: str) -> PreTrainedModel:
    """A model of the config with these tensors, which bear the names of a checkpoint.

    Raises:
        ValueError: a tensor is missing, is left over or has the wrong shape.
    """
    try:
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as wrong:
        raise ValueError(f"The tensors of {where} do not fit its config: {wrong}") from wrong
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[what])):
            raise ValueError(
                f"{where} does not fit its config: {len(names)} {what.replace('_', ' ')}, the first {names[0]}. "
                "Write the checkpoint again."
            )
    return model.eval()


def export_pt(loaded: Loaded, path: str | Path) -> None:
    """Write the older layout: one `.pt` with model_state_dict, config, plan and router_finetuning."""
    content = {
        "model_state_dict": loaded.model.state_dict(),
        "config": loaded.model.config.to_dict(),
        "plan": loaded.plan.to_dict(),
        "router_finetuning": loaded.record.get("finetune", {}),
    }
    with whole_file(path) as partial:
        torch.save(json_safe(content), partial)


def load_pt(path: str | Path, *, dtype: torch.dtype | None = None) -> Loaded:
    """Read what `export_pt` wrote; nothing in the file is run.

    Raises:
        ValueError: not such a file.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as wrong:  # torch raises many kinds for a file that is no checkpoint, or holds more than tensors
        said = str(wrong).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read as a .pt of tensors: {said}") from wrong
    needed = {"model_state_dict", "config", "plan", "router_finetuning"}
    if not isinstance(content, dict) or needed - content.keys():
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {held}, but must hold {', '.join(sorted(needed))}.")
    config = AutoConfig.for_model(**content["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or _default_dtype(config))
    try:
        model.load_state_dict(content["model_state_dict"])
    except RuntimeError as wrong:
        raise ValueError(f"The tensors of {path} do not fit its config: {' '.join(str(wrong).split())}") from wrong
    plan = Plan.from_dict(content["plan"], str(path))
    plan.check_model(find_matrices(model))
    return Loaded(model.eval(), None, plan, {"finetune": content["router_finetuning"]})


def json_safe(content: dict[str, Any]) -> dict[str, Any]:
    """The same with everything but tensors as plain JSON types, which `weights_only` can read."""
    return {
        name: value if name == "model_state_dict" else json.loads(json.dumps(value, default=str))
        for name, value in content.items()
    }


def _load_folder(folder: Path, dtype: torch.dtype | None) -> Loaded:
    plan, record = read_record(folder)
    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)  # or from_pretrained would want to unpack a second time
    tensors = unpack_tensors(read_tensors(folder), plan, str(folder))
    model = build_model(config, tensors, dtype=dtype or _default_dtype(config), where=str(folder))
    plan.check_model(find_matrices(model))
    return Loaded(model, AutoTokenizer.from_pretrained(folder), plan, record)


def _default_dtype(config) -> torch.dtype:
    return (config.dtype or torch.float32) if torch.cuda.is_available() else torch.float32


def _parts_of(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "weight_packed", "weight_scale", "weight_shape")]


def _part(held: dict[str, Tensor], part: str, name: str, where: str) -> Tensor:
    if part not in held:
        raise ValueError(
            f"{where} lacks the tensor {name}.{part}: the checkpoint is not whole. Copy or write it again."
        )
    return held[part]
