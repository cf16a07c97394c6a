"""The pinned release of upstream: written down in upstream.toml, fetched by package name, checked, kept, read.

The source distribution is asked of pip by name, so the user's own pip configuration decides where it comes from; no
address stands here. What was fetched is kept in a cache folder named by its sha256, and read from there afterwards.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath


# The user's settings for their own downloads, which would refuse or redirect this one.
BUILD_HOOK_SETTINGS = ("PEP517_", "_PYPROJECT_HOOKS_")
FOREIGN_PIP_SETTINGS = ("PIP_CONSTRAINT", "PIP_REQUIREMENT", "PIP_REQUIRE_HASHES", "PIP_NO_BINARY", "PIP_ONLY_BINARY")


class ForkError(Exception):
    """What a user can answer; the command line and the build hooks print it as one line, without a traceback."""


@dataclass(frozen=True, kw_only=True)
class Pin:
    """The release this fork is cut against.

    Args:
        name: package name of upstream, and of the fork.
        version: upstream's version.
        sha256: hash of upstream's source distribution (`.tar.gz`), 64 hex digits.
        suffix: local part of the fork's version, as in `0.21.2+moe.1`.
    """

    name: str
    version: str
    sha256: str
    suffix: str

    def __post_init__(self):
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ForkError(f"upstream.toml: sha256 is {self.sha256!r}, but must be 64 lower-case hex digits.")

    @property
    def fork_version(self) -> str:
        return f"{self.version}+{self.suffix}"


@dataclass(frozen=True, kw_only=True)
class Release:
    """An upstream release in memory.

    Args:
        files: path (`src/...` or `tests/...`, with forward slashes) -> content.
        licence: text of upstream's LICENSE.
        metadata: the fields of upstream's PKG-INFO.
    """

    files: dict[str, bytes]
    licence: bytes
    metadata: Message


def read_pin(path: Path) -> Pin:
    """Read upstream.toml. Raises ForkError when it is missing or a key is missing or unknown."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
        return Pin(**fields)
    except FileNotFoundError:
        raise ForkError(f"{path} is missing; it names the upstream release and its sha256.") from None
    except (tomllib.TOMLDecodeError, TypeError) as refused:
        raise ForkError(f"{path} must hold exactly name, version, sha256 and suffix as strings: {refused}") from None


def write_pin(path: Path, pin: Pin) -> None:
    """Change version and sha256 in upstream.toml, leaving its comments and order alone."""
    text = path.read_text(encoding="utf-8")
    for key in ("version", "sha256"):
        text = re.sub(rf'(?m)^{key} = ".*"$', f'{key} = "{getattr(pin, key)}"', text)
    path.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """`$PEFT_FORK_CACHE`, or `peft-moe-fork` in the user's cache folder."""
    if own := os.environ.get("PEFT_FORK_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-moe-fork"


def find_sdist(name: str, version: str, sha256: str | None = None) -> tuple[Path, str]:
    """Find a release in the cache, or fetch it into the cache.

    Args:
        sha256: what the file must hash to; None (a release not pinned yet) takes what the package index gives.

    Returns:
        the file and its sha256.

    Raises:
        ForkError: no such release, no pip, no network, or another hash than the one asked for. Nothing is kept then.
    """
    file_name = f"{name}-{version}.tar.gz"
    for kept in sorted(cache_folder().glob(f"{sha256 or '*'}/{file_name}")):
        if _hash(kept) == kept.parent.name:
            return kept, kept.parent.name
        kept.unlink()  # A damaged copy: fetch it anew.
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="fetching-") as scratch:
        fetched = _fetch_with_pip(name, version, sha256, Path(scratch))
        found = _hash(fetched)
        if sha256 and found != sha256:
            raise _wrong_hash(file_name, found, sha256)
        kept = cache_folder() / found / file_name
        kept.parent.mkdir(exist_ok=True)
        os.replace(fetched, kept)
    return kept, found


def read_sdist(path: Path) -> Release:
    """Read a source distribution without running or unpacking it.

    Raises:
        ForkError: it is no source distribution with src/, LICENSE and PKG-INFO in one top folder.
    """
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if member.isfile() and ".." not in inside.parts:
                    files[str(inside)] = archive.extractfile(member).read()
    except tarfile.TarError as refused:
        raise ForkError(f"{path} cannot be read as a source distribution (.tar.gz): {refused}") from None
    missing = [name for name in ("PKG-INFO", "LICENSE") if name not in files]
    if missing or not any(name.startswith("src/") for name in files):
        raise ForkError(f"{path} lacks {' and '.join(missing) or 'src/'}; expected a source distribution of peft.")
    return Release(
        files={
            name: content
            for name, content in sorted(files.items())
            if name.startswith(("src/", "tests/")) and ".egg-info/" not in name
        },
        licence=files["LICENSE"],
        metadata=Parser().parsestr(files["PKG-INFO"].decode("utf-8")),
    )


def load_release(pin: Pin) -> Release:
    """The pinned release, from the cache or else from the package index."""
    return read_sdist(find_sdist(pin.name, pin.version, pin.sha256)[0])


def _fetch_with_pip(name: str, version: str, sha256: str | None, folder: Path) -> Path:
    """Have pip put the source distribution into `folder`.

    pip runs a source distribution's set-up script to read its metadata. It compares the hash first, so a file that
    is not the pinned one is never run.
    """
    wanted = f"{name}=={version}"
    requirements = folder / "wanted.txt"
    requirements.write_text(wanted + (f" --hash=sha256:{sha256}" if sha256 else "") + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-binary", name, "--dest", str(folder), "--requirement", str(requirements)]
    if importlib.util.find_spec("setuptools") and importlib.util.find_spec("wheel"):
        command.append("--no-build-isolation")  # Reading the metadata then fetches nothing else.
    # Inside a build hook, pip has told this process which backend to load; its child must not load that one too.
    foreign = (*FOREIGN_PIP_SETTINGS, *(key for key in os.environ if key.startswith(BUILD_HOOK_SETTINGS)))
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    print(f"fetching the source distribution of {wanted} through pip", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0 and (fetched := sorted(folder.glob("*.tar.gz"))):
        return fetched[0]
    if sha256 and (got := re.search(r"Got\s+([0-9a-f]{64})", done.stdout + done.stderr)):
        raise _wrong_hash(f"{name}-{version}.tar.gz", got[1], sha256)
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no .tar.gz"]
    by_hand = cache_folder() / (sha256 or "<its sha256>") / f"{name}-{version}.tar.gz"
    raise ForkError(
        f"pip could not fetch the source distribution of {wanted}: {reasons[-1].rstrip('.')}. Check the network and "
        "pip's configuration (only its files and PIP_* variables reach this step), or put the file at "
        f"{by_hand}."
    )


def _wrong_hash(file_name: str, found: str, expected: str) -> ForkError:
    return ForkError(
        f"{file_name} has sha256 {found}, but upstream.toml pins {expected}. Nothing was kept. Find out why before "
        "trusting either: a mirror may have been tampered with, or the pin was copied wrongly."
    )


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
