"""The pull request: the queue, our own files and the documentation as commits on a branch of upstream's repository.

`series.toml` says which of our files come with which patch, so that each commit stands alone, and what the last commit
adds: pages of documentation with their entries in the table of contents, examples, settings of the method comparison.
"""

import re
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fork_tool.patches import run_git
from fork_tool.release import ForkError, load_release
from fork_tool.series import scratch_series
from fork_tool.tree import Fork, is_leftover, own_files, stray_files


# Where our own files go in a checkout of upstream. Those of LAST come with the last commit, whatever their names.
PLACES = {
    "src": "src",
    "tests": "tests/moe_lora",
    "docs": "docs/source",
    "examples": "examples",
    "method_comparison": "method_comparison",
}
LAST = ("docs", "examples", "method_comparison")
TABLE_OF_CONTENTS = "docs/source/_toctree.yml"


@dataclass(frozen=True, kw_only=True)
class Page:
    """An entry of the table of contents.

    Args:
        page: path under docs/, without its ending.
        title: what the table of contents calls it.
        after: the page of upstream below which it stands.
    """

    page: str
    title: str
    after: str


@dataclass(frozen=True, kw_only=True)
class CommitPlan:
    """One commit of the series.

    Args:
        patch: slug of its patch; None for the last commit, which has none.
        message: its commit message; of a commit with a patch, the patch's.
        files: our own files it brings, by their paths in the fork.
        tests: files of upstream's tests that must pass at it, beside the test files that it brings.
        pages: entries it adds to the table of contents.
    """

    patch: str | None
    message: str
    files: list[str]
    tests: list[str]
    pages: list[Page]

    @property
    def subject(self) -> str:
        return self.message.split("\n", 1)[0]


def read_plan(fork: Fork, upstream: dict[str, bytes]) -> list[CommitPlan]:
    """The commits that `series.toml` describes, in the order of the queue, and the last one.

    Args:
        upstream: path -> content of the files of the release; every other file under src/ and tests/ is ours.

    Raises:
        ForkError: the file is missing or malformed, leaves out a patch or a file of ours, or names what is not there.
    """
    path = fork.root / "series.toml"
    try:
        series = tomllib.loads(path.read_text(encoding="utf-8"))
        commits = {entry["patch"]: entry for entry in series["commit"]}
        subject, why, pages = (series["last"][key] for key in ("subject", "why", "pages"))
        pages = [Page(**entry) for entry in pages]
    except FileNotFoundError:
        raise ForkError(f"{path} is missing; it says which of our files come with which patch.") from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as refused:
        raise ForkError(f"{path} must hold [[commit]] tables and one [last] table: {refused!r}") from None
    slugs = {patch.name[5:].removesuffix(".patch"): patch for patch in fork.patches if not patch.stays_here}
    if wrong := sorted(slugs.keys() ^ commits.keys()):
        raise ForkError(
            f"series.toml and patches/ must name the same patches; only one of them has {', '.join(wrong)}."
        )
    ours = _our_files(fork, upstream)
    rest = [name for name in ours if name.split("/", 1)[0] not in LAST]
    plan = []
    for slug, patch in slugs.items():
        patterns = commits[slug].get("files", [])
        if idle := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in rest)]:
            raise ForkError(
                f"series.toml: {', '.join(idle)} of {slug} is no file of ours, or an earlier patch has it."
            )
        files = [name for name in rest if any(fnmatch(name, pattern) for pattern in patterns)]
        rest = [name for name in rest if name not in files]
        tests = commits[slug].get("tests", [])
        plan.append(CommitPlan(patch=slug, message=patch.message, files=files, tests=tests, pages=[]))
    if rest:
        raise ForkError(f"series.toml names no patch that brings {', '.join(rest)}.")
    if last := [name for name in ours if name.split("/", 1)[0] in LAST]:
        plan.append(CommitPlan(patch=None, message=f"{subject}\n\n{why.strip()}\n", files=last, tests=[], pages=pages))
    return plan


