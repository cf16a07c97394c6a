"""peft/fork_tool/verify.py: each commit of a series is told apart from one that does not stand alone."""

import pytest
from fake_upstream import SERIES, FakeFork, bring, write, write_sdist

# Upstream's files, which elsewhere in these tests are lines of words, as Python that can be run.
VALID = {"src/peft/mapping.py": "FIRST = 1\nLAST = 2\n", "src/peft/tuners/lora/layer.py": "RANK = 8\n"}


@pytest.fixture
def queue(home, checkout, tmp_path) -> FakeFork:
    """A queue of two patches on a release of Python files; `checkout` holds that release."""
    home.pin("9.5.0", home.keep(write_sdist(tmp_path, "9.5.0", VALID)))
    home.command("build")
    home.edit("tuners/lora/layer.py", "RANK = 8", "RANK = 16")
    home.command("refresh", "--new", "seam", "--subject", "Add a seam", "--why", "The router hangs there.")
    home.edit("mapping.py", "FIRST = 1", "FIRST = 1\nREGISTRY = 3")
    home.command("refresh", "--new", "registry", "--subject", "Register", "--why", "So that it is found.")
    (home.root / "series.toml").write_text(SERIES)
    for path, text in VALID.items():
        (checkout / path).write_text(text)
    FakeFork.git(checkout, "commit", "--quiet", "--all", "--message", "Release 9.5.0")
    return home


@pytest.fixture
def series(queue, checkout):
    """Makes the branch of the queue anew, from what the fork holds when it is called."""

    def make():
        FakeFork.git(checkout, "switch", "--quiet", "main")
        if "moe-lora" in FakeFork.git(checkout, "branch"):
            FakeFork.git(checkout, "branch", "--quiet", "-D", "moe-lora")
        queue.command("pr", checkout)
        return checkout

    return make


def verify(fork, checkout, *options):
    code, out, err = fork.run("verify", checkout, *options)
    assert not err.startswith("fork.py: "), err
    return code, out.splitlines()


def test_a_series_that_stands_is_said_to(queue, series):
    assert verify(queue, series(), "--tests", "none") == (
        0,
        ["stands  Add a seam: 2 Python files", "stands  Register: 1 Python files"],
    )


def test_bad_style_is_told_with_its_file_at_the_commit_that_brings_it(queue, series):
    queue.source("tuners/lora/moe_layer.py").write_text("import os\nROUTED  =  True\n")
    code, lines = verify(queue, series(), "--tests", "none")
    assert code == 1 and lines[0].startswith("FAILS  Add a seam") and lines[-1].startswith("stands  Register")
    assert any("ruff check: src/peft/tuners/lora/moe_layer.py:1:8" in line for line in lines)
    assert any("ruff format" in line and "moe_layer.py" in line for line in lines)


def test_the_checkouts_own_settings_of_ruff_hold(queue, series, checkout):
    queue.source("tuners/lora/moe_layer.py").write_text(f'ROUTED = "{"x" * 60}", "{"y" * 60}"\n')
    assert verify(queue, series(), "--tests", "none")[0] == 1  # the made-up checkout allows 100 characters
    (checkout / "pyproject.toml").write_text("[tool.ruff]\nline-length = 150\n")
    FakeFork.git(checkout, "switch", "--quiet", "main")
    FakeFork.git(checkout, "commit", "--quiet", "--all", "--message", "Longer lines")
    assert verify(queue, series(), "--tests", "none")[0] == 0


def test_a_commit_whose_modules_need_a_later_one_does_not_stand(queue, series):
    queue.source("tuners/lora/moe_layer.py").write_text("from . import moe_router\n\nROUTER = moe_router\n")
    queue.source("tuners/lora/moe_router.py").write_text("")
    bring(queue, "registry", "src/*moe_router.py")
    code, lines = verify(queue, series(), "--tests", "none")
    assert code == 1
    assert lines[0].startswith("FAILS  Add a seam")
    assert "import: ImportError: cannot import name 'moe_router'" in lines[1]
    assert lines[2].startswith("stands  Register")


@pytest.mark.slow
def test_tests_run_at_their_commit_and_upstreams_count_only_if_they_passed_before(queue, series, checkout):
    head = "from peft.mapping import *\n\n\n"
    theirs = head + (
        "def test_kept():\n    assert FIRST\n\n\n"
        "def test_broken():\n    assert 'REGISTRY' not in globals()\n\n\n"
        "def test_failed_before():\n    assert FIRST == 9\n"
    )
    for name, content in {"__init__": "", "testing_utils": "hub_online_once = None\n", "test_map": theirs}.items():
        (checkout / f"tests/{name}.py").write_text(content)
    FakeFork.git(checkout, "add", "--all")
    FakeFork.git(checkout, "commit", "--quiet", "--message", "Tests")
    write(queue, tests__test_moe_ours="import peft.mapping\n\n\ndef test_ours():\n    assert peft.mapping.REGISTRY\n")
    bring(queue, "registry", "tests/test_moe_*.py")
    path = queue.root / "series.toml"
    path.write_text(path.read_text().replace("[[commit]]\n", '[[commit]]\ntests = ["test_map"]\n'))
    code, lines = verify(queue, series(), "--workers", "0")
    assert code == 1
    assert lines[0] == "stands  Add a seam: 2 Python files, 2 tests passed"
    assert lines[1] == "FAILS  Register: 2 Python files, 2 tests passed"
    assert len(lines) == 3 and "tests/test_map.py::test_broken: " in lines[2]


def test_a_checkout_that_does_not_end_with_the_series_is_refused(queue, checkout):
    assert "does not end with the series that fork.py pr writes" in queue.refused("verify", checkout)
