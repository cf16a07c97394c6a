"""peft/fork_tool/pull_request.py: the queue, our own files and the documentation as commits on a branch."""

import pytest
from fake_upstream import LINES, FakeFork, bring, write


def files_of(checkout, commit):
    return FakeFork.git(checkout, "show", "--format=", "--name-only", commit).split()


def commit_in(checkout, message, **texts):
    for name, text in texts.items():
        (checkout / f"src/peft/{name}.py").write_text(text)
    FakeFork.git(checkout, "add", "--all")
    FakeFork.git(checkout, "commit", "--quiet", "--message", message)


def test_each_commit_is_a_patch_with_the_files_it_needs_and_the_last_one_is_the_documentation(queue, checkout):
    write(queue, tests__test_moe_routing="ours\n", docs__package_reference__moe="ours\n")
    write(queue, **{"tests__.hypothesis__x": "a tool's\n", "examples__moe__readme": "ours\n"})
    bring(queue, "registry", "tests/test_moe_*.py")
    queue.command("pr", checkout)
    assert FakeFork.git(checkout, "branch", "--show-current") == "moe-lora"
    log = FakeFork.git(checkout, "log", "--reverse", "--format=%an <%ae> %s", "main..moe-lora").splitlines()
    assert log == [f"Ada <ada@example.org> {subject}" for subject in ("Add a seam", "Register", "Document it")]
    assert FakeFork.git(checkout, "log", "-1", "--format=%b", "moe-lora~1") == "So that it is found."
    assert FakeFork.git(checkout, "log", "-1", "--format=%b") == "For its readers."
    assert files_of(checkout, "moe-lora~2") == ["src/peft/tuners/lora/layer.py", "src/peft/tuners/lora/moe_layer.py"]
    assert files_of(checkout, "moe-lora~1") == [
        "src/peft/mapping.py",
        "src/peft/tuners/lora/layer.py",
        "tests/moe_lora/test_moe_routing.py",
    ]
    assert files_of(checkout, "moe-lora") == [
        "docs/source/_toctree.yml",
        "docs/source/package_reference/moe.md",
        "examples/moe/readme.md",
    ]
    assert (checkout / "src/peft/mapping.py").read_text() == queue.source("mapping.py").read_text()


def test_a_patch_that_is_the_forks_own_is_left_out(queue, checkout):
    queue.edit("mapping.py", "line 30", "line 30\nours alone")
    queue.command("refresh", "--new", "own", "--subject", "Ours", "--why", "A name.", "--upstream", "no, it is ours.")
    queue.command("pr", checkout)
    log = FakeFork.git(checkout, "log", "--reverse", "--format=%s", "main..").splitlines()
    assert log == ["Add a seam", "Register"]
    assert "registry" in (checkout / "src/peft/mapping.py").read_text()
    assert "ours alone" not in (checkout / "src/peft/mapping.py").read_text()


def test_a_page_is_listed_below_its_neighbour_in_every_place(queue, checkout):
    write(queue, docs__package_reference__moe="ours\n")
    queue.command("pr", checkout)
    assert (
        (checkout / "docs/source/_toctree.yml").read_text()
        == """\
- title: Methods
  sections:
    - sections:
      - local: package_reference/lora
        title: LoRA
      - local: package_reference/moe
        title: MoE
      title: Adapters
- title: API
  sections:
  - local: package_reference/lora
    title: LoRA
  - local: package_reference/moe
    title: MoE
"""
    )


def test_a_checkout_without_the_neighbour_or_without_contents_is_refused(queue, checkout):
    write(queue, docs__package_reference__moe="ours\n")
    (checkout / "docs/source/_toctree.yml").write_text("- title: Methods\n")
    FakeFork.git(checkout, "commit", "--quiet", "--all", "--message", "Other contents")
    assert "does not list package_reference/lora, below which package_reference/moe" in queue.refused("pr", checkout)
    FakeFork.git(checkout, "rm", "--quiet", "docs/source/_toctree.yml")
    FakeFork.git(checkout, "commit", "--quiet", "--message", "No contents")
    assert "has no docs/source/_toctree.yml" in queue.refused("pr", checkout)


