"""A trained mixture in a folder: its router, and which experts it was trained for; the experts' weights stay put.

moqe.json             the router's config, the experts, static weights, the default expert, what was noted in training
router.safetensors
tokenizer files       those of the experts
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from moe_common.runs.whole_files import whole_folder, write_json
from moe_ext.moqe.experts.expert import resolve_expert
from moe_ext.moqe.experts.identity import ExpertIdentity, check_same_experts
from moe_ext.moqe.mixture.router import Router, RouterConfig

CONFIG, WEIGHTS = "moqe.json", "router.safetensors"


@dataclass(frozen=True)
class StoredMixture:
    """What the folder of a mixture holds beside the tokenizer.

    Args:
        router: with its weights.
        experts: which ones it was trained for, in order.
        static_weights: [E], as `MoQEModel` takes them.
        default_expert: the number of the best single expert.
        training: what was noted of it.
    """

    router: Router
    experts: Sequence[ExpertIdentity]
    static_weights: Sequence[float]
    default_expert: int
    training: dict[str, Any]


def write_mixture(folder: Path, stored: StoredMixture, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a mixture, whole or not at all.

    Raises:
        FileExistsError: the folder holds something.
    """
    with whole_folder(folder) as partial:
        write_json(
            partial / CONFIG,
            {
                "router": asdict(stored.router.config),
                "input_size": stored.router.input_size,
                "experts": [identity.to_dict() for identity in stored.experts],
                "static_weights": list(stored.static_weights),
                "default_expert": stored.default_expert,
                "training": stored.training,
            },
        )
        save_file({name: tensor.cpu() for name, tensor in stored.router.state_dict().items()}, partial / WEIGHTS)
        tokenizer.save_pretrained(partial)


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


def read_mixture(folder: Path) -> StoredMixture:
    """What `write_mixture` wrote, without the experts.

    Raises:
        ValueError: a router that cannot be read, or of another shape.
    """
    noted = read_config(folder)
    try:
        router = Router(
            RouterConfig(**noted["router"]), input_size=noted["input_size"], num_experts=len(noted["experts"])
        )
        router.load_state_dict(load_file(folder / WEIGHTS))
        experts = [ExpertIdentity(**expert) for expert in noted["experts"]]
        return StoredMixture(router, experts, noted["static_weights"], noted["default_expert"], noted["training"])
    except (SafetensorError, OSError, RuntimeError, TypeError, KeyError) as wrong:
        raise ValueError(f"The router in {folder} cannot be read: {str(wrong).splitlines()[0]}") from wrong
