"""The built tree: what upstream's release and the patches give, and laying it under src/ beside our own modules.

Three kinds of files lie under src/: generated ones (upstream's, patched; ignored by git, hashes in a manifest), our
own modules (tracked; `moe` in their file or folder name; never touched here), and left-overs of Python and setuptools.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fork_tool.patches import Patch, apply_queue, encode, read_queue
from fork_tool.release import ForkError, Pin, Release, load_release, read_pin


try:
    import fcntl
except ImportError:  # Windows has none: two builds at the same moment are not kept apart there.
    fcntl = None

# Changes when the same pin and patches give other generated files.
LAYOUT = 1


@dataclass(frozen=True)
class Fork:
    """A folder that holds a fork, such as the one this file lies in."""

    root: Path

    @property
    def pin(self) -> Pin:
        return read_pin(self.root / "upstream.toml")

    @property
    def patches(self) -> list[Patch]:
        return read_queue(self.root / "patches")

    @property
    def state(self) -> Path:
        """Folder of what the build writes for itself and for setuptools; ignored by git."""
        return self.root / ".fork"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the last build laid.

    Args:
        pin, patches: what it was built from.
        files: path -> sha256 of each generated file.
    """

    pin: Pin
    patches: list[Patch]
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Laid:
    """What a build did: numbers of files."""

    written: int
    removed: int
    unchanged: int


def build(fork: Fork, *, release: Release | None = None, taken: dict[str, str] | None = None) -> Laid:
    """Lay upstream's files with the patches applied under src/, whole or not at all.

    Args:
        release: the pinned release when the caller has read it already.
        taken: path -> sha256 of hand edits that are safe in the queue and may be written over.

    Raises:
        ForkError: wrong hash, a patch that does not apply, hand edits, or a file in the way. Nothing is changed then.
    """
    with locked(fork):
        pin, patches = fork.pin, fork.patches
        manifest = read_manifest(fork)
        if manifest and (manifest.pin, manifest.patches) == (pin, patches):
            present = {path: _disk_hash(fork.root / path) for path in manifest.files}
            extra = [fork.root / "LICENSE", fork.root / "NOTICE", fork.state / "version.txt"]
            if present == manifest.files and all(path.is_file() for path in extra):
                return Laid(written=0, removed=0, unchanged=len(present))
        release = release or load_release(pin)
        files = {path: text for path, text in apply_queue(release.files, patches).items() if path.startswith("src/")}
        laid = _lay(fork, files, manifest.files if manifest else {}, taken or {})
        for path, content in packaging_files(pin, patches, release).items():
            _write_if_changed(fork.root / path, content)
        hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        _write_manifest(fork, Manifest(pin=pin, patches=patches, files=hashes))
        return laid


def edited_files(fork: Fork, manifest: Manifest) -> list[str]:
    """Generated files whose content is not what the last build wrote. A deleted file is none: a build restores it."""
    hashes = {path: _disk_hash(fork.root / path) for path in manifest.files}
    return [path for path, found in hashes.items() if found not in (None, manifest.files[path])]


def own_files(fork: Fork, generated: set[str] | dict) -> list[str]:
    """Paths under src/ that no build laid: our own modules, and strays (`stray_files`)."""
    paths = (path for path in (fork.root / "src").rglob("*") if path.is_file())
    names = (path.relative_to(fork.root).as_posix() for path in paths)
    return sorted(name for name in names if name not in generated and not is_leftover(name))


def stray_files(own: list[str]) -> list[str]:
    """Those of our own files that git ignores, because neither the file nor a folder has `moe` in its name."""
    return [path for path in own if not any("moe" in part for part in PurePosixPath(path).parts)]


def is_leftover(path: str) -> bool:
    """Whether a tool wrote this file or folder (Python, setuptools, or one that hides it) rather than a person."""
    parts = PurePosixPath(path).parts
    return any(part == "__pycache__" or part.endswith(".egg-info") or part.startswith(".") for part in parts)


