"""peft/fork_tool/tree.py: laying the built tree, refusing what would lose work."""

import os

import pytest
from fake_upstream import LINES, FakeFork, write_sdist
from fork_tool import release as fork_release


def test_build_lays_upstream_with_patches_and_leaves_our_modules_alone(queue):
    assert queue.source("tuners/lora/layer.py").read_text() == LINES.replace("line 5\n", "line 5\nseam\n").replace(
        "line 20\n", "line twenty\n"
    )
    assert queue.source("mapping.py").read_text() == LINES.replace("line 8\n", "line 8\nregistry\n")
    assert queue.source("tuners/lora/moe_layer.py").read_text() == "ROUTED = True\n"
    assert not (queue.root / "tests").exists()


def test_build_works_with_an_empty_queue_and_without_git(home, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "peft 9.0.0+moe.7: 0 patches; 6 files written" in home.command("build")
    assert home.source("mapping.py").read_text() == LINES


def test_a_second_build_writes_nothing_and_needs_neither_network_nor_cache(queue, monkeypatch):
    queue.command("build")
    before = queue.snapshot(with_times=True)
    monkeypatch.setenv("PEFT_FORK_CACHE", "/nonexistent")
    assert "0 files written" in queue.command("build")
    assert queue.snapshot(with_times=True) == before


def test_a_build_elsewhere_uses_the_cache_and_no_network(queue, monkeypatch):
    monkeypatch.setattr(fork_release, "_fetch_with_pip", lambda *_: pytest.fail("pip was called"))
    (queue.root / ".fork/manifest.json").unlink()
    assert "0 files written" in queue.command("build")


def test_only_changed_files_are_rewritten(queue):
    before = queue.snapshot(with_times=True)
    queue.edit("mapping.py", "registry", "registered")
    queue.command("refresh")
    after = queue.snapshot(with_times=True)
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {"src/peft/mapping.py", "patches/0002-registry.patch", ".fork/manifest.json"}


def test_hand_edits_are_refused_and_named_and_kept(queue):
    queue.edit("mapping.py", "line 2", "mine")
    queue.edit("tuners/lora/layer.py", "line 2", "mine")
    (queue.root / "patches/0002-registry.patch").unlink()
    error = queue.refused("build")
    assert "2 generated file(s)" in error and "src/peft/mapping.py" in error and "fork.py refresh" in error
    assert "src/peft/tuners/lora/layer.py" in error


def test_hand_edits_are_refused_when_the_queue_is_unchanged(queue):
    queue.edit("mapping.py", "line 2", "mine")
    assert "src/peft/mapping.py" in queue.refused("build")


def test_a_deleted_generated_file_is_restored(queue):
    queue.source("mapping.py").unlink()
    queue.command("build")
    assert "registry" in queue.source("mapping.py").read_text()


def test_a_lost_manifest_does_no_harm_to_a_tree_that_was_not_edited(queue):
    (queue.root / ".fork/manifest.json").unlink()
    queue.command("build")
    queue.edit("mapping.py", "line 2", "mine")
    (queue.root / ".fork/manifest.json").unlink()
    assert "no build wrote" in queue.refused("build")


def test_an_upstream_file_at_the_path_of_ours_is_refused(home, tmp_path):
    sdist = write_sdist(tmp_path, "9.1.0", {"src/peft/tuners/lora/moe_layer.py": "theirs\n"})
    home.pin("9.1.0", home.keep(sdist))
    error = home.refused("build")
    assert "src/peft/tuners/lora/moe_layer.py" in error and "Rename ours" in error


def test_a_patch_that_does_not_apply_leaves_the_tree_as_it_was(queue):
    patch = queue.root / "patches/0002-registry.patch"
    patch.write_text(patch.read_text().replace("-line 20", "-line 21").replace("index ", "index 0"))
    assert "patches/0002-registry.patch does not apply" in queue.refused("build")


def test_a_file_that_upstream_dropped_is_removed_with_its_empty_folder(home, tmp_path):
    home.pin("9.1.0", home.keep(write_sdist(tmp_path, "9.1.0", {"src/peft/old/gone.py": "x\n"})))
    home.command("build")
    home.pin("9.2.0", home.keep(write_sdist(tmp_path, "9.2.0")))
    assert "1 removed" in home.command("build")
    assert not home.source("old").exists()


def test_a_build_that_fails_half_way_is_undone(queue, monkeypatch):
    (queue.root / "patches/0002-registry.patch").unlink()
    real = os.replace

    def fail_on_the_second(source, target):
        if str(target).endswith("lora/layer.py") and "new" in str(source):
            raise PermissionError(13, "Permission denied", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", fail_on_the_second)
    assert "It was undone" in queue.refused("build")


def test_the_notice_lists_the_changed_files_and_the_dependencies_are_upstreams(queue):
    assert "  peft/mapping.py\n  peft/tuners/lora/layer.py\n" in (queue.root / "NOTICE").read_text()
    assert (queue.root / ".fork/dependencies.txt").read_text() == "numpy>=1.17\n"
    assert (queue.root / ".fork/extra-test.txt").read_text() == 'tqdm; python_version < "4"\n'


def test_git_ignores_what_is_generated_and_sees_what_is_ours(queue):
    FakeFork.git(queue.root, "init", "--quiet")
    package = queue.source("tuners/moe_lora/router.py")
    package.parent.mkdir()
    package.write_text("")
    cached = queue.source("tuners/lora/__pycache__/moe_layer.cpython-311.pyc")
    cached.parent.mkdir()
    cached.write_text("")
    FakeFork.git(queue.root, "add", "--all")
    tracked = FakeFork.git(queue.root, "ls-files", "src", ".fork", "LICENSE", "NOTICE").split()
    assert tracked == ["src/peft/tuners/lora/moe_layer.py", "src/peft/tuners/moe_lora/router.py"]


def test_a_module_of_ours_that_git_would_ignore_is_pointed_out(queue):
    queue.source("helper.py").write_text("")
    code, _, err = queue.run("build")
    assert code == 0 and "src/peft/helper.py is ours but git ignores it" in err