def test_without_documentation_there_is_no_last_commit(queue, checkout):
    assert queue.command("pr", checkout).splitlines() == ["Add a seam", "Register"]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('patch = "registry"', 'patch = "other"', "only one of them has other, registry"),
        ("moe_layer.py", "moe_none.py", "moe_none.py of seam is no file of ours, or an earlier patch has it"),
        ("[last]", "[lost]", "must hold [[commit]] tables and one [last] table"),
        ("[[commit]]", "[commit", "must hold [[commit]] tables"),
        ('title = "MoE"', 'name = "MoE"', "must hold [[commit]] tables"),
    ],
)
def test_a_series_that_does_not_fit_the_queue_is_refused(queue, checkout, old, new, error):
    series = queue.root / "series.toml"
    series.write_text(series.read_text().replace(old, new, 1))
    assert error in queue.refused("pr", checkout)


def test_a_file_that_no_patch_brings_and_a_missing_series_are_refused(queue, checkout):
    write(queue, tests__test_moe_routing="ours\n")
    assert "names no patch that brings tests/test_moe_routing.py" in queue.refused("pr", checkout)
    (queue.root / "series.toml").unlink()
    assert "series.toml is missing" in queue.refused("pr", checkout)


def test_the_series_of_pr_has_context_and_applies_to_the_pristine_release(queue, checkout, tmp_path):
    queue.command("pr", checkout, "--branch", "mine")
    mails = FakeFork.git(checkout, "format-patch", "main..mine", "--output-directory", tmp_path / "mails").split()
    assert len(mails) == 2
    FakeFork.git(checkout, "switch", "--quiet", "--create", "again", "main")
    FakeFork.git(checkout, "am", "--quiet", *mails)
    assert FakeFork.git(checkout, "diff", "again", "mine") == ""
    assert "\n line 4\n line 5\n+seam\n line 6" in (tmp_path / "mails" / mails[0].split("/")[-1]).read_text()


def test_pr_merges_onto_a_checkout_that_has_moved_on(queue, checkout):
    commit_in(checkout, "Moved on", mapping="new\n" + LINES)
    queue.command("pr", checkout)
    text = (checkout / "src/peft/mapping.py").read_text()
    assert text == "new\n" + LINES.replace("line 8\n", "line 8\nregistry\n")


def state(checkout):
    return FakeFork.git(checkout, "for-each-ref"), FakeFork.git(checkout, "status", "--branch", "--porcelain")


def test_pr_with_a_conflict_names_it_and_leaves_the_checkout_alone(queue, checkout):
    commit_in(checkout, "Moved on", mapping=LINES.replace("line 8\n", "line xx\n").replace("line 9\n", "line yy\n"))
    before = state(checkout)
    error = queue.refused("pr", checkout)
    assert "patches/0002-registry.patch conflicts with the checkout in src/peft/mapping.py" in error
    assert state(checkout) == before


def test_pr_refuses_a_dirty_checkout_an_existing_branch_and_what_is_no_checkout(queue, checkout, tmp_path):
    FakeFork.git(checkout, "branch", "taken")
    assert "has a branch taken already" in queue.refused("pr", checkout, "--branch", "taken")
    assert "not the top folder of a git checkout" in queue.refused("pr", tmp_path)
    assert "not the top folder of a git checkout" in queue.refused("pr", checkout / "src")
    assert "nonesuch is not a folder" in queue.refused("pr", tmp_path / "nonesuch")
    (checkout / "notes.txt").write_text("")
    assert "1 uncommitted change(s), such as notes.txt" in queue.refused("pr", checkout)


def test_pr_refuses_a_checkout_that_has_our_files(queue, checkout):
    commit_in(checkout, "Theirs", **{"tuners/lora/moe_layer": "theirs\n"})
    assert "src/peft/tuners/lora/moe_layer.py" in queue.refused("pr", checkout)


def test_a_pr_branch_that_was_worked_on_comes_back_as_the_queue(queue, checkout):
    before = queue.snapshot()
    queue.command("pr", checkout)
    queue.command("refresh", "--from", checkout, "--base", "main")
    assert queue.snapshot() == before