def packaging_files(pin: Pin, patches: list[Patch], release: Release) -> dict[str, bytes]:
    """What setuptools reads beside pyproject.toml: version, upstream's dependencies and extras, licence and notice."""
    requirements: dict[str | None, list[str]] = {None: []} | {
        extra: [] for extra in release.metadata.get_all("Provides-Extra", [])
    }
    for line in release.metadata.get_all("Requires-Dist", []):
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", line)
        plain = re.sub(r"""(;|\band)\s*extra\s*==\s*['"][^'"]+['"]\s*""", "", line).strip()
        requirements.setdefault(extra[1] if extra else None, []).append(plain)
    changed = sorted({path for patch in patches for path in patch.paths if path.startswith("src/")})
    notice = [
        f"This distribution is PEFT {pin.version} of the Hugging Face team (https://github.com/huggingface/peft,",
        "Apache-2.0) with changes, built by a patch queue. It is not a release of the Hugging Face team.",
        "",
        "Added: the modules whose file or folder name holds 'moe'. Changed files:",
        *(f"  {path.removeprefix('src/')}" for path in changed or ["none"]),
    ]
    texts = {".fork/version.txt": pin.fork_version, "NOTICE": "\n".join(notice)}
    for extra, lines in requirements.items():
        texts[f".fork/extra-{extra}.txt" if extra else ".fork/dependencies.txt"] = "\n".join(lines)
    return {path: encode(text + "\n") for path, text in texts.items()} | {"LICENSE": release.licence}


def read_manifest(fork: Fork) -> Manifest | None:
    """What the last build laid, None before the first one."""
    try:
        fields = json.loads((fork.state / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ForkError(f"{fork.state / 'manifest.json'} is damaged. Delete it and build again.") from None
    if fields["layout"] != LAYOUT:
        raise ForkError(f"{fork.state} was written by another version of fork.py. Delete it and build again.")
    patches = [Patch.parse(name, text) for name, text in fields["patches"].items()]
    return Manifest(pin=Pin(**fields["pin"]), patches=patches, files=fields["files"])


@contextmanager
def locked(fork: Fork) -> Iterator[None]:
    """Keep two builds of one folder apart; the second waits."""
    try:
        fork.state.mkdir(exist_ok=True)
        with (fork.state / "lock").open("w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except PermissionError as refused:
        raise ForkError(f"{refused.filename or fork.root} cannot be written; the build lays files there.") from None


def _lay(fork: Fork, files: dict[str, bytes], known: dict[str, str], taken: dict[str, str]) -> Laid:
    """Bring the generated files on disk to `files`; see `build`. `known` is the last manifest's path -> sha256."""
    write, remove, edited, foreign = [], [], [], []
    for path in sorted(files.keys() | known.keys()):
        disk = _disk_hash(fork.root / path)
        target = hashlib.sha256(files[path]).hexdigest() if path in files else None
        if disk == target:
            continue
        if disk in (None, known.get(path), taken.get(path)):
            (write if target else remove).append(path)
        else:
            (edited if path in known else foreign).append(path)
    if edited:
        raise ForkError(
            f"{len(edited)} generated file(s) were edited by hand: {', '.join(edited)}. Nothing was changed. Run "
            "`python peft/fork.py refresh` to take the edits into the patches, or delete the files to drop the edits."
        )
    if ours := [path for path in foreign if not stray_files([path])]:
        raise ForkError(
            f"The release has files at paths of our own modules: {', '.join(ours)}. Nothing was changed. Rename ours."
        )
    if foreign:
        raise ForkError(
            f"{len(foreign)} file(s) that no build wrote lie where upstream's files go: {', '.join(foreign[:10])}. "
            "Nothing was changed. Move them away (or delete them, if they are left over) and build again."
        )
    _swap(fork, {path: files[path] for path in write}, remove)
    return Laid(written=len(write), removed=len(remove), unchanged=len(files) - len(write))


def _swap(fork: Fork, write: dict[str, bytes], remove: list[str]) -> None:
    """Write and remove files by renaming; when one step fails, the ones before it are undone."""
    with tempfile.TemporaryDirectory(dir=fork.state, prefix="building-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        for path, content in write.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_bytes(content)
        done = []
        try:
            for path in [*remove, *write]:
                target = fork.root / path
                if target.exists():
                    (old / path).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(target, old / path)
                done.append(path)
                if path in write:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(new / path, target)
        except OSError as refused:
            for path in done:
                (fork.root / path).unlink(missing_ok=True)
                if (old / path).exists():
                    shutil.move(old / path, fork.root / path)
            raise ForkError(
                f"The build could not write {refused.filename}: {refused.strerror}. It was undone."
            ) from None
    for folder in sorted({(fork.root / path).parent for path in remove}, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _write_if_changed(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)


def _write_manifest(fork: Fork, manifest: Manifest) -> None:
    fields = {
        "layout": LAYOUT,
        "pin": vars(manifest.pin),
        "patches": {patch.name: patch.text for patch in manifest.patches},
        "files": manifest.files,
    }
    scratch = fork.state / "manifest.next.json"
    scratch.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, fork.state / "manifest.json")


def _disk_hash(path: Path) -> str | None:
    """sha256 of a file, None when there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
