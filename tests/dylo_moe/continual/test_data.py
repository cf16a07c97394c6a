"""Blocks of a skill: visits read on, held-out blocks are held out, too little text is refused."""

import json

import pytest

from dylo_moe.continual.data import read_skill, spread
from moe_common.models.base_model import load_base_model

SIZES = {"calibration_blocks": 4, "measured_blocks": 3, "block_size": 16}


@pytest.fixture(scope="module")
def tokenizer():
    return load_base_model()[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rain")
    for split, count in {"train": 40, "validation": 30, "test": 10}.items():
        rows = [
            json.dumps({"text": f"{split} {i}: rain on hill {i} runs to the sea and comes back"}) for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return str(folder)


def words(tokenizer, blocks) -> str:
    return " ".join(tokenizer.decode(row) for row in blocks["input_ids"])


def test_a_later_visit_reads_on_where_the_earlier_stopped(source, tokenizer):
    once = read_skill(source, tokenizer, num_visits=1, blocks_a_visit=10, **SIZES)
    twice = read_skill(source, tokenizer, num_visits=2, blocks_a_visit=5, **SIZES)
    first, second = (visit["input_ids"] for visit in twice.visits)
    assert [*first, *second] == once.visits[0]["input_ids"]


def test_text_that_is_used_up_begins_anew(source, tokenizer):
    held = len(read_skill(source, tokenizer, num_visits=1, blocks_a_visit=1, **SIZES).visits[0])
    assert held == 1
    many = read_skill(source, tokenizer, num_visits=1, blocks_a_visit=200, **SIZES).visits[0]["input_ids"]
    period = many.index(many[0], 1)
    assert len(many) == 200 and 20 < period < 200
    assert many[period : 2 * period] == many[:period][: 200 - period]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_calibration_and_measuring_are_of_documents_that_were_held_out(source, tokenizer, split):
    text = read_skill(source, tokenizer, num_visits=1, blocks_a_visit=10, measured_split=split, **SIZES)
    assert (len(text.calibration), len(text.measured)) == (4, 3)
    assert "train" in words(tokenizer, text.visits[0])
    for blocks, own in ((text.calibration, "validation"), (text.measured, split)):
        said = words(tokenizer, blocks)
        assert [other for other in ("train", "validation", "test") if other in said] == [own]


def test_another_seed_reads_the_documents_in_another_order(source, tokenizer):
    one, other = (
        read_skill(source, tokenizer, num_visits=1, blocks_a_visit=5, seed=seed, **SIZES).visits[0]["input_ids"]
        for seed in (0, 1)
    )
    assert one != other


def test_spread_takes_blocks_from_beginning_to_end(source, tokenizer):
    visit = read_skill(source, tokenizer, num_visits=1, blocks_a_visit=10, **SIZES).visits[0]
    assert spread(visit, 5)["input_ids"] == visit["input_ids"][::2]
    assert spread(visit, 99)["input_ids"] == visit["input_ids"]


def test_too_little_held_out_text_is_refused_and_counted(source, tokenizer):
    with pytest.raises(
        ValueError, match=r"rain\S* has \d+ blocks of 16 tokens in its split 'validation', but 500 are"
    ):
        read_skill(source, tokenizer, num_visits=1, blocks_a_visit=1, **{**SIZES, "calibration_blocks": 500})


def test_an_unknown_or_empty_skill_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="Unknown dataset 'proze'. Closest: 'prose'"):
        read_skill("proze", tokenizer, num_visits=1, blocks_a_visit=1, **SIZES)
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(ValueError, match="none.txt is empty"):
        read_skill(str(tmp_path / "none.txt"), tokenizer, num_visits=1, blocks_a_visit=1, **SIZES)
