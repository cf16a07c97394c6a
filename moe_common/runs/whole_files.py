"""Files and folders that are there whole or not at all: written beside their place, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; the file takes its place when the block ends without an error, and is deleted otherwise.

        with whole_file("weights.safetensors") as partial:
            save_file(tensors, partial)

    Folders on the way are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it takes its place when the block ends without an error, and is deleted otherwise.

    Who may read the folder may read its files: safetensors makes them readable to their owner alone.

    Raises:
        FileExistsError: something other than an empty folder is in that place, before the block or after it.
    """
    path = Path(path)
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        rights = partial.stat().st_mode & 0o666
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(rights)
        try:
            os.replace(partial, path)
        except OSError as taken:
            raise FileExistsError(f"{path} was made by another program meanwhile.") from taken
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(folder: str | Path) -> None:
    """Refuse an output folder that holds something, before anything is computed for it.

    Raises:
        FileExistsError: something other than an empty folder is in that place.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already. Name another folder, or remove it.")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")
