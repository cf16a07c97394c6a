"""The queue as a series of commits in a scratch git repository, where it can be changed, moved and handed on."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fork_tool.patches import Patch, apply_patch, run_git


class Series:
    """A scratch repository. Commits come from `start` and `add`; a patch is cut by `diff`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.git("init", "--quiet", "--initial-branch=start")
        for key, value in {"core.autocrlf": "false", "commit.gpgsign": "false", "gc.auto": "0"}.items():
            self.git("config", key, value)

    def git(self, *arguments: str, stdin: str | None = None, check: bool = True):
        return run_git(*arguments, cwd=self.folder, stdin=stdin, check=check)

    def start(self, files: dict[str, bytes]) -> str:
        """Commit `files` as a release with no commit before it; returns the commit."""
        if self.git("rev-parse", "--verify", "HEAD", check=False).returncode == 0:
            self.git("checkout", "--quiet", "--orphan", f"after-{self.head()}")
            self.git("rm", "-r", "-f", "--quiet", ".")
        return self.commit_files(files, "release")

    def add(self, patches: list[Patch]) -> list[str]:
        """Commit each patch on top of the current commit; returns the commits, one a patch."""
        commits = []
        for patch in patches:
            apply_patch(patch, self.folder)
            commits.append(self.commit(patch.message))
        return commits

    def commit_files(self, files: dict[str, bytes], message: str) -> str:
        """Write files and commit them on top of the current commit."""
        for path, content in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content)
        return self.commit(message)

    def commit(self, message: str) -> str:
        self.git("add", "--all", "--force")
        self.git("commit", "--quiet", "--allow-empty", "--cleanup=verbatim", "--file=-", stdin=message)
        return self.head()

    def head(self) -> str:
        return self.git("rev-parse", "HEAD").stdout.strip()

    def checkout(self, commit: str) -> None:
        self.git("checkout", "--quiet", "--detach", commit)

    def since(self, base: str) -> list[str]:
        """The commits after `base` up to the current one, oldest first."""
        return self.git("rev-list", "--reverse", f"{base}..HEAD").stdout.split()

    def files(self) -> dict[str, bytes]:
        """Path -> content of the current commit, which must be checked out and clean."""
        paths = self.git("ls-files", "-z").stdout.split("\0")[:-1]
        return {path: (self.folder / path).read_bytes() for path in paths}

    def conflicts(self) -> list[str]:
        return self.git("diff", "--name-only", "--diff-filter=U").stdout.split()

    def diff(self, commit: str) -> str:
        """What a commit changes, without context lines and without the line git puts behind `@@`."""
        return cut_diff(self.folder, f"{commit}~", commit)


@contextmanager
def scratch_series() -> Iterator[Series]:
    with tempfile.TemporaryDirectory(prefix="peft-fork-") as folder:
        yield Series(Path(folder))


def cut_diff(checkout: Path, old: str, new: str, *paths: str) -> str:
    """The difference between two commits in the form patches are kept in."""
    form = ("--unified=0", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--abbrev=12")
    prefixes = ("--src-prefix=a/", "--dst-prefix=b/", "--inter-hunk-context=0", "--diff-algorithm=myers")
    text = run_git("diff", *form, *prefixes, old, new, "--", *paths, cwd=checkout, as_user=True).stdout
    return re.sub(r"(?m)^(@@ -\S+ \+\S+ @@).*", r"\1", text)
