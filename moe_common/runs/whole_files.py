"""Files and folders that are there whole or not at all: written beside their place, then renamed."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = re.compile(r".+\.(\d+)\.partial")


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; the file takes its place when the block ends without an error, and is deleted otherwise.

        with whole_file("weights.safetensors") as partial:
            save_file(tensors, partial)

    Folders on the way are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    sweep(path.parent, path.name)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it takes its place when the block ends without an error, and is deleted otherwise.

    Who may read the folder may read its files: safetensors makes them readable to their owner alone.

    Raises:
        FileExistsError: something other than an empty folder is in that place, before the block or after it.
    """
    path = Path(path)
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    sweep(path.parent, path.name)
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


def check_free(path: str | Path) -> None:
    """Refuse a place where something other than an empty folder is.

    Raises:
        FileExistsError: it is taken.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already. Name another place, or remove it.")


def check_writable(path: str | Path) -> None:
    """Refuse a place that cannot be written to, before anything is computed for it.

    Raises:
        OSError: a name is too long, links go round in a circle, a folder on the way is a file, or one may not be
            written.
    """
    path = Path(path).absolute()
    for place in (path, partial_of(path)):
        with contextlib.suppress(FileNotFoundError):
            place.stat()
    parent = next(folder for folder in path.parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "This folder may not be written", str(parent))


def partial_of(path: Path) -> Path:
    """Where this process writes what will be in `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def sweep(folder: Path, name: str = "*") -> None:
    """Remove the half-written files and folders of processes that are dead.

    Args:
        folder: to look in; not below it.
        name: of the finished file, as a pattern.
    """
    for left in folder.glob(f"{name}.*.partial"):
        match = PARTIAL.fullmatch(left.name)
        if match and not _is_alive(int(match[1])):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        ValueError: a number in it is not finite, which JSON cannot hold; says which.
    """
    if (where := _not_finite(content)) is not None:
        name, value = where
        raise ValueError(
            f"{name or 'the result'} is {value}, so {path} is not written: JSON holds finite numbers only."
        )
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON in UTF-8, or nested too deeply; names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as wrong:
        raise ValueError(f"{path} is not JSON: {wrong}. Restore the file, or remove it.") from wrong


def _not_finite(content: Any, name: str = "") -> tuple[str, float] | None:
    """The first number that is not finite, as (its place, it)."""
    if isinstance(content, float):
        return None if math.isfinite(content) else (name, content)
    if isinstance(content, dict):
        held = content.items()
    elif isinstance(content, list | tuple):
        held = enumerate(content)
    else:
        return None
    found = (_not_finite(value, f"{name}.{key}" if name else str(key)) for key, value in held)
    return next((where for where in found if where is not None), None)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        return True
    return True
