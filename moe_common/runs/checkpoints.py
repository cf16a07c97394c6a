"""Which checkpoint of an interrupted run can be trusted, and which base model an adapter belongs to.

transformers writes a checkpoint file by file into its final folder. A run that is killed meanwhile leaves a folder
that looks like a checkpoint and is none. So a list of the files and their SHA-256 is put into a checkpoint after all
of it has been written; a folder without that list, or whose files differ from it, is never resumed from.
"""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from moe_common.models.base_identity import BaseIdentity
from moe_common.runs.downloads import file_sha256
from moe_common.runs.whole_files import PARTIAL, read_json, remove, whole_file, write_json

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
BASE = "base.json"
STATE = "state.pt"
KEPT = 2  # checkpoints, so that a damaged one has one before it
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path) -> None:
    """Note in a checkpoint that all its files have been written, and what they hold."""
    write_json(checkpoint / COMPLETE, _hashes(checkpoint))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint holds all that was written into it, unchanged."""
    try:
        return read_json(checkpoint / COMPLETE) == _hashes(checkpoint)
    except (OSError, ValueError):
        return False


def newest_complete(folder: Path, *, removes_others: bool = False) -> Path | None:
    """The last checkpoint in a folder that is whole, or None; the log names later ones that are not.

    Args:
        folder: of the checkpoints.
        removes_others: delete those that are not whole, so that none of their files is mistaken for one of the next
            run.
    """
    whole = None
    for checkpoint in reversed(checkpoints(folder)):
        if is_complete(checkpoint):
            whole = whole or checkpoint
            continue
        if whole is None:
            logger.warning("%s is damaged or was cut off while it was written; the one before it is used", checkpoint)
        if removes_others:
            remove(checkpoint)
    return whole


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, oldest first, broken ones included."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(CHECKPOINT.fullmatch(path.name)[1]))


class MarkCompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint of a Trainer when all processes have written their part of it."""

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def save_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values, and remove all but the one before it.

    Raises:
        OSError: it cannot be written.
    """
    checkpoint = folder / f"checkpoint-{step}"
    with whole_file(checkpoint / STATE) as partial:
        torch.save(state, partial)
    mark_complete(checkpoint)
    for older in checkpoints(folder)[:-KEPT]:
        remove(older)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint that `save_state` wrote, or None; those that are not whole are removed."""
    checkpoint = newest_complete(folder, removes_others=True)
    if checkpoint is None:
        return None
    logger.info("continuing from %s", checkpoint)
    return torch.load(checkpoint / STATE, weights_only=True, map_location="cpu")


def weights_of(folder: str | Path) -> str:
    """A checksum of the files of weights in a folder; empty where it is none, as a hub model is not."""
    found = [file for name in ("*.safetensors", "*model*.bin") for file in sorted(Path(folder).glob(name))]
    return hashlib.sha256("".join(map(file_sha256, found)).encode()).hexdigest()[:16] if found else ""


def save_base_identity(folder: Path, base: BaseIdentity) -> None:
    """Note in a folder which base model its adapter was trained on."""
    write_json(folder / BASE, base.to_dict())


def check_base(folder: Path, found: BaseIdentity) -> None:
    """Refuse to put what lies in a folder onto another base model than it was trained on.

    Args:
        folder: of an adapter; nothing is checked where `save_base_identity` noted nothing.
        found: the base at hand.

    Raises:
        ValueError: they differ in shape or in weights; the message names both.
    """
    if (folder / BASE).exists():
        try:
            BaseIdentity.from_dict(read_json(folder / BASE)).check_is(found)
        except (TypeError, KeyError) as edited:
            raise ValueError(f"{folder / BASE} does not describe a base model: {edited}.") from edited
        except ValueError as other:
            raise ValueError(f"{folder}: {other}") from other


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return {
        path.relative_to(checkpoint).as_posix(): file_sha256(path)
        for path in sorted(files)
        if path.name != COMPLETE and not PARTIAL.fullmatch(path.name)
    }
