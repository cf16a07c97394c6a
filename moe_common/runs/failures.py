"""The one place where an error of the world becomes a line: what a user can set right, by option, file or machine.

An error of the program is not among them and keeps its traceback.
"""

import errno
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from jinja2 import TemplateError
from pyarrow import ArrowException
from safetensors import SafetensorError

from moe_common.runs.downloads import DownloadError

# An option, a path, a package, a connection; a file that is damaged; a machine that is full.
WORLD = (
    ValueError,
    OSError,
    OverflowError,
    RecursionError,
    MemoryError,
    EOFError,
    RuntimeError,  # of which `as_line` knows a few
    ModuleNotFoundError,
    TemplateError,
    ArrowException,
    SafetensorError,
    UnpicklingError,
    zipfile.BadZipFile,
    DownloadError,
)
REMEDIES = {
    errno.ENOSPC: "Free some space, or name another folder; the same command goes on.",
    errno.EDQUOT: "Free some space, or name another folder; the same command goes on.",
    errno.EROFS: "Name a place that can be written to.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.ELOOP: "Its links go round in a circle; give the path of the file itself.",
}
# How torch says that a file could not be written, is no whole file, or that a number of the user's is too large.
WORDS_OF_TORCH = (
    "PytorchStreamWriter failed",
    "PytorchStreamReader failed",
    "unexpected pos",
    "inline_container",
    "without overflow",
)


def as_line(failed: BaseException) -> str | None:
    """What to tell the user, in a line; None for an error of the program."""
    if isinstance(failed, OSError) and failed.errno in REMEDIES:
        return f"{failed}. {REMEDIES[failed.errno]}"
    if isinstance(failed, DownloadError):
        return str(failed)
    if isinstance(failed, torch.OutOfMemoryError | MemoryError):
        return f"Memory is exhausted: {_first_line(failed)} Lower the batch size or the length of the rows."
    if isinstance(failed, RecursionError):
        return "A file is nested too deeply to be read. Check those that are named in the command."
    if isinstance(failed, UnpicklingError):
        return "A file of weights is damaged, or holds more than tensors, and is not read."
    if isinstance(failed, RuntimeError):
        known = any(words in str(failed) for words in WORDS_OF_TORCH)
        return f"torch could not go on: {_first_line(failed)}." if known else None
    return str(failed) or type(failed).__name__


@contextmanager
def reading(what: str | Path, remedy: str = "Restore it, or name another.") -> Iterator[None]:
    """Name what is read where a library cannot read it, whatever the library raises.

    Args:
        what: the file or folder, as the user knows it.
        remedy: what to do.

    Raises:
        ValueError: it cannot be read; says why, in a line.
    """
    try:
        yield
    except (FileNotFoundError, ModuleNotFoundError, DownloadError):
        raise
    except Exception as wrong:  # a hand-edited file may raise anything inside the library that reads it
        if str(what) in str(wrong) and isinstance(wrong, ValueError | OSError):
            raise
        raise ValueError(f"{what} cannot be read: {type(wrong).__name__}: {_first_line(wrong)}. {remedy}") from wrong


def _first_line(failed: BaseException) -> str:
    said = str(failed).strip().splitlines()
    return said[0].rstrip(".") if said else type(failed).__name__