def write_pull_request(fork: Fork, checkout: Path, branch: str) -> list[str]:
    """Write the series onto a new branch of an upstream checkout and switch to it.

    Each patch that does not stay here becomes a commit together with our files that it needs, merged three-way onto
    whatever the checkout has; a last commit adds documentation and examples. All of it is made in a clone, so a failure leaves the checkout alone.

    Returns:
        the subjects of the commits.

    Raises:
        ForkError: not a clean git checkout, the branch exists, a file of ours exists there, or a conflict.
    """
    _check_checkout(checkout, branch)
    identity = _identity(checkout)
    patches, release = fork.patches, load_release(fork.pin)
    plan = read_plan(fork, release.files)
    with tempfile.TemporaryDirectory(prefix="peft-fork-") as scratch, scratch_series() as series:
        series.start(release.files)
        sent = [
            (patch, commit) for patch, commit in zip(patches, series.add(patches), strict=True) if not patch.stays_here
        ]
        clone = Path(scratch, "clone")
        run_git("clone", "--quiet", "--shared", str(checkout.resolve()), str(clone), cwd=Path(scratch))
        run_git("switch", "--quiet", "--create", branch, cwd=clone)
        run_git("fetch", "--quiet", str(series.folder), "HEAD", cwd=clone)
        if taken := [path for step in plan for path in places(step.files) if (clone / path).exists()]:
            raise ForkError(
                f"{checkout} has files of ours already: {', '.join(taken)}. Start from a branch without them."
            )
        for number, step in enumerate(plan):
            if step.patch:
                patch, commit = sent[number]
                _merge(clone, commit, f"patches/{patch.name}")
            for name, place in zip(step.files, places(step.files), strict=True):
                (clone / place).parent.mkdir(parents=True, exist_ok=True)
                (clone / place).write_bytes((fork.root / name).read_bytes())
            if step.pages:
                _add_to_contents(clone / TABLE_OF_CONTENTS, step.pages)
            run_git("add", "--all", "--force", cwd=clone)
            run_git("commit", "--quiet", "--file=-", cwd=clone, stdin=step.message, identity=identity)
        run_git("fetch", "--quiet", str(clone), f"refs/heads/{branch}:refs/heads/{branch}", cwd=checkout, as_user=True)
    run_git("switch", "--quiet", branch, cwd=checkout, as_user=True)
    return [step.subject for step in plan]


def places(files: list[str]) -> list[str]:
    """Where files of the fork go in a checkout."""
    parts = [name.split("/", 1) for name in files]
    return [f"{PLACES[folder]}/{rest}" for folder, rest in parts]


def _check_checkout(checkout: Path, branch: str) -> None:
    if run_git("rev-parse", "--show-prefix", cwd=checkout, check=False, as_user=True).stdout != "\n":
        raise ForkError(
            f"{checkout} is not the top folder of a git checkout. Name a checkout of upstream's repository."
        )
    if dirty := run_git("status", "--porcelain", cwd=checkout, as_user=True).stdout.splitlines():
        raise ForkError(
            f"{checkout} has {len(dirty)} uncommitted change(s), such as {dirty[0][3:]}. Commit or stash first."
        )
    there = run_git(
        "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}", cwd=checkout, check=False, as_user=True
    )
    if there.returncode == 0:
        raise ForkError(f"{checkout} has a branch {branch} already. Delete it, or choose another with --branch.")


def _merge(clone: Path, commit: str, name: str) -> None:
    """Apply one commit of the series to the clone, without committing."""
    picked = run_git("cherry-pick", "--no-commit", commit, cwd=clone, check=False)
    conflicts = run_git("diff", "--name-only", "--diff-filter=U", cwd=clone).stdout.split()
    if picked.returncode or conflicts:
        where = ", ".join(conflicts) or picked.stderr.strip()
        raise ForkError(f"{name} conflicts with the checkout in {where}. Nothing was changed there.")
    if run_git("diff", "--cached", "--quiet", cwd=clone, check=False).returncode == 0:
        raise ForkError(f"{name} changes nothing in the checkout: it has that change already.")


def _add_to_contents(contents: Path, pages: list[Page]) -> None:
    """Add each page to the table of contents, below the page it is to follow, wherever that one stands."""
    if not contents.is_file():
        raise ForkError(f"The checkout has no {TABLE_OF_CONTENTS}, so the new pages cannot be listed. Add it first.")
    text = contents.read_text(encoding="utf-8")
    for page in pages:
        entry = rf"(?m)^( *)- local: {re.escape(page.after)}\n(?:\1 .*\n)*"
        text, found = re.subn(entry, rf"\g<0>\1- local: {page.page}\n\1  title: {page.title}\n", text)
        if not found:
            raise ForkError(
                f"{TABLE_OF_CONTENTS} of the checkout does not list {page.after}, below which {page.page} is to stand. "
                "Name another page in series.toml."
            )
    contents.write_text(text, encoding="utf-8")


def _our_files(fork: Fork, upstream: dict[str, bytes]) -> list[str]:
    """The files that only the fork has and that upstream is to get, by their paths in the fork."""
    own = own_files(fork, upstream)
    if strays := stray_files(own):
        raise ForkError(f"Neither upstream's nor named 'moe': {', '.join(strays)}. Rename or remove them first.")
    return sorted([*own, *_beside_src(fork)])


def _beside_src(fork: Fork) -> Iterator[str]:
    for folder in PLACES.keys() - {"src"}:
        for path in (fork.root / folder).rglob("*"):
            name = path.relative_to(fork.root).as_posix()
            if path.is_file() and not is_leftover(name):
                yield name


def _identity(checkout: Path) -> dict[str, str]:
    """Who commits, from the checkout's git configuration and the user's own."""
    said = run_git("var", "GIT_AUTHOR_IDENT", cwd=checkout, check=False, as_user=True)
    who = re.match(r"(.+) <(.+)> ", said.stdout)
    if not who:
        raise ForkError(f"git does not know who commits in {checkout}. Set user.name and user.email with git config.")
    return {f"GIT_{role}_{key}": who[i] for role in ("AUTHOR", "COMMITTER") for i, key in ((1, "NAME"), (2, "EMAIL"))}
