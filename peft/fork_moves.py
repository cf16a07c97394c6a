"""What changes the queue or hands it on: refresh, taking commits, rebase, and the pull-request series."""

import dataclasses
import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fork_patches import Patch, apply_queue, blob_id, faults, run_git, write_queue
from fork_release import ForkError, Pin, find_sdist, load_release, read_sdist, write_pin
from fork_series import Series, cut_diff, scratch_series
from fork_tree import Fork, build, edited_files, is_leftover, own_files, read_manifest, stray_files


# Where our own files go in a checkout of upstream.
PLACES = {"src": "src", "tests": "tests", "docs": "docs/source", "examples": "examples"}


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


def write_pull_request(fork: Fork, checkout: Path, branch: str) -> list[str]:
    """Write the series onto a new branch of an upstream checkout and switch to it.

    The first commit adds our own files (modules, tests, docs pages, examples), then comes one commit a patch, merged
    three-way onto whatever the checkout has. All of it is made in a clone, so a failure leaves the checkout alone.

    Returns:
        the subjects of the commits.

    Raises:
        ForkError: not a clean git checkout, the branch exists, a file of ours exists there, or a conflict.
    """
    if run_git("rev-parse", "--show-prefix", cwd=checkout, check=False, as_user=True).stdout != "\n":
        raise ForkError(
            f"{checkout} is not the top folder of a git checkout. Name a checkout of upstream's repository."
        )
    if dirty := run_git("status", "--porcelain", cwd=checkout, as_user=True).stdout.splitlines():
        raise ForkError(
            f"{checkout} has {len(dirty)} uncommitted change(s), such as {dirty[0][3:]}. Commit or stash first."
        )
    if (
        run_git(
            "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}", cwd=checkout, check=False, as_user=True
        ).returncode
        == 0
    ):
        raise ForkError(f"{checkout} has a branch {branch} already. Delete it, or choose another with --branch.")
    identity = _identity(checkout)
    patches, release = fork.patches, load_release(fork.pin)
    added = _own_additions(fork, release.files)
    with tempfile.TemporaryDirectory(prefix="peft-fork-") as scratch, scratch_series() as series:
        series.start(release.files)
        commits = series.add(patches)
        clone = Path(scratch, "clone")
        run_git("clone", "--quiet", "--shared", str(checkout.resolve()), str(clone), cwd=Path(scratch))
        run_git("switch", "--quiet", "--create", branch, cwd=clone)
        run_git("fetch", "--quiet", str(series.folder), "HEAD", cwd=clone)
        if taken := [path for path in added if (clone / path).exists()]:
            raise ForkError(
                f"{checkout} has files of ours already: {', '.join(taken)}. Start from a branch without them."
            )
        for path, content in added.items():
            (clone / path).parent.mkdir(parents=True, exist_ok=True)
            (clone / path).write_bytes(content)
        subjects = ["Add the modules of routed LoRA"] if added else []
        if added:
            message = f"{subjects[0]}\n\nNew files only, with their tests; the commits after this one connect them.\n"
            run_git("add", "--all", "--force", cwd=clone)
            run_git("commit", "--quiet", "--file=-", cwd=clone, stdin=message, identity=identity)
        for patch, commit in zip(patches, commits, strict=True):
            picked = run_git("cherry-pick", "--no-commit", commit, cwd=clone, check=False)
            conflicts = run_git("diff", "--name-only", "--diff-filter=U", cwd=clone).stdout.split()
            if picked.returncode or conflicts:
                where = ", ".join(conflicts) or picked.stderr.strip()
                raise ForkError(
                    f"patches/{patch.name} conflicts with the checkout in {where}. Nothing was changed there."
                )
            if run_git("diff", "--cached", "--quiet", cwd=clone, check=False).returncode == 0:
                raise ForkError(f"patches/{patch.name} changes nothing in the checkout: it has that change already.")
            run_git("commit", "--quiet", "--file=-", cwd=clone, stdin=patch.message, identity=identity)
            subjects.append(patch.subject)
        run_git("fetch", "--quiet", str(clone), f"refs/heads/{branch}:refs/heads/{branch}", cwd=checkout, as_user=True)
    run_git("switch", "--quiet", branch, cwd=checkout, as_user=True)
    return subjects


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


def _own_additions(fork: Fork, upstream: dict[str, bytes]) -> dict[str, bytes]:
    """Path in an upstream checkout -> content of each file that only the fork has."""
    own = own_files(fork, upstream)
    if strays := stray_files(own):
        raise ForkError(f"Neither upstream's nor named 'moe': {', '.join(strays)}. Rename or remove them first.")
    paths = [fork.root / path for path in own]
    for folder in PLACES.keys() - {"src"}:
        paths += sorted(path for path in (fork.root / folder).rglob("*") if path.is_file())
    names = [path.relative_to(fork.root).as_posix() for path in paths]
    return {
        f"{PLACES[name.split('/', 1)[0]]}/{name.split('/', 1)[1]}": (fork.root / name).read_bytes()
        for name in names
        if not is_leftover(name)
    }


def _identity(checkout: Path) -> dict[str, str]:
    """Who commits, from the checkout's git configuration and the user's own."""
    said = run_git("var", "GIT_AUTHOR_IDENT", cwd=checkout, check=False, as_user=True)
    who = re.match(r"(.+) <(.+)> ", said.stdout)
    if not who:
        raise ForkError(f"git does not know who commits in {checkout}. Set user.name and user.email with git config.")
    return {f"GIT_{role}_{key}": who[i] for role in ("AUTHOR", "COMMITTER") for i, key in ((1, "NAME"), (2, "EMAIL"))}
