"""A trained mixture in a folder: its router, and which experts it was trained for; the experts' weights stay put.

moqe.json             the router's config, the experts, static weights, the default expert, what was noted in training
router.safetensors
tokenizer files       those of the experts
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_common.runs.whole_files import whole_folder, write_json
from moe_ext.moqe.experts.expert import Dtype, GgufBackend, resolve_expert
from moe_ext.moqe.experts.identity import ExpertIdentity, check_same_experts
from moe_ext.moqe.mixture.model import ExpertSet, MoQEModel, load_experts
from moe_ext.moqe.mixture.router import Router, RouterConfig

CONFIG, WEIGHTS = "moqe.json", "router.safetensors"


def save(model: MoQEModel, folder: Path, noted: dict[str, Any] | None = None) -> None:
    """Write a mixture, whole or not at all.

    Args:
        model: the mixture.
        folder: that is not there yet, or empty.
        noted: of its training.

    Raises:
        FileExistsError: the folder holds something.
    """
    with whole_folder(folder) as partial:
        write_json(
            partial / CONFIG,
            {
                "router": asdict(model.router.config),
                "input_size": model.router.input_size,
                "experts": [expert.identity.to_dict() for expert in model.expert_set.experts],
                "static_weights": model.static_weights,
                "default_expert": model.default_expert,
                "training": noted or {},
            },
        )
        save_file({name: tensor.cpu() for name, tensor in model.router.state_dict().items()}, partial / WEIGHTS)
        model.expert_set.tokenizer.save_pretrained(partial)


def read_config(folder: Path) -> dict[str, Any]:
    """What `moqe.json` holds.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no mixture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Check the path, or train a mixture with --train.")
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as wrong:
        raise ValueError(f"{folder} holds no mixture: {wrong}. Give the folder that --train wrote.") from wrong


def check_experts(folder: Path, experts: Sequence[str | Path] | None) -> list[str]:
    """The paths of a mixture's experts, those given or those noted, after a look at their files.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: they are other ones than the router was trained for.
    """
    noted = read_config(folder)["experts"]
    paths = [str(path) for path in experts or [expert["path"] for expert in noted]]
    check_same_experts(noted, [ExpertIdentity.of(resolve_expert(path)) for path in paths], folder)
    return paths


def load(
    folder: Path,
    *,
    experts: Sequence[str | Path] | None = None,
    dtype: Dtype = "auto",
    gguf_backend: GgufBackend = "transformers",
) -> MoQEModel:
    """Read a mixture and its experts.

    Raises:
        FileNotFoundError, ValueError: as `check_experts` and `read_router`.
    """
    paths = check_experts(folder, experts)
    return read_router(folder, load_experts(paths, dtype=dtype, gguf_backend=gguf_backend))


def read_router(folder: Path, experts: ExpertSet) -> MoQEModel:
    """The mixture of a folder on experts that are loaded already.

    Raises:
        ValueError: a router that cannot be read, or of another shape.
    """
    noted = read_config(folder)
    try:
        router = Router(
            RouterConfig(**noted["router"]), input_size=noted["input_size"], num_experts=len(noted["experts"])
        )
        router.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError, TypeError, KeyError) as wrong:
        raise ValueError(f"The router in {folder} cannot be read: {str(wrong).splitlines()[0]}") from wrong
    return MoQEModel(experts, router, static_weights=noted["static_weights"], default_expert=noted["default_expert"])
