"""Every test gets a fork of its own, cut against a small made-up release, and no network."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from fake_upstream import CONTENTS, FORK_FOLDER, SERIES, FakeFork, write_sdist

sys.path.insert(0, str(FORK_FOLDER))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """pip sees only tmp_path/index, and the cache is tmp_path/cache."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PEFT_FORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def home(tmp_path, offline, capsys) -> FakeFork:
    """A fork of the made-up release 9.0.0, which is in the cache; the queue is empty and nothing is built."""
    root = tmp_path / "peft"
    root.mkdir()
    for name in ["fork.py", ".gitignore", "MANIFEST.in"]:
        shutil.copy(FORK_FOLDER / name, root / name)
    shutil.copytree(FORK_FOLDER / "fork_tool", root / "fork_tool", ignore=shutil.ignore_patterns("__pycache__"))
    project = (FORK_FOLDER / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(project.split("[tool.setuptools.dynamic.optional-dependencies]")[0])
    (root / "README.md").write_text("# A fork\n\nRemoved lines: 0\n")
    fork = FakeFork(root=root, capsys=capsys, cache=tmp_path / "cache", index=tmp_path / "index")
    fork.pin("9.0.0", fork.keep(write_sdist(tmp_path, "9.0.0")))
    module = root / "src/peft/tuners/lora/moe_layer.py"
    module.parent.mkdir(parents=True)
    module.write_text("ROUTED = True\n")
    return fork


@pytest.fixture
def queue(home) -> FakeFork:
    """The same with a queue of two patches, 0001-seam and 0002-registry, built."""
    home.command("build")
    home.edit("tuners/lora/layer.py", "line 5", "line 5\nseam")
    home.command("refresh", "--new", "seam", "--subject", "Add a seam", "--why", "The router hangs there.")
    home.edit("tuners/lora/layer.py", "line 20", "line twenty")
    home.edit("mapping.py", "line 8", "line 8\nregistry")
    home.command("refresh", "--new", "registry", "--subject", "Register", "--why", "So that it is found.")
    (home.root / "series.toml").write_text(SERIES)
    return home


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git checkout of upstream's repository at 9.0.0, with a user who has a name."""
    from fork_tool import release as fork_release

    config = tmp_path / "gitconfig"
    config.write_text("[user]\n\tname = Ada\n\temail = ada@example.org\n[init]\n\tdefaultBranch = main\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    folder = tmp_path / "checkout"
    for path, content in fork_release.read_sdist(write_sdist(tmp_path, "9.0.0")).files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "docs/source").mkdir(parents=True)
    (folder / "docs/source/_toctree.yml").write_text(CONTENTS)
    (folder / "pyproject.toml").write_text("[tool.ruff]\nline-length = 100\n")
    FakeFork.git(folder, "init", "--quiet")
    FakeFork.git(folder, "add", "--all")
    FakeFork.git(folder, "commit", "--quiet", "--message", "Release 9.0.0")
    return folder
