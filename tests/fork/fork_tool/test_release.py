"""peft/fork_tool/release.py: the pin, fetching through pip, hashes, the cache."""

import hashlib
import shutil

import pytest
from fake_upstream import write_sdist
from fork_tool import release as fork_release
from fork_tool.release import ForkError, find_sdist, read_pin, read_sdist


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_release_is_fetched_by_name_and_then_read_from_the_cache(home, monkeypatch):
    sdist = write_sdist(home.index, "9.1.0")
    kept, found = find_sdist("peft", "9.1.0", hash_of(sdist))
    assert kept.read_bytes() == sdist.read_bytes() and found == hash_of(sdist)
    monkeypatch.setattr(fork_release.subprocess, "run", lambda *_, **__: pytest.fail("a cached release was fetched"))
    assert find_sdist("peft", "9.1.0", found) == (kept, found)
    assert find_sdist("peft", "9.1.0") == (kept, found)


def test_the_users_pip_constraints_do_not_reach_the_fetch(home, tmp_path, monkeypatch):
    (tmp_path / "constraints.txt").write_text("peft==1.0\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    monkeypatch.setenv("PIP_ONLY_BINARY", ":all:")
    sdist = write_sdist(home.index, "9.1.0")
    assert find_sdist("peft", "9.1.0", hash_of(sdist))[1] == hash_of(sdist)


def test_a_wrong_hash_is_refused_names_both_and_runs_and_keeps_nothing(home, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_MARKER", str(tmp_path / "setup-ran"))
    sdist = write_sdist(home.index, "9.1.0")
    home.pin("9.1.0", "0" * 64)
    cached = sorted(home.cache.rglob("*"))
    error = home.refused("build")
    assert hash_of(sdist) in error and "0" * 64 in error
    assert sorted(home.cache.rglob("*")) == cached
    assert not (tmp_path / "setup-ran").exists()


def test_a_damaged_copy_in_the_cache_is_fetched_anew(home):
    sdist = write_sdist(home.index, "9.1.0")
    kept, found = find_sdist("peft", "9.1.0", hash_of(sdist))
    kept.write_bytes(b"damaged")
    assert hash_of(find_sdist("peft", "9.1.0", found)[0]) == found


def test_without_a_network_the_error_says_where_to_put_the_file(home):
    home.pin("9.9.9", "1" * 64)
    error = home.refused("build")
    assert "peft==9.9.9" in error and f"{home.cache}/{'1' * 64}/peft-9.9.9.tar.gz" in error


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_FORK_CACHE", str(tmp_path / "own"))
    assert fork_release.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PEFT_FORK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fork_release.cache_folder() == tmp_path / "peft-moe-fork"


@pytest.mark.parametrize("line", ['sha256 = "abc"', 'extra = "x"', "version = "])
def test_a_malformed_pin_is_refused(tmp_path, line):
    text = f'name = "peft"\nversion = "1"\nsuffix = "moe.1"\n{line}\n'
    (tmp_path / "upstream.toml").write_text(text)
    with pytest.raises(ForkError, match=r"upstream\.toml"):
        read_pin(tmp_path / "upstream.toml")


def test_a_missing_pin_is_refused(tmp_path):
    with pytest.raises(ForkError, match=r"upstream\.toml.*missing"):
        read_pin(tmp_path / "upstream.toml")


def test_what_is_no_source_distribution_is_refused(tmp_path):
    (tmp_path / "peft-1.tar.gz").write_text("<html>")
    with pytest.raises(ForkError, match="cannot be read"):
        read_sdist(tmp_path / "peft-1.tar.gz")
    with pytest.raises(ForkError, match="lacks LICENSE"):
        read_sdist(write_sdist(tmp_path, "2", {"LICENSE": None}))


def test_paths_that_lead_out_of_the_release_are_not_read(tmp_path):
    release = read_sdist(write_sdist(tmp_path, "1", {"src/../../evil.py": "x"}))
    assert not [path for path in release.files if "evil" in path]


def test_a_fetch_without_pip_says_so(home, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(fork_release.sys, "executable", str(broken))
    shutil.rmtree(home.cache)
    assert "No module named pip" in home.refused("build")
