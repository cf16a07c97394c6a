"""Router and heads in a folder, and back onto their backbone; the backbone itself is never written.

config.json            MultiTokenConfig
heads.safetensors      (an older folder's heads.pt is read as well, with weights_only=True)
router.safetensors     (or router.pt)
copy_router.safetensors (an older folder has none)
moe_meta.json          which backbone, which stage, which training
tokenizer files        the backbone's own
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_common.models.base_identity import BaseIdentity
from moe_common.models.base_model import Quantization, load_base_model
from moe_common.runs.whole_files import whole_folder, write_json
from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE
from moe_ext.multi_token.model.placement import place

logger = logging.getLogger(__name__)

CONFIG, META = "config.json", "moe_meta.json"


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What is noted with heads and router.

    Args:
        stage: s1, s2 or ppo_final.
        backbone: which model they stand beside.
        options: of the training run.
    """

    stage: str
    backbone: BaseIdentity
    options: dict[str, Any]


def save(model: MultiTokenMoE, tokenizer: PreTrainedTokenizerBase, meta: Meta, folder: Path) -> None:
    """Write a folder, whole or not at all.

    Raises:
        FileExistsError: something is in that place.
    """
    with whole_folder(folder) as partial:
        write_json(partial / CONFIG, asdict(model.config))
        for name, part in _parts(model).items():
            tensors = {key: value.detach().cpu().contiguous() for key, value in part.state_dict().items()}
            save_file(tensors, partial / f"{name}.safetensors", metadata={"format": "pt"})
        write_json(partial / META, {**asdict(meta), "backbone": meta.backbone.to_dict()})
        tokenizer.save_pretrained(partial)


def load(
    folder: Path, *, backbone_name: str | None = None, quant: Quantization = "none"
) -> tuple[MultiTokenMoE, PreTrainedTokenizerBase, Meta]:
    """Read a folder onto its backbone, which is loaded by the name it was trained with.

    Args:
        folder: as `save` wrote it.
        backbone_name: another name or place of the same backbone.
        quant: bits of the backbone's linear layers.

    Returns:
        The model in eval mode where it runs fastest, the tokenizer, and what was noted.

    Raises:
        ValueError: no such checkpoint, files of it missing or of another shape, another backbone or vocabulary.
        FileNotFoundError: there is no such folder.
    """
    meta, config = read_meta(folder), read_config(folder)
    if backbone_name is None and not meta.backbone.name:
        raise ValueError(f"{folder} does not say which backbone it belongs to. Name it with --model.")
    backbone, tokenizer = load_base_model(backbone_name or meta.backbone.name, quant=quant)
    model = onto(backbone, folder, config=config, meta=meta, name=backbone_name or meta.backbone.name)
    return place(model).eval(), tokenizer, meta


def onto(backbone: PreTrainedModel, folder: Path, *, config: MultiTokenConfig, meta: Meta, name: str) -> MultiTokenMoE:
    """Heads and router of a folder beside a backbone that is loaded already.

    Raises:
        ValueError: files missing or of another shape, another backbone or vocabulary.
    """
    try:
        meta.backbone.check_is(BaseIdentity.of(backbone, name))
    except ValueError as other:
        raise ValueError(f"{folder}: {other}") from other
    model = MultiTokenMoE(backbone, config)
    for part_name, part in _parts(model).items():
        if part_name == "copy_router" and not any(folder.glob("copy_router.*")):
            logger.warning("%s is older than copies: how far these stand is only learnt while generating", folder)
            continue
        _fill(part, _read_tensors(folder, part_name), folder, part_name)
    return model


def read_meta(folder: Path) -> Meta:
    """What is noted in a folder; see `load` for what is refused."""
    held = _read_json(folder, META)
    try:
        return Meta(
            stage=held["stage"], backbone=BaseIdentity.from_dict(held["backbone"]), options=held.get("options", {})
        )
    except (KeyError, TypeError) as missing:
        raise ValueError(f"{folder / META} lacks {missing}, so it was not written by this tool.") from missing


def read_config(folder: Path) -> MultiTokenConfig:
    """The config in a folder; see `load` for what is refused."""
    try:
        # A folder that says nothing of it is older than the attention.
        return MultiTokenConfig(**{"prefix_attention": False, **_read_json(folder, CONFIG)})
    except TypeError as unknown:
        raise ValueError(f"{folder / CONFIG} is no config of token heads: {unknown}.") from unknown


def _parts(model: MultiTokenMoE) -> dict[str, nn.Module]:
    return {"heads": model.heads, "router": model.router, "copy_router": model.copy_router}


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {folder}. Check the path given to --ckpt.")
    path = folder / name
    if not path.is_file():
        inside = ", ".join(sorted(inner.name for inner in folder.iterdir() if (inner / name).is_file()))
        hint = f"Did you mean one of {inside} in it?" if inside else "Give a folder that training wrote, as out/s2."
        raise ValueError(f"{folder} holds no {name}, so it is no checkpoint of token heads. {hint}")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as wrong:
        raise ValueError(f"{path} is not JSON: {wrong}. Train anew, or restore the file.") from wrong
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}, but must hold an object.")
    return held


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    plain, older = folder / f"{name}.safetensors", folder / f"{name}.pt"
    if plain.is_file():
        try:
            return load_file(plain)
        except SafetensorError as wrong:
            raise ValueError(f"{plain} cannot be read: {wrong}. Train anew, or restore the file.") from wrong
    if older.is_file():
        try:
            return torch.load(older, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError) as wrong:
            raise ValueError(f"{older} cannot be read as plain tensors: {wrong}. Train anew.") from wrong
    raise ValueError(f"{folder} holds neither {plain.name} nor {older.name}. Train anew, or restore the file.")


def _fill(part: nn.Module, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in part.state_dict().items()}
    held = {key: tuple(value.shape) for key, value in tensors.items()}
    if wanted != held:
        differs = next(key for key in [*wanted, *held] if wanted.get(key) != held.get(key))
        raise ValueError(
            f"The {name} in {folder} are not those of its config and this backbone: {differs} has the shape "
            f"{held.get(differs)} and should have {wanted.get(differs)}. Load them onto the backbone they were "
            "trained with."
        )
    part.load_state_dict(tensors)
