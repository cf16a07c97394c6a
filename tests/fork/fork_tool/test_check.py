"""peft/fork_tool/check.py: everything that may drift apart is told."""

import pytest
from fake_upstream import LINES, FakeFork


@pytest.fixture
def checked(queue):
    """A fork that passes, in git, with pyproject's extras."""
    with (queue.root / "pyproject.toml").open("a") as project:
        project.write('[tool.setuptools.dynamic.optional-dependencies]\ntest = { file = ".fork/extra-test.txt" }\n')
    FakeFork.git(queue.root, "init", "--quiet")
    FakeFork.git(queue.root, "add", "--all")
    return queue


def faults_of(fork: FakeFork) -> str:
    code, _, err = fork.run("check")
    assert (code == 1) == bool(err)
    return err


def test_check_counts_lines_by_patch_and_in_all(checked):
    out = checked.command("check")
    assert "+1    -0    0001-seam.patch: Add a seam\n" in out
    assert "+2    -1    0002-registry.patch: Register\n" in out
    assert "2 patches on peft 9.0.0, added lines: 3, removed lines: 1\n" in out


def test_check_works_without_git_around_it(queue):
    assert "extras" in faults_of(queue)


def test_a_hand_edit_and_a_missing_file_are_drift(checked):
    checked.edit("mapping.py", "line 2", "mine")
    checked.source("py.typed").unlink()
    wrong = faults_of(checked)
    assert "src/peft/mapping.py is not what the queue builds" in wrong and "src/peft/py.typed is missing" in wrong


def test_a_tree_that_was_not_built_is_told(home):
    assert "has not been built" in faults_of(home)


def test_a_wrong_or_missing_count_in_the_readme_is_told(checked):
    readme = checked.root / "README.md"
    readme.write_text("Removed lines: 5\n")
    assert "README.md says removed lines: 5, but it is 1" in faults_of(checked)
    readme.write_text("nothing\n")
    assert "README.md has no line" in faults_of(checked)


def test_malformed_headers_and_twin_patches_are_told(checked):
    patch = checked.root / "patches/0001-seam.patch"
    patch.write_text(patch.read_text().replace("Upstream:", "Sent:").replace("Add a seam", "Register"))
    wrong = faults_of(checked)
    assert "patches/0001-seam.patch: its header must have a line 'Upstream: ...'" in wrong
    assert "two patches have the same subject" in wrong


def test_a_tracked_file_of_upstream_is_told(checked):
    FakeFork.git(checked.root, "add", "--force", "src/peft/mapping.py")
    assert "src/peft/mapping.py is upstream's and must not be tracked" in faults_of(checked)


def test_a_copy_of_an_upstream_file_under_another_name_is_told(checked):
    checked.source("moe_copy.py").write_text(LINES)
    FakeFork.git(checked.root, "add", "--all")
    assert "src/peft/moe_copy.py is tracked by git and is a copy of upstream's" in faults_of(checked)


def test_a_module_that_git_ignores_is_told(checked):
    checked.source("helper.py").write_text("")
    assert "src/peft/helper.py is ours but git ignores it" in faults_of(checked)


def test_extras_that_are_not_upstreams_are_told(checked):
    project = checked.root / "pyproject.toml"
    project.write_text(project.read_text().replace("\ntest = ", "\nmore = "))
    assert "pyproject.toml has extras ['more'], but upstream has ['test']" in faults_of(checked)


def test_a_file_that_no_commit_of_the_pull_request_brings_is_told(checked):
    (checked.root / "tests").mkdir()
    (checked.root / "tests/test_moe_routing.py").write_text("")
    assert "names no patch that brings tests/test_moe_routing.py" in checked.run("check")[2]
