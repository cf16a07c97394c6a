"""peft/fork.py: the command line, the build hooks, and the fork of the real release."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import fork
import pytest
from fake_upstream import FORK_FOLDER
from fork_tool import check as fork_check
from fork_tool import moves as fork_moves
from fork_tool import release as fork_release
from fork_tool import tree as fork_tree

REAL = fork_tree.Fork(FORK_FOLDER)


@pytest.mark.parametrize("command", [[], ["build"], ["check"], ["refresh"], ["rebase"], ["pr"], ["verify"]])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        fork.main([*command, "--help"])
    assert left.value.code == 0 and "usage: fork.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonesuch"],
        ["rebase"],
        ["refresh", "--new", "slug"],
        ["refresh", "--subject", "S"],
        ["refresh", "--from", "x"],
        ["refresh", "--new", "a", "--patch", "b", "--subject", "S", "--why", "W"],
    ],
)
def test_a_wrong_call_is_told_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as left:
        fork.main(argv)
    assert left.value.code == 2 and "usage: fork.py" in capsys.readouterr().err


def run_hook(home, hook: str, folder: Path) -> subprocess.CompletedProcess:
    """Call a build hook as pip does: in a process of its own, in the fork's folder."""
    folder.mkdir(exist_ok=True)
    call = f"import sys; sys.path.insert(0, '.'); import fork; print(fork.{hook}({str(folder)!r}))"
    return subprocess.run([sys.executable, "-c", call], cwd=home.root, capture_output=True, text=True)


def test_a_wheel_holds_the_built_tree_and_says_what_it_is(queue, tmp_path):
    stale = queue.root / "build/lib/peft/deleted.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    done = run_hook(queue, "build_wheel", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    wheel = zipfile.ZipFile(tmp_path / "out/peft-9.0.0+moe.7-py3-none-any.whl")
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    built = {path.relative_to(queue.root / "src").as_posix() for path in (queue.root / "src").rglob("*.*")}
    assert names == built
    assert b"seam" in wheel.read("peft/tuners/lora/layer.py")
    metadata = wheel.read("peft-9.0.0+moe.7.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0\n" in metadata and "Requires-Dist: numpy>=1.17\n" in metadata
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in wheel.namelist()}


def test_a_source_distribution_builds_without_release_cache_or_git(queue, tmp_path, monkeypatch):
    done = run_hook(queue, "build_sdist", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "out/peft-9.0.0+moe.7.tar.gz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    shutil.rmtree(queue.cache)
    monkeypatch.setenv("PATH", "")
    queue.root = tmp_path / "unpacked/peft-9.0.0+moe.7"
    done = run_hook(queue, "build_wheel", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_a_hook_that_is_refused_says_why_without_a_traceback(queue, tmp_path):
    queue.edit("mapping.py", "line 2", "mine")
    done = run_hook(queue, "build_wheel", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("peft fork: 1 generated file(s) were edited by hand")
    assert "Traceback" not in done.stderr


def test_an_editable_wheel_is_one_path_line(queue, tmp_path):
    done = run_hook(queue, "build_editable", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    wheel = zipfile.ZipFile(next((tmp_path / "out").glob("*.whl")))
    paths = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert len(paths) == 1 and paths[0].endswith(".pth")
    assert wheel.read(paths[0]).decode().strip() == str(queue.root / "src")


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_import_beside_the_folder_peft_gives_the_package(queue, tmp_path, hook):
    """What both kinds of install put into site-packages wins over the folder in the working directory."""
    assert run_hook(queue, hook, tmp_path / "out").returncode == 0
    zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))).extractall(tmp_path / "site")
    call = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); import peft; print(peft.__file__)"
    done = subprocess.run([sys.executable, "-ES", "-c", call], cwd=queue.root.parent, capture_output=True, text=True)
    assert Path(done.stdout.strip()).is_relative_to(queue.root / "src" if "editable" in hook else tmp_path / "site")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--editable"]], ids=["installed", "editable"])
def test_import_from_the_repositorys_root_gives_the_installed_fork(queue, tmp_path, mode):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin/python"
    needed = "import sys, setuptools; print(setuptools.__path__[0])"
    site = Path(subprocess.run([sys.executable, "-c", needed], capture_output=True, text=True).stdout.strip()).parent
    # The outer setuptools instead of a fetched one: no network.
    environ = os.environ | {"PYTHONPATH": str(link_packages(site, tmp_path, ["setuptools", "wheel"]))}
    command = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", *mode, "./peft"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ask = "import peft, importlib.metadata as m; print(peft.__version__, m.version('peft'), peft.__file__)"
    done = subprocess.run([python, "-E", "-c", ask], cwd=tmp_path, capture_output=True, text=True)
    version, distribution, file = done.stdout.split()
    assert (version, distribution) == ("fake", "9.0.0+moe.7")
    assert Path(file).is_relative_to(queue.root / "src" if mode else environment)


def link_packages(site: Path, tmp_path: Path, names: list[str]) -> Path:
    """A folder that holds only these packages of `site`, with their metadata."""
    folder = tmp_path / "build-packages"
    folder.mkdir()
    for name in names:
        for path in [site / name, *site.glob(f"{name}-*.dist-info")]:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def real_release() -> fork_release.Release:
    """The real pinned release: from the user's cache, or else through the package registry."""
    try:
        return fork_release.load_release(REAL.pin)
    except fork_release.ForkError as refused:
        pytest.skip(f"the pinned release is neither in the cache nor to be fetched: {refused}")


def test_the_queue_applies_to_the_pinned_release_and_every_header_is_well_formed(real_release, tmp_path):
    root = tmp_path / "peft"
    left = shutil.ignore_patterns(".fork", "__pycache__", "*.egg-info")
    shutil.copytree(FORK_FOLDER, root, ignore=left)
    copy = fork_tree.Fork(root)
    for path in real_release.files:
        (root / path).unlink(missing_ok=True)
    laid = fork_tree.build(copy)
    assert laid.written == sum(path.startswith("src/") for path in real_release.files)
    report, wrong = fork_check.check(copy)
    assert wrong == [], report


def test_the_fork_says_its_version_in_the_package_and_in_what_it_saves():
    ask = "import peft; print(peft.__version__, peft.MoELoraConfig().peft_version)"
    environ = os.environ | {"PYTHONPATH": str(FORK_FOLDER / "src")}
    done = subprocess.run([sys.executable, "-c", ask], env=environ, capture_output=True, text=True)
    assert done.stdout.split() == [REAL.pin.fork_version] * 2, done.stderr


def test_readme_states_how_many_lines_the_queue_removes(real_release):
    stated = f"Removed lines: {fork_moves.removed_lines(REAL.patches)}\n"
    assert stated in (FORK_FOLDER / "README.md").read_text()


def test_no_name_of_upstream_looks_like_one_of_ours(real_release):
    assert fork_tree.stray_files(list(real_release.files)) == list(real_release.files)


@pytest.mark.registry
def test_the_queue_moves_to_the_neighbouring_release_and_back(real_release, tmp_path):
    root = tmp_path / "peft"
    shutil.copytree(FORK_FOLDER, root, ignore=shutil.ignore_patterns(".fork", "src", "tests", "__pycache__"))
    copy = fork_tree.Fork(root)
    patches = copy.patches
    pin, dropped = fork_moves.rebase(copy, "0.21.1")
    assert pin.version == "0.21.1" and dropped == []
    fork_moves.rebase(copy, REAL.pin.version)
    assert copy.patches == patches and copy.pin == REAL.pin
