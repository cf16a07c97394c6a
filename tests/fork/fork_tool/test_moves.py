"""peft/fork_tool/moves.py: hand edits into the queue, commits into the queue, another release."""

import shutil

import pytest
from fake_upstream import LINES, FakeFork, write_sdist
from fork_tool import release as fork_release


def tree(fork: FakeFork) -> dict[str, tuple]:
    return {path: kept for path, kept in fork.snapshot().items() if path.startswith("src/")}


def test_refresh_takes_an_edit_into_the_last_patch_that_touches_the_file(queue):
    first = queue.patch(1)
    queue.edit("tuners/lora/layer.py", "line 25", "line 25\nlater")
    assert "src/peft/tuners/lora/layer.py" in queue.command("refresh")
    assert queue.patch(1) == first
    assert "+later\n" in queue.patch(2) and "+registry\n" in queue.patch(2)


def test_the_round_trip_of_build_edit_refresh_build_gives_identical_trees(queue):
    queue.edit("tuners/lora/layer.py", "line 2", "line 2\nearlier")
    queue.edit("mapping.py", "line 3", "line three")
    edited = tree(queue)
    queue.command("refresh")
    assert "0 files written" in queue.command("build")
    assert tree(queue) == edited
    for folder in ("src/peft/mapping.py", "src/peft/tuners/lora/layer.py", ".fork/manifest.json"):
        (queue.root / folder).unlink()
    queue.command("build")
    assert tree(queue) == edited


def test_refresh_without_edits_changes_nothing(queue):
    before = queue.snapshot(with_times=True)
    assert "no file" in queue.command("refresh")
    assert queue.snapshot(with_times=True) == before


def test_refresh_into_an_earlier_patch_moves_the_later_ones_along(queue):
    queue.edit("tuners/lora/layer.py", "seam", "seam\nwider")
    edited = tree(queue)
    queue.command("refresh", "--patch", "0001")
    assert "+seam\n+wider\n" in queue.patch(1) and "wider" not in queue.patch(2)
    assert "@@ -22 +22 @@" in queue.patch(2)
    assert tree(queue) == edited


def test_refresh_keeps_headers_as_they_are(queue):
    path = queue.root / "patches/0002-registry.patch"
    header = "Register\n\nSo that it is found.\n\n# a list:\n  * kept\n\nUpstream: not sent yet."
    path.write_text(header + "\n\n" + path.read_text()[path.read_text().index("diff --git") :])
    queue.edit("mapping.py", "line 3", "line three")
    queue.command("refresh")
    assert queue.patch(2).startswith(header + "\n\ndiff --git")


def test_refresh_makes_a_new_patch_at_the_end(queue):
    queue.edit("mapping.py", "line 3", "line three")
    queue.edit("__init__.py", "__version__ = 'fake'", "__version__ = 'fake'\nimport os")
    queue.command("refresh", "--new", "third", "--subject", "S", "--why", "W", "--upstream", "sent as 1.")
    assert (queue.root / "patches/0003-third.patch").read_text().startswith("S\n\nW\n\nUpstream: sent as 1.\n\ndiff")
    assert "three" not in queue.patch(2)


def test_refresh_counts_removed_lines_in_the_readme(queue):
    assert "Removed lines: 1\n" in (queue.root / "README.md").read_text()
    queue.edit("mapping.py", "line 3", "line three")
    queue.command("refresh")
    assert "Removed lines: 2\n" in (queue.root / "README.md").read_text()


def test_an_edit_that_no_patch_touches_is_named(queue):
    queue.edit("__init__.py", "__version__ = 'fake'", "__version__ = 'mine'")
    error = queue.refused("refresh")
    assert "No patch touches src/peft/__init__.py" in error and "--new" in error


def test_an_edit_that_conflicts_with_a_later_patch_changes_nothing(queue):
    queue.edit("tuners/lora/layer.py", "line twenty", "line two times ten")
    error = queue.refused("refresh", "--patch", "0001-seam")
    assert "conflicts in src/peft/tuners/lora/layer.py" in error


def test_an_edit_that_undoes_a_whole_patch_is_refused(queue):
    queue.source("tuners/lora/layer.py").write_text(LINES.replace("line 20\n", "line twenty\n"))
    error = queue.refused("refresh", "--patch", "0001")
    assert "undo all of patches/0001-seam.patch" in error and "refresh --drop" in error


