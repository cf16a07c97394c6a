"""The patch queue: files patches/NNNN-slug.patch, each a header that says why and a diff without context lines.

    Subject, one line

    Why, in as many lines as it takes.

    Upstream: sent where, or why not.

    diff --git a/src/peft/... b/src/peft/...
    index <old blob>..<new blob> 100644
    @@ -120,0 +121,2 @@

The blob ids in the index lines are checked before applying: a diff without context would otherwise go to the wrong
line in silence when an earlier patch of the same file is changed by hand.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fork_tool.release import ForkError


HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)")
FILE_NAME = re.compile(r"\d{4}-[a-z0-9]+(-[a-z0-9]+)*\.patch")


@dataclass(frozen=True)
class Hunk:
    """One run of changed lines.

    Args:
        path: the file it changes, such as `src/peft/mapping.py`.
        line: the line of the old file it starts at, counted from 1.
        removed, added, context: numbers of lines.
        heading: what stands behind the second `@@`; git puts a line of the file there.
    """

    path: str
    line: int
    removed: int
    added: int
    context: int
    heading: str


@dataclass(frozen=True)
class Patch:
    """One patch of the queue.

    Args:
        name: file name, such as `0001-release-hooks.patch`.
        header: subject, blank line, why, and the `Upstream:` line, without blank lines at its ends.
        diff: the text from the first `diff --git` line on.
    """

    name: str
    header: str
    diff: str

    @classmethod
    def parse(cls, name: str, text: str) -> "Patch":
        start = re.search(r"(?m)^diff --git ", text)
        cut = start.start() if start else len(text)
        return cls(name, text[:cut].strip(), text[cut:])

    @property
    def text(self) -> str:
        return f"{self.header}\n\n{self.diff}"

    @property
    def subject(self) -> str:
        return self.header.split("\n", 1)[0]

    @property
    def upstream(self) -> str | None:
        """What the `Upstream:` line says, None without one."""
        found = re.search(r"(?m)^Upstream: (.*\S)", self.header)
        return found[1] if found else None

    @property
    def stays_here(self) -> bool:
        """Whether it is the fork's own and no pull request brings it: `Upstream: no, ...`."""
        return (self.upstream or "").startswith("no,")

    @property
    def message(self) -> str:
        """The header as a commit message for upstream: without the `Upstream:` paragraph, which is a note to us."""
        return re.sub(r"(?ms)^Upstream: .*?(\n\n|\Z)", "", self.header).strip() + "\n"

    @property
    def paths(self) -> list[str]:
        """The files it changes, in the order of the diff."""
        return re.findall(r"(?m)^diff --git a/\S+ b/(\S+)$", self.diff)

    @cached_property
    def hunks(self) -> list[Hunk]:
        return list(_read_hunks(self.name, self.diff))

    @property
    def added(self) -> int:
        return sum(hunk.added for hunk in self.hunks)

    @property
    def removed(self) -> int:
        return sum(hunk.removed for hunk in self.hunks)


def read_queue(folder: Path) -> list[Patch]:
    """The patches of a folder in the order they apply; an empty or missing folder is an empty queue."""
    return [Patch.parse(path.name, decode(path.read_bytes())) for path in sorted(folder.glob("*.patch"))]


def write_queue(folder: Path, patches: list[Patch]) -> None:
    """Make `folder` hold exactly these patches; files that already say the same keep their times."""
    folder.mkdir(exist_ok=True)
    before = {patch.name: patch for patch in read_queue(folder)}
    for patch in patches:
        path = folder / patch.name
        if patch.name not in before or path.read_bytes() != encode(patch.text):
            path.write_bytes(encode(patch.text))
    for name in before.keys() - {patch.name for patch in patches}:
        (folder / name).unlink()


def faults(patch: Patch) -> list[str]:
    """What is wrong with the form of a patch; empty for a well-formed one."""
    lines = patch.header.split("\n")
    found = []
    if not FILE_NAME.fullmatch(patch.name):
        found.append("its file name must be four digits, a hyphen and a slug of a-z, 0-9 and hyphens")
    if not lines[0] or len(lines[0]) > 100 or lines[0].startswith("Upstream:"):
        found.append("its first line must be a subject of at most 100 characters")
    if len(patch.message.strip().split("\n")) < 3 or lines[1] != "":
        found.append("its subject must be followed by a blank line and by why it is needed")
    if not patch.upstream:
        found.append("its header must have a line 'Upstream: ...' (sent where, or why not)")
    if not patch.hunks:
        found.append("it changes nothing")
    for hunk in patch.hunks:
        if hunk.context or hunk.heading:
            found.append(f"it repeats upstream's text around line {hunk.line} of {hunk.path}; run fork.py refresh")
            break
    if re.search(r"(?m)^(new file|deleted file|rename|copy|old) ", patch.diff):
        found.append("it may only change files of upstream; a new file belongs under src/ with 'moe' in its name")
    for path in patch.paths:
        if not path.startswith(("src/", "tests/")):
            found.append(f"it changes {path}; only src/ and tests/ are patched")
    return found


