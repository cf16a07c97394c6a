"""Wheels of the fork and of the project, installed outside the checkout beside what they declare and nothing else."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# One run of each script, in this order, and what it prints; {base} is a tiny model.
RUNS = {
    "dylo-moe-train": (
        "--datasets notes.jsonl --output_dir run --num_steps 1 --compare false --max_seq_length 16",
        "adapter   run/mixture",
    ),
    "dylo-moe-evaluate": ("--checkpoint run --eval_blocks 1", "Held-out perplexity"),
    "dylo-moe-validate": ("--model {base}", "74 checks"),
    "moe-router-ft": ("alpha --output alpha.csv", "alpha of"),
    "moe-multi-token": (
        "train --data notes.jsonl --out heads --model {base} --max_rows 4 --length 16",
        "Router and heads lie in heads",
    ),
    "moe-moqe": ("quantize --model {base} --schemes int4 --output experts --group_size 16", "experts/int4"),
    "moe-router-study": ("overhead --rounds 1 --batch_size 1 --row_tokens 16", "plain"),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A fresh virtual environment with both wheels, and links to the declared dependencies of the running Python."""
    scratch = tmp_path_factory.mktemp("installed")
    source = scratch / "source"
    for name in ("dylo_moe", "moe_common", "moe_ext"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", scratch]
    run([*build, ROOT / "peft", source], scratch)
    run([sys.executable, "-m", "venv", scratch / "env"], scratch)
    (site,) = (scratch / "env").glob("lib/python*/site-packages")
    link_packages([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"]], site)
    install = [scratch / "env/bin/python", "-m", "pip", "install", "--no-deps", "--no-index"]
    run([*install, *scratch.glob("*.whl")], scratch)
    return scratch / "env"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the scripts run: a folder with a file of text."""
    folder = tmp_path_factory.mktemp("work")
    rows = [json.dumps({"text": f"Row {i}: rain falls on the hills and runs to the sea."}) for i in range(200)]
    (folder / "notes.jsonl").write_text("\n".join(rows))
    return folder


def run(command: list, folder: Path) -> str:
    """What a command that succeeds prints, without the checkout on its path."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def link_packages(requirements: list[str], site: Path) -> None:
    """Link into `site` the distributions of the running Python that these requirements need, and those that they need.

    Args:
        requirements: as in pyproject.toml.
        site: a folder of packages. `peft` itself is left out.
    """
    waiting, seen = [Requirement(line) for line in requirements], set()
    while waiting:
        asked = waiting.pop()
        key = (canonicalize_name(asked.name), *sorted(asked.extras))
        if key in seen:
            continue
        seen.add(key)
        package = importlib.metadata.distribution(asked.name)
        for line in map(Requirement, package.requires or []):
            if line.marker is None or any(line.marker.evaluate({"extra": name}) for name in (*asked.extras, "")):
                waiting.append(line)
        for name in {file.parts[0] for file in package.files or [] if asked.name != "peft"} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(package.locate_file(name))


def test_what_is_installed_has_all_that_it_declares_and_is_not_the_checkout(environment, folder):
    assert "No broken requirements found." in run([environment / "bin/python", "-m", "pip", "check"], folder)
    ask = "import dylo_moe, moe_common, moe_ext, peft; print(dylo_moe.__file__, moe_common.__file__, peft.__file__)"
    for file in run([environment / "bin/python", "-c", ask], folder).split():
        assert Path(file).is_relative_to(environment)


def test_each_script_has_a_run_here():
    assert PROJECT["scripts"].keys() == RUNS.keys()


@pytest.mark.parametrize("script", RUNS)
def test_a_script_tells_its_options_and_works(script, environment, folder, tiny_base):
    assert run([environment / "bin" / script, "--help"], folder).startswith("usage: ")
    options, printed = RUNS[script]
    assert printed in run([environment / "bin" / script, *options.format(base=tiny_base).split()], folder)
