"""Which checkpoint of a broken run can be trusted, and which base model an adapter belongs to.

transformers writes a checkpoint file by file into its final folder. A run that is killed meanwhile leaves a folder
that looks like a checkpoint and is none. So a list of the files and their sizes is put into a checkpoint after all of
it has been written; a folder without that list, or whose files differ from it, was cut off and is never resumed from.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import torch
from transformers import TrainerCallback

from moe_common.models.base_identity import BaseIdentity
from moe_common.runs.whole_files import write_json

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
BASE = "base.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path) -> None:
    """Note in a checkpoint that all its files have been written."""
    write_json(checkpoint / COMPLETE, _sizes(checkpoint))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint holds all that was written into it, each file at its full size."""
    try:
        noted = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return noted == _sizes(checkpoint)


def newest_complete(folder: Path) -> Path | None:
    """The last checkpoint in a folder that was written to its end, or None; says which later ones are passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s was cut off while it was written; the one before it is used", checkpoint)
    return None


def remove_incomplete(folder: Path) -> None:
    """Delete the checkpoints that were cut off, so that none of their files is mistaken for one of the next run."""
    for checkpoint in checkpoints(folder):
        if not is_complete(checkpoint):
            shutil.rmtree(checkpoint)


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
            BaseIdentity.from_dict(json.loads((folder / BASE).read_text(encoding="utf-8"))).check_is(found)
        except ValueError as other:
            raise ValueError(f"{folder}: {other}") from other


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(files)
        if path.name != COMPLETE and path.suffix != ".partial"
    }