def apply_queue(files: dict[str, bytes], patches: list[Patch]) -> dict[str, bytes]:
    """Apply a queue to a release.

    Args:
        files: path -> content of the release.

    Returns:
        path -> content of all files afterwards.

    Raises:
        ForkError: a patch does not apply (named, with file and line), or git is missing.
    """
    result = dict(files)
    with tempfile.TemporaryDirectory() as scratch:
        for patch in patches:
            for path in patch.paths:
                if path in result and not (target := Path(scratch, path)).exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(result[path])
            apply_patch(patch, Path(scratch))
        for path in sorted({path for patch in patches for path in patch.paths}):
            result[path] = Path(scratch, path).read_bytes()
    return result


def apply_patch(patch: Patch, folder: Path) -> None:
    """Apply one patch to the files under `folder`. Raises ForkError, naming patch, file and line."""
    cut_against = dict(re.findall(r"(?m)^diff --git a/\S+ b/(\S+)\nindex ([0-9a-f]+)\.\.", patch.diff))
    for path in patch.paths:
        line = next((hunk.line for hunk in patch.hunks if hunk.path == path), 1)
        if not (folder / path).is_file():
            raise ForkError(f"patches/{patch.name} does not apply: the release has no {path} (line {line}).")
        blob = blob_id((folder / path).read_bytes())
        if path in cut_against and not blob.startswith(cut_against[path]):
            raise ForkError(
                f"patches/{patch.name} does not apply to {path}, line {line}: it was cut against another text of that "
                f"file (blob {cut_against[path]}, here {blob[:12]}). Put the release and the earlier patches back as "
                "they were, edit the built tree instead, and run fork.py refresh."
            )
    done = run_git("apply", "--unidiff-zero", "--whitespace=nowarn", "-", cwd=folder, stdin=patch.diff, check=False)
    if done.returncode:
        said = done.stderr.strip()
        where = re.search(r"patch failed: (.+):(\d+)", said)
        spot = f" to {where[1]}, line {where[2]}" if where else ""
        raise ForkError(
            f"patches/{patch.name} does not apply{spot}: {said.splitlines()[-1] if said else 'git failed'}"
        )


def run_git(
    *arguments: str,
    cwd: Path,
    stdin: str | None = None,
    check: bool = True,
    identity: dict[str, str] | None = None,
    as_user: bool = False,
) -> subprocess.CompletedProcess:
    """Run git in `cwd`, by default deaf to the user's settings and to a repository around it.

    Args:
        identity: GIT_AUTHOR_* and GIT_COMMITTER_* of commits; a neutral one by default.
        as_user: keep the user's settings, for a repository that is theirs.

    Raises:
        ForkError: git is missing, or fails while `check` is set.
    """
    if shutil.which("git") is None:
        raise ForkError("git is needed to apply the patches and is not on the PATH. Install git and try again.")
    if not cwd.is_dir():
        raise ForkError(f"{cwd} is not a folder; expected one that git works in.")
    # GIT_DIR, GIT_INDEX_FILE and the like, which a git hook sets, would turn the command to another repository.
    drop = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX") if as_user else ("GIT_",)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(drop)} | {"LC_ALL": "C"}
    if not as_user:
        environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        environment |= {"GIT_EDITOR": ":", "GIT_SEQUENCE_EDITOR": ":"}
        environment |= {"GIT_CEILING_DIRECTORIES": str(cwd.resolve().parent)}
        for who in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{who}_NAME": "fork.py", f"GIT_{who}_EMAIL": "fork@localhost"}
    environment |= identity or {}
    # As bytes: text mode would change the line ends of a file that has CRLF.
    done = subprocess.run(
        ["git", *arguments], cwd=cwd, env=environment, input=encode(stdin or ""), capture_output=True
    )
    done.stdout, done.stderr = decode(done.stdout), decode(done.stderr)
    if check and done.returncode:
        raise ForkError(f"git {' '.join(arguments[:2])} failed: {(done.stderr or done.stdout).strip()}")
    return done


def decode(content: bytes) -> str:
    """Bytes of a patch as text; `encode` gives the same bytes back, whatever they are."""
    return content.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def blob_id(content: bytes) -> str:
    """The id git gives a file of this content (SHA-1 repositories)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _read_hunks(name: str, diff: str) -> Iterator[Hunk]:
    lines = iter(diff.split("\n"))
    path = "?"
    for line in lines:
        if line.startswith("+++ "):
            path = line[4:].removeprefix("b/")
        elif found := HUNK.match(line):
            start, old, _, new, heading = found.groups()
            left_old, left_new = int(old or 1), int(new or 1)
            counts = {"-": 0, "+": 0, " ": 0}
            while left_old or left_new:
                mark = next(lines, "damaged")[:1] or " "
                if mark == "\\":
                    continue
                if mark not in counts or (mark in "- " and not left_old) or (mark in "+ " and not left_new):
                    raise ForkError(f"patches/{name} is damaged: the hunk at line {start} of {path} is cut short.")
                counts[mark] += 1
                left_old -= mark in "- "
                left_new -= mark in "+ "
            yield Hunk(path, int(start), counts["-"], counts["+"], counts[" "], heading.strip())
