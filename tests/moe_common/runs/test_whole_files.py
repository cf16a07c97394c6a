import json
import stat

import pytest
import torch
from safetensors.torch import save_file

from moe_common.runs.whole_files import whole_file, whole_folder, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_in(writing):
    with writing as partial:
        (partial / "a" if partial.is_dir() else partial).write_text("ne")
        raise RuntimeError("half way")


def test_a_file_takes_the_place_of_the_old_one_and_makes_its_folder(tmp_path):
    write_text(tmp_path / "deep" / "a", "old")
    write_json(tmp_path / "deep" / "a", {"new": 1})
    assert json.loads((tmp_path / "deep" / "a").read_text()) == {"new": 1}
    assert names(tmp_path / "deep") == ["a"]


def test_what_fails_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", object())
    with pytest.raises(RuntimeError, match="half way"):
        fail_in(whole_file(tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(OSError, match="results"):
        write_text(tmp_path / "results", "{}")
    assert names(tmp_path) == ["results"]


def test_a_folder_is_there_when_all_of_it_is_written(tmp_path):
    with whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def test_who_may_read_a_folder_may_read_what_safetensors_wrote_into_it(tmp_path):
    with whole_folder(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        save_file({"a": torch.zeros(2)}, partial / "deep" / "a.safetensors")
        write_text(partial / "b", "as every file")
    rights = [stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in ("deep/a.safetensors", "b")]
    assert rights == [stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o666] * 2


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half way"):
        fail_in(whole_folder(tmp_path / "out"))
    assert names(tmp_path) == []


def test_an_empty_folder_is_filled_and_a_full_one_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
    with pytest.raises(FileExistsError, match="out is there already"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_a_folder_made_by_another_meanwhile_is_kept(tmp_path):
    filling = whole_folder(tmp_path / "out")
    (filling.__enter__() / "a").write_text("mine")
    write_text(tmp_path / "out" / "a", "theirs")
    with pytest.raises(FileExistsError, match="meanwhile"):
        filling.__exit__(None, None, None)
    assert (tmp_path / "out" / "a").read_text() == "theirs"
    assert names(tmp_path) == ["out"]
