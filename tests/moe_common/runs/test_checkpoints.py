"""Checkpoints that were cut off are told from whole ones."""

import os

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from moe_common.models.base_identity import BaseIdentity
from moe_common.runs.checkpoints import (
    COMPLETE,
    check_base,
    checkpoints,
    is_complete,
    mark_complete,
    newest_complete,
    save_base_identity,
)


@pytest.fixture
def run(tmp_path):
    """Three whole checkpoints, the last of them of a step with more digits."""
    for step in (50, 90, 100):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "rank").mkdir(parents=True)
        (folder / "weights.bin").write_bytes(b"w" * step)
        (folder / "rank" / "state.json").write_text("{}")
        mark_complete(folder)
    (tmp_path / "checkpoint-99-old").mkdir()
    return tmp_path


def damage_truncate(folder):
    os.truncate(folder / "weights.bin", 7)


def damage_zero_the_tail(folder):
    size = (folder / "weights.bin").stat().st_size
    (folder / "weights.bin").write_bytes(b"w" * (size - 8) + bytes(8))


def damage_lose_a_file(folder):
    (folder / "rank" / "state.json").unlink()


def damage_no_list(folder):
    (folder / COMPLETE).unlink()


def damage_half_a_list(folder):
    (folder / COMPLETE).write_text('{"weights.bin": 1')


def damage_list_never_renamed(folder):
    os.rename(folder / COMPLETE, folder / (f"{COMPLETE}.123.partial"))


DAMAGES = [
    damage_truncate,
    damage_zero_the_tail,
    damage_lose_a_file,
    damage_no_list,
    damage_half_a_list,
    damage_list_never_renamed,
]


def test_the_newest_is_that_of_the_highest_step(run):
    assert newest_complete(run) == run / "checkpoint-100"
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-50", "checkpoint-90", "checkpoint-100"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_that_was_cut_off_is_passed_over_and_named(run, damage, caplog):
    damage(run / "checkpoint-100")
    assert not is_complete(run / "checkpoint-100")
    assert newest_complete(run) == run / "checkpoint-90"
    assert "checkpoint-100 is damaged or was cut off" in caplog.text


def test_what_was_cut_off_is_removed_and_nothing_else(run):
    damage_truncate(run / "checkpoint-90")
    assert newest_complete(run, removes_others=True) == run / "checkpoint-100"
    assert sorted(folder.name for folder in run.iterdir()) == ["checkpoint-100", "checkpoint-50", "checkpoint-99-old"]


def test_with_none_whole_there_is_none(run):
    for folder in checkpoints(run):
        damage_no_list(folder)
    assert newest_complete(run) is None
    assert newest_complete(run / "nowhere") is None


def test_another_base_is_refused_and_a_moved_one_is_not(tiny_base, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    save_base_identity(tmp_path, BaseIdentity.of(base, "here"))
    check_base(tmp_path, BaseIdentity.of(base, "moved"))
    check_base(tmp_path / "without a note", BaseIdentity.of(base, "here"))
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_base))
    with pytest.raises(ValueError, match="'here'.*'other'"):
        check_base(tmp_path, BaseIdentity.of(other, "other"))