def test_a_dropped_patch_moves_the_later_ones_along(queue):
    assert "dropped 0001-seam.patch" in queue.command("refresh", "--drop", "seam")
    assert [path.name for path in (queue.root / "patches").iterdir()] == ["0002-registry.patch"]
    assert "@@ -20 +20 @@" in queue.patch(2)
    assert queue.source("tuners/lora/layer.py").read_text() == LINES.replace("line 20\n", "line twenty\n")


def test_a_patch_that_a_later_one_builds_on_is_not_dropped(queue):
    queue.edit("tuners/lora/layer.py", "seam", "SEAM")
    assert "Run fork.py refresh first" in queue.refused("refresh", "--drop", "seam")
    queue.command("refresh")
    error = queue.refused("refresh", "--drop", "seam")
    assert "patches/0002-registry.patch conflicts in src/peft/tuners/lora/layer.py" in error


def test_an_unknown_or_unclear_patch_is_refused_with_the_choice(queue):
    queue.edit("mapping.py", "line 3", "line three")
    assert "0001-seam.patch, 0002-registry.patch" in queue.refused("refresh", "--patch", "nonesuch")
    assert "2 patches are named like '000'" in queue.refused("refresh", "--patch", "000")


def test_refresh_before_the_first_build_is_refused(home):
    assert "Run fork.py build first" in home.refused("refresh")


def test_a_new_patch_without_edits_is_refused(queue):
    assert "nothing for a new patch" in queue.refused("refresh", "--new", "x", "--subject", "S", "--why", "W")


