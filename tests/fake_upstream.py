"""A made-up upstream of a few short files, and a fork of it, so that the tests of fork.py run in milliseconds."""

import hashlib
import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

FORK_FOLDER = Path(__file__).resolve().parents[1] / "peft"

LINES = "".join(f"line {number}\n" for number in range(1, 31))
FILES = {
    "src/peft/__init__.py": "__version__ = 'fake'\n",
    "src/peft/mapping.py": LINES,
    "src/peft/py.typed": "",
    "src/peft/tuners/__init__.py": "",
    "src/peft/tuners/lora/__init__.py": "",
    "src/peft/tuners/lora/layer.py": LINES,
    "tests/test_layer.py": LINES,
    "LICENSE": "Apache License\n",
    "README.md": "upstream\n",
    "PKG-INFO": (
        "Metadata-Version: 2.4\nName: peft\nVersion: {version}\nRequires-Dist: numpy>=1.17\n"
        'Requires-Dist: tqdm; python_version < "4" and extra == "test"\nProvides-Extra: test\n\nlong\n'
    ),
    # pip runs this to read the metadata; the marker it leaves shows that it did.
    "setup.py": (
        "import os, pathlib, setuptools\n"
        "if 'FAKE_MARKER' in os.environ:\n    pathlib.Path(os.environ['FAKE_MARKER']).touch()\n"
        "setuptools.setup(name='peft', version='{version}', package_dir={{'': 'src'}}, packages=['peft'])\n"
    ),
}

# What the fork's series.toml says of the queue that the fixture `queue` makes.
SERIES = """
[[commit]]
patch = "seam"
files = ["src/peft/tuners/lora/moe_layer.py"]

[[commit]]
patch = "registry"

[last]
subject = "Document it"
why = "For its readers."
pages = [{page = "package_reference/moe", title = "MoE", after = "package_reference/lora"}]
"""

# The table of contents of upstream's documentation.
CONTENTS = """\
- title: Methods
  sections:
    - sections:
      - local: package_reference/lora
        title: LoRA
      title: Adapters
- title: API
  sections:
  - local: package_reference/lora
    title: LoRA
"""


def write_sdist(folder: Path, version: str, changes: dict[str, str | None] | None = None) -> Path:
    """Write peft-VERSION.tar.gz into `folder`; `changes` adds or replaces files, None leaves one out."""
    path = folder / f"peft-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {**FILES, **(changes or {})}.items():
            if text is None:
                continue
            content = (text.format(version=version) if name in ("PKG-INFO", "setup.py") else text).encode()
            member = tarfile.TarInfo(f"peft-{version}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@dataclass
class FakeFork:
    """A fork in a temporary folder, driven as a user does it: commands and edits."""

    root: Path
    capsys: object
    cache: Path
    index: Path

    def keep(self, sdist: Path) -> str:
        """Put a release into the cache; returns its sha256."""
        sha256 = hashlib.sha256(sdist.read_bytes()).hexdigest()
        (self.cache / sha256).mkdir(parents=True, exist_ok=True)
        (self.cache / sha256 / sdist.name).write_bytes(sdist.read_bytes())
        return sha256

    def pin(self, version: str, sha256: str) -> None:
        (self.root / "upstream.toml").write_text(
            f'# the pin\nname = "peft"\nversion = "{version}"\nsha256 = "{sha256}"\nsuffix = "moe.7"\n'
        )

    def command(self, *argv: str) -> str:
        """Run a command that must succeed; returns what it printed."""
        code, out, err = self.run(*argv)
        assert code == 0, err
        return out

    def refused(self, *argv: str) -> str:
        """Run a command that must fail and change nothing; returns its one line of error."""
        before = self.snapshot()
        code, _, err = self.run(*argv)
        err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("fetching "))
        assert code == 1 and err.count("\n") == 1 and err.startswith("fork.py: "), err
        assert self.snapshot() == before
        return err

    def run(self, *argv: str) -> tuple[int, str, str]:
        import fork
        from fork_tool import tree as fork_tree

        self.capsys.readouterr()
        code = fork.main(list(map(str, argv)), fork_tree.Fork(self.root))
        return code, *self.capsys.readouterr()

    def source(self, name: str) -> Path:
        return self.root / "src/peft" / name

    def edit(self, name: str, old: str, new: str) -> None:
        """Change a line of a generated file by hand."""
        text = self.source(name).read_text()
        assert f"{old}\n" in text
        self.source(name).write_text(text.replace(f"{old}\n", f"{new}\n", 1))

    def snapshot(self, *, with_times: bool = False) -> dict[str, tuple]:
        """Content of every file of the fork (but the lock), with its time when asked."""
        return {
            path.relative_to(self.root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns if with_times else 0)
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and path.name != "lock"
        }

    def patch(self, number: int) -> str:
        return next((self.root / "patches").glob(f"{number:04d}-*.patch")).read_text()

    @staticmethod
    def git(folder: Path, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def write(fork: FakeFork, **texts: str) -> None:
    """Write files of ours; in a name, two underscores stand for a slash."""
    for name, text in texts.items():
        path = fork.root / f"{name.replace('__', '/')}.{'py' if name.startswith('tests') else 'md'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def bring(fork: FakeFork, patch: str, *patterns: str) -> None:
    """Let a patch bring more of our files."""
    series = fork.root / "series.toml"
    series.write_text(
        series.read_text().replace(f'patch = "{patch}"\n', f'patch = "{patch}"\nfiles = {list(patterns)}\n')
    )
