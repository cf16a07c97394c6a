"""Holds that the queue, the built tree, README and what git tracks agree with the pinned release."""

import re
import shutil
import tomllib

from fork_tool.moves import removed_lines
from fork_tool.patches import apply_queue, blob_id, faults, run_git
from fork_tool.pull_request import read_plan
from fork_tool.release import ForkError, Release, load_release
from fork_tool.tree import Fork, is_leftover, own_files, read_manifest, stray_files


def check(fork: Fork) -> tuple[list[str], list[str]]:
    """Check everything that can drift apart.

    Returns:
        the report (one line a patch and a total), and what is wrong, empty when nothing is.

    Raises:
        ForkError: the release cannot be had, or a patch does not apply to it.
    """
    pin, patches, release = fork.pin, fork.patches, load_release(fork.pin)
    built = {path: text for path, text in apply_queue(release.files, patches).items() if path.startswith("src/")}
    report = [f"+{patch.added:<4} -{patch.removed:<4} {patch.name}: {patch.subject}" for patch in patches]
    removed = removed_lines(patches)
    report.append(
        f"{len(patches)} patches on {pin.name} {pin.version}, added lines: "
        f"{sum(patch.added for patch in patches)}, removed lines: {removed}"
    )
    wrong = [f"patches/{patch.name}: {fault}" for patch in patches for fault in faults(patch)]
    numbers = [patch.name[:4] for patch in patches]
    if len(set(numbers)) < len(numbers):
        wrong.append("two patches have the same number")
    if len({patch.subject for patch in patches}) < len(patches):
        wrong.append("two patches have the same subject")
    wrong += _drift(fork, built) + _readme(fork, removed) + _packaging(fork, release) + _series(fork, release)
    return report, wrong + _tracked(fork, release)


def _drift(fork: Fork, built: dict[str, bytes]) -> list[str]:
    """Where the tree under src/ is not what the queue builds."""
    manifest = read_manifest(fork)
    if manifest is None:
        return ["the tree under src/ has not been built; run fork.py build"]
    wrong = []
    for path, text in built.items():
        target = fork.root / path
        if not target.is_file():
            wrong.append(f"{path} is missing; run fork.py build")
        elif target.read_bytes() != text:
            wrong.append(f"{path} is not what the queue builds; run fork.py refresh (a hand edit) or fork.py build")
    wrong += [f"{path} is left over; run fork.py build" for path in manifest.files.keys() - built.keys()]
    own = own_files(fork, built.keys() | manifest.files.keys())
    return wrong + [f"{path} is ours but git ignores it; put 'moe' in its name" for path in stray_files(own)]


def _readme(fork: Fork, removed: int) -> list[str]:
    """README.md states the number of removed lines."""
    readme = fork.root / "README.md"
    stated = re.search(r"(?mi)^removed lines: (\d+)", readme.read_text(encoding="utf-8") if readme.is_file() else "")
    if not stated:
        return ["README.md has no line 'Removed lines: N'"]
    return [] if int(stated[1]) == removed else [f"README.md says removed lines: {stated[1]}, but it is {removed}"]


def _packaging(fork: Fork, release: Release) -> list[str]:
    """The extras in pyproject.toml are upstream's."""
    project = tomllib.loads((fork.root / "pyproject.toml").read_text(encoding="utf-8"))
    theirs = set(release.metadata.get_all("Provides-Extra", []))
    ours = set(project["tool"]["setuptools"]["dynamic"].get("optional-dependencies", {}))
    return [] if ours == theirs else [f"pyproject.toml has extras {sorted(ours)}, but upstream has {sorted(theirs)}"]


def _series(fork: Fork, release: Release) -> list[str]:
    """series.toml gives each file of ours to one commit of the pull request."""
    try:
        read_plan(fork, release.files)
    except ForkError as refused:
        return [str(refused)]
    return []


def _tracked(fork: Fork, release: Release) -> list[str]:
    """git tracks no file of upstream: neither at its path nor, anywhere in the repository, with its content."""
    if shutil.which("git") is None:
        raise ForkError("git is needed to see which files are tracked and is not on the PATH.")
    listed = run_git("ls-files", "--stage", "-z", "--", ":/", cwd=fork.root, check=False, as_user=True)
    if listed.returncode:
        return []  # A copy without git, such as an unpacked source distribution, tracks nothing.
    blobs = {blob_id(text): path for path, text in release.files.items() if text.strip()}
    wrong = []
    for entry in listed.stdout.split("\0")[:-1]:
        stage, path = entry.split("\t", 1)
        if path in release.files and not is_leftover(path):
            wrong.append(f"{path} is upstream's and must not be tracked by git; run git rm --cached on it")
        elif (blob := stage.split()[1]) in blobs:
            wrong.append(f"{path} is tracked by git and is a copy of upstream's {blobs[blob]}")
    return wrong