def test_edits_made_before_the_patches_changed_are_merged_with_them(queue, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(queue.root, other)
    colleague = FakeFork(root=other, capsys=queue.capsys, cache=queue.cache, index=queue.index)
    colleague.edit("mapping.py", "line 28", "line 28\ncolleague")
    colleague.command("refresh")
    queue.edit("mapping.py", "line 2", "line 2\nmine")
    shutil.copy(other / "patches/0002-registry.patch", queue.root / "patches/0002-registry.patch")
    queue.refused("build")
    queue.command("refresh")
    text = queue.source("mapping.py").read_text()
    assert "mine\n" in text and "colleague\n" in text and "registry\n" in text
    assert "+mine\n" in queue.patch(2) and "+colleague\n" in queue.patch(2)


def test_edits_that_contradict_changed_patches_are_refused(queue, tmp_path):
    patch = queue.root / "patches/0002-registry.patch"
    queue.edit("mapping.py", "registry", "theirs")
    queue.command("refresh")
    theirs = patch.read_text()
    queue.edit("mapping.py", "theirs", "registry")
    queue.command("refresh")
    queue.edit("mapping.py", "registry", "mine")
    patch.write_text(theirs)
    assert "src/peft/mapping.py cannot be taken" in queue.refused("refresh")


def test_patches_for_upstreams_tests_survive_a_refresh(queue, checkout):
    FakeFork.git(checkout, "switch", "--quiet", "--create", "work")
    (checkout / "tests/test_layer.py").write_text(LINES + "routed\n")
    FakeFork.git(checkout, "commit", "-a", "--quiet", "--message", "Test it\n\nWhy.\n\nUpstream: not sent yet.")
    queue.command("refresh", "--from", checkout, "--base", "main")
    assert not (queue.root / "src/tests").exists()
    before = queue.patch(1)
    queue.command("refresh")
    assert queue.patch(1) == before and "+routed\n" in before


def commit_in(checkout, message, **texts):
    for name, text in texts.items():
        (checkout / f"src/peft/{name}.py").write_text(text)
    FakeFork.git(checkout, "add", "--all")
    FakeFork.git(checkout, "commit", "--quiet", "--message", message)


def test_commits_of_another_repository_become_the_queue(home, checkout):
    home.command("build")
    commit_in(checkout, "Our modules", moe_router="x = 1\n")
    commit_in(
        checkout, "Add: a seam\n\nWhy.\n\nUpstream: not sent yet.", mapping="seam\n" + LINES, moe_router="x = 2\n"
    )
    commit_in(checkout, "Another\n\nWhy.\n\nUpstream: never.", mapping="seam\n" + LINES + "end\n")
    out = home.command("refresh", "--from", checkout, "--base", "HEAD~3")
    assert "2 patches: 0001-add-a-seam.patch, 0002-another.patch" in out
    assert home.patch(1).startswith(
        "Add: a seam\n\nWhy.\n\nUpstream: not sent yet.\n\ndiff --git a/src/peft/mapping.py"
    )
    assert "moe_router" not in home.patch(1)
    assert home.source("mapping.py").read_text() == "seam\n" + LINES + "end\n"


def test_a_commit_without_its_upstream_line_is_refused(home, checkout):
    home.command("build")
    commit_in(checkout, "Subject\n\nWhy.", mapping="seam\n" + LINES)
    assert "Upstream: ..." in home.refused("refresh", "--from", checkout, "--base", "HEAD~1")


def test_commits_on_another_text_than_the_release_are_refused(home, checkout):
    home.command("build")
    commit_in(checkout, "Other release", mapping="other\n" + LINES)
    commit_in(checkout, "Seam\n\nWhy.\n\nUpstream: no.", mapping="other\nseam\n" + LINES)
    error = home.refused("refresh", "--from", checkout, "--base", "HEAD~1")
    assert "src/peft/mapping.py at HEAD~1 is not the text of peft 9.0.0" in error


def release(fork, tmp_path, version, **texts):
    changes = {f"src/peft/{name}.py": text for name, text in texts.items()}
    return fork.keep(write_sdist(tmp_path, version, changes))


def test_rebase_moves_the_queue_and_the_pin_to_another_release(queue, tmp_path):
    sha256 = release(queue, tmp_path, "9.1.0", mapping="new\n" + LINES, added="x\n")
    assert sha256 in queue.command("rebase", "9.1.0")
    assert "@@ -9,0 +10 @@" in queue.patch(2)
    pin = (queue.root / "upstream.toml").read_text()
    assert pin.startswith("# the pin\n") and f'version = "9.1.0"\nsha256 = "{sha256}"\nsuffix = "moe.7"' in pin
    assert queue.source("mapping.py").read_text() == "new\n" + LINES.replace("line 8\n", "line 8\nregistry\n")
    assert queue.source("added.py").is_file()
    assert "0 files written" in queue.command("build")


def test_rebase_and_back_gives_the_same_fork(queue, tmp_path):
    before = queue.snapshot()
    release(queue, tmp_path, "9.1.0", mapping="new\n" + LINES)
    queue.command("rebase", "9.1.0")
    queue.command("rebase", "9.0.0")
    assert queue.snapshot() == before


def test_rebase_fetches_a_release_by_name_and_pins_the_hash_it_found(queue):
    sdist = write_sdist(queue.index, "9.1.0")
    queue.command("rebase", "9.1.0")
    assert fork_release.read_pin(queue.root / "upstream.toml").version == "9.1.0"
    assert (queue.cache / fork_release.read_pin(queue.root / "upstream.toml").sha256 / sdist.name).is_file()


def test_a_conflict_in_rebase_names_patch_and_file_and_changes_nothing(queue, tmp_path):
    release(queue, tmp_path, "9.1.0", **{"tuners/lora/layer": LINES.replace("line 20\n", "line xx\n")})
    error = queue.refused("rebase", "9.1.0")
    assert "patches/0002-registry.patch conflicts in src/peft/tuners/lora/layer.py" in error


def test_a_patch_that_the_release_has_already_is_dropped(queue, tmp_path):
    release(queue, tmp_path, "9.1.0", **{"tuners/lora/layer": LINES.replace("line 5\n", "line 5\nseam\n")})
    assert "dropped 0001-seam.patch" in queue.command("rebase", "9.1.0")
    assert [path.name for path in (queue.root / "patches").iterdir()] == ["0002-registry.patch"]


def test_rebase_of_an_empty_queue_moves_the_pin(home, tmp_path):
    release(home, tmp_path, "9.1.0", mapping="new\n")
    home.command("rebase", "9.1.0")
    assert home.source("mapping.py").read_text() == "new\n"


def test_rebase_onto_a_file_of_ours_or_over_edits_is_refused(queue, tmp_path):
    release(queue, tmp_path, "9.1.0", **{"tuners/lora/moe_layer": "theirs\n"})
    assert "Rename ours" in queue.refused("rebase", "9.1.0")
    queue.edit("mapping.py", "line 2", "mine")
    assert "Run fork.py refresh first" in queue.refused("rebase", "9.1.0")


def test_rebase_to_a_release_that_does_not_exist_is_refused(queue):
    assert "peft==9.5.0" in queue.refused("rebase", "9.5.0")


@pytest.mark.parametrize("header", ["Add a seam\n\nWhy.\n\nUpstream: one\nand two.\n\nMore.", "Upstream: x\n\nWhy."])
def test_only_the_upstream_paragraph_is_left_out_of_a_message(header):
    from fork_tool.patches import Patch

    assert "Upstream" not in Patch("0001-a.patch", header, "").message
    assert "one" not in Patch("0001-a.patch", header, "").message
