"""What changes the queue: refresh, taking commits, dropping a patch, and moving to another release."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fork_tool.patches import Patch, apply_queue, blob_id, faults, run_git, write_queue
from fork_tool.release import ForkError, Pin, find_sdist, load_release, read_sdist, write_pin
from fork_tool.series import Series, cut_diff, scratch_series
from fork_tool.tree import Fork, build, edited_files, own_files, read_manifest


@dataclass(frozen=True, kw_only=True)
class NewPatch:
    """The header of a patch that is to be made."""

    slug: str
    subject: str
    why: str
    upstream: str

    @property
    def header(self) -> str:
        return f"{self.subject}\n\n{self.why}\n\nUpstream: {self.upstream}"


def refresh(fork: Fork, *, into: str | None = None, new: NewPatch | None = None) -> list[str]:
    """Take hand edits of generated files into the queue, and cut every patch afresh.

    Args:
        into: name of the patch that takes all edits, whole or in part; None sends each file to the last patch that
            touches it.
        new: make a new patch of all edits at the end of the queue instead.

    Returns:
        the files whose edits were taken.

    Raises:
        ForkError: an edit no patch can take, or one that conflicts with a later patch. Nothing is changed then.
    """
    manifest = read_manifest(fork)
    if manifest is None:
        raise ForkError("Nothing has been built yet, so there are no edits to take. Run fork.py build first.")
    pin, patches = fork.pin, fork.patches
    edits = {path: (fork.root / path).read_bytes() for path in edited_files(fork, manifest)}
    edited = list(edits)
    if new and not edited:
        raise ForkError("No generated file was edited, so there is nothing for a new patch. Edit under src/ first.")
    groups = _group_edits(edited, patches, _find_patch(patches, into) if into else None, new)
    release = load_release(pin)
    with scratch_series() as series:
        old_release = release if manifest.pin == pin else load_release(manifest.pin)
        base = series.start(old_release.files)
        commits = series.add(manifest.patches)
        edit_commits = {
            index: series.commit_files({path: edits[path] for path in paths}, "edit")
            for index, paths in groups.items()
        }
        if (manifest.pin, manifest.patches) != (pin, patches):
            base = series.start(release.files)
            commits = series.add(patches)
        tip = commits[-1] if commits else base
        series.checkout(tip)
        for index, edit in edit_commits.items():
            _pick(series, edit, "the patches changed since the tree was built, and change the same lines")
            target = f"fixup! {commits[index]}" if index < len(commits) else new.subject
            series.git("commit", "--quiet", "--amend", "--allow-empty", "--file=-", stdin=target + "\n")
        if edits and commits:
            _rebase(series, patches, commits, "--interactive", "--autosquash", base)
        if new:
            patches = [*patches, Patch(f"{_next_number(patches):04d}-{new.slug}.patch", new.header, "")]
        refreshed = _cut(series, patches, base)
        _accept(fork, pin, release.files, refreshed, series.files())
    build(fork, release=release, taken={path: hashlib.sha256(text).hexdigest() for path, text in edits.items()})
    return edited


def drop(fork: Fork, name: str) -> Patch:
    """Take one patch out of the queue, moving the later ones along, and build. Raises ForkError as `refresh` does."""
    _refuse_edits(fork)
    pin, patches, release = fork.pin, fork.patches, load_release(fork.pin)
    dropped = _find_patch(patches, name)
    kept = [patch for patch in patches if patch != dropped]
    with scratch_series() as series:
        base = series.start(release.files)
        commits = series.add(patches)
        commit = commits[patches.index(dropped)]
        _rebase(series, patches, commits, "--empty=keep", "--onto", f"{commit}~", commit)
        _accept(fork, pin, release.files, _cut(series, kept, base), series.files())
    build(fork, release=release)
    return dropped


def take_commits(fork: Fork, checkout: Path, base: str) -> list[str]:
    """Make the queue of the commits of another repository.

    Args:
        checkout: a git repository whose commit `base` has the files of the pinned release.
        base: every commit after it, up to HEAD, becomes a patch; its message becomes the header. Files that `base`
            lacks are left out (they are modules of ours), and so is a commit that has nothing else.

    Returns:
        the names of the patches.

    Raises:
        ForkError: another text at `base` than in the release, a message without its `Upstream:` line (unless the queue
            has a patch of the same subject), or hand edits in the tree. Nothing is changed then.
    """
    _refuse_edits(fork)
    pin, release = fork.pin, load_release(fork.pin)
    headers = {patch.subject: patch for patch in fork.patches}
    patches: list[Patch] = []
    for commit in run_git(
        "rev-list", "--reverse", "--no-merges", f"{base}..HEAD", cwd=checkout, as_user=True
    ).stdout.split():
        changed = run_git(
            "diff", "--name-only", "--no-renames", f"{commit}~", commit, cwd=checkout, as_user=True
        ).stdout.split()
        paths = [path for path in changed if path in release.files]
        for path in paths:
            found = run_git("rev-parse", f"{base}:./{path}", cwd=checkout, check=False, as_user=True).stdout.strip()
            if found != blob_id(release.files[path]):
                raise ForkError(
                    f"{path} at {base} is not the text of {pin.name} {pin.version}; start from that release."
                )
        if not paths:
            continue
        header = run_git("log", "-1", "--format=%B", commit, cwd=checkout, as_user=True).stdout.strip()
        known = headers.get(header.split("\n", 1)[0])
        if known and "\nUpstream: " not in header:
            header = f"{header}\n\nUpstream: {known.upstream}"
        slug = re.sub(r"[^a-z0-9]+", "-", header.split("\n", 1)[0].lower()).strip("-")[:50].strip("-")
        name = known.name[5:] if known else f"{slug}.patch"
        diff = cut_diff(checkout, f"{commit}~", commit, *paths)
        patches.append(Patch(f"{len(patches) + 1:04d}-{name}", header, diff))
    _accept(fork, pin, release.files, patches, None)
    build(fork, release=release)
    return [patch.name for patch in patches]


def rebase(fork: Fork, version: str) -> tuple[Pin, list[str]]:
    """Move the queue to another release by a three-way merge, then build it.

    Returns:
        the new pin, and the names of patches that were dropped because the release has them already.

    Raises:
        ForkError: hand edits, no such release, or a conflict (patch and files are named). Nothing is changed then.
    """
    _refuse_edits(fork)
    pin, patches = fork.pin, fork.patches
    old = load_release(pin)
    sdist, sha256 = find_sdist(pin.name, version)
    new = read_sdist(sdist)
    if ours := sorted(set(own_files(fork, old.files)) & new.files.keys()):
        raise ForkError(f"{pin.name} {version} has files at paths of our own modules: {', '.join(ours)}. Rename ours.")
    new_pin = dataclasses.replace(pin, version=version, sha256=sha256)
    with scratch_series() as series:
        base = series.start(old.files)
        commits = series.add(patches)
        onto = series.start(new.files)
        if commits:
            series.checkout(commits[-1])
            _rebase(series, patches, commits, "--empty=keep", "--onto", onto, base)
        moved = _cut(series, patches, onto)
        dropped = [patch.name for patch in moved if not patch.diff]
        _accept(fork, new_pin, new.files, [patch for patch in moved if patch.diff], series.files())
    build(fork, release=new)
    return new_pin, dropped


def removed_lines(patches: list[Patch]) -> int:
    return sum(patch.removed for patch in patches)


def _group_edits(
    edited: list[str], patches: list[Patch], into: Patch | None, new: NewPatch | None
) -> dict[int, list[str]]:
    """Which patch, by its place in the queue, takes which edited files; a new patch has the place after the last."""
    if not edited:
        return {}
    if new:
        return {len(patches): edited}
    if into:
        return {patches.index(into): edited}
    last = {path: index for index, patch in enumerate(patches) for path in patch.paths}
    if homeless := [path for path in edited if path not in last]:
        raise ForkError(
            f"No patch touches {', '.join(homeless)}, so refresh cannot tell where the edit belongs. Say so with "
            "--patch NAME, or make a patch of it with --new SLUG."
        )
    groups: dict[int, list[str]] = {}
    for path in edited:
        groups.setdefault(last[path], []).append(path)
    return groups


def _find_patch(patches: list[Patch], name: str) -> Patch:
    found = [patch for patch in patches if name in patch.name]
    if len(found) != 1:
        names = ", ".join(patch.name for patch in found or patches) or "none"
        raise ForkError(f"{len(found)} patches are named like {name!r}, but it must be one. Choose from: {names}.")
    return found[0]


def _next_number(patches: list[Patch]) -> int:
    return max((int(patch.name[:4]) for patch in patches), default=0) + 1


def _pick(series: Series, commit: str, reason: str) -> None:
    if series.git("cherry-pick", "--allow-empty", commit, check=False).returncode:
        raise ForkError(f"Edits of {', '.join(series.conflicts())} cannot be taken: {reason}. Nothing was changed.")


def _rebase(series: Series, patches: list[Patch], commits: list[str], *arguments: str) -> None:
    """Run git rebase on the current commit; a conflict is an error that names the patch and the files."""
    done = series.git("rebase", "--quiet", *arguments, check=False)
    if done.returncode == 0:
        return
    conflicts = series.conflicts()
    said = done.stderr + done.stdout
    if not conflicts and "make\nit empty" in said:
        subject = series.git("log", "-1", "--format=%s").stdout.strip()
        name = next((patch.name for patch in patches if patch.subject == subject), subject)
        raise ForkError(
            f"The edits undo all of patches/{name}. Nothing was changed. To drop a patch, delete the edited files, "
            "build, and run fork.py refresh --drop NAME."
        )
    stopped = series.git("rev-parse", "--verify", "--quiet", "REBASE_HEAD", check=False).stdout.strip()
    name = next((patch.name for patch, commit in zip(patches, commits, strict=True) if commit == stopped), None)
    if not conflicts:
        raise ForkError(f"The queue could not be replayed at {name or 'the edit'}: {' '.join(said.split())}")
    what = f"patches/{name}" if name else "The edit"
    raise ForkError(
        f"{what} conflicts in {', '.join(conflicts)}. Nothing was changed. Another patch or the release changes "
        "the same lines: take the edit into the later patch (refresh --patch NAME), or adapt this patch first."
    )


def _cut(series: Series, patches: list[Patch], base: str) -> list[Patch]:
    """The patches with their headers as they were and their diffs cut from the current series."""
    commits = series.since(base)
    assert len(commits) == len(patches), (commits, patches)
    return [
        dataclasses.replace(patch, diff=series.diff(commit)) for patch, commit in zip(patches, commits, strict=True)
    ]


def _accept(
    fork: Fork, pin: Pin, files: dict[str, bytes], patches: list[Patch], expected: dict[str, bytes] | None
) -> None:
    """Write the queue (and the pin and README's count), after checking its form and that it builds `expected`."""
    if wrong := [f"patches/{patch.name}: {fault}" for patch in patches for fault in faults(patch)]:
        raise ForkError(f"{'; '.join(wrong)}. Nothing was changed.")
    built = apply_queue(files, patches)
    assert expected is None or built == expected, "the queue that was cut does not build the tree it was cut from"
    write_queue(fork.root / "patches", patches)
    if pin != fork.pin:
        write_pin(fork.root / "upstream.toml", pin)
    readme = fork.root / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        counted = re.sub(r"(?mi)^(removed lines: )\d+", rf"\g<1>{removed_lines(patches)}", text)
        if counted != text:
            readme.write_text(counted, encoding="utf-8")


def _refuse_edits(fork: Fork) -> None:
    manifest = read_manifest(fork)
    if manifest and (edited := edited_files(fork, manifest)):
        raise ForkError(f"Edited by hand and not in the queue: {', '.join(edited)}. Run fork.py refresh first.")
