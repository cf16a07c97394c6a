"""What a run reads: subsets, kinds of rows, and counts that agree with the rows."""

import json

import pytest

from dylo_moe.training.data import DataConfig, prepare
from dylo_moe.training.data_report import as_text, count_data
from moe_common.text.packing import IGNORED_LABEL


def read(name, split, tokenizer, *, apart=True, max_rows=None, seed=0, **options):
    config = DataConfig(**{"max_seq_length": 64, **options})
    return prepare(str(name), split, tokenizer, config, seed=seed, apart=apart, max_rows=max_rows)


def texts_of(rows, tokenizer) -> set[str]:
    joined = "".join(tokenizer.decode(row["input_ids"]) for row in rows)
    return {text.split(" rain")[0] for text in joined.split(tokenizer.eos_token) if " rain" in text}


@pytest.fixture(scope="module")
def rain(tiny_sources):
    return tiny_sources.split(",")[0]


def test_a_subset_is_that_percentage_of_the_documents_and_part_of_a_larger_one(rain, tokenizer):
    read_of = {percent: read(rain, "train", tokenizer, training_subset=percent) for percent in (10, 50, 100)}
    assert {percent: data.num_examples for percent, data in read_of.items()} == {10: 6, 50: 30, 100: 60}
    documents = {percent: texts_of(data.rows, tokenizer) for percent, data in read_of.items()}
    assert documents[10] < documents[50] < documents[100]


def test_the_evaluation_subset_acts_on_held_out_documents_only(rain, tokenizer):
    assert read(rain, "test", tokenizer, eval_subset=50).num_examples == 3
    assert read(rain, "test", tokenizer, training_subset=10).num_examples == 6
    assert read(rain, "train", tokenizer, eval_subset=50).num_examples == 60


def test_another_seed_draws_another_subset(rain, tokenizer):
    drawn = [
        texts_of(read(rain, "train", tokenizer, training_subset=20, seed=seed).rows, tokenizer) for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("length", [16, 40])
@pytest.mark.parametrize("apart", [True, False])
def test_rows_of_text_have_the_length_that_is_asked_for(rain, tokenizer, length, apart):
    rows = read(rain, "train", tokenizer, max_seq_length=length, apart=apart).rows
    assert {len(row["input_ids"]) for row in rows} == {length}
    assert ("position_ids" in rows.column_names) is apart
    assert ("attention_mask" in rows.column_names) is not apart


def test_rows_are_read_up_to_the_limit(rain, tokenizer):
    assert len(read(rain, "train", tokenizer, max_rows=5).rows) == 5
    assert len(read(rain, "train", tokenizer).rows) > 5


def test_prompts_and_responses_are_instruction_data_unless_read_as_text(tiny_chats, tokenizer):
    chats = read(tiny_chats, "train", tokenizer)
    assert chats.instruction
    assert any(label == IGNORED_LABEL for label in chats.rows[0]["labels"])
    text = read(tiny_chats, "train", tokenizer, as_text=True, apart=False)
    assert not text.instruction
    assert all(label != IGNORED_LABEL for label in text.rows[0]["labels"])


def test_a_column_of_text_may_be_named_and_makes_plain_text(tmp_path, tokenizer):
    rows = [{"body": f"the body {i} " * 9, "prompt": "a", "response": "b"} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(tmp_path, "train", tokenizer, text_column="body")
    assert not found.instruction
    assert "the body 3" in tokenizer.decode([token for row in found.rows for token in row["input_ids"]])


def test_a_built_in_domain_is_plain_text_also_where_it_has_questions_and_answers(tokenizer):
    assert not read("math", "test", tokenizer, eval_subset=1).instruction


def test_what_is_too_long_is_counted_said_and_kept_if_asked(tiny_chats, tokenizer, caplog):
    left_out = read(tiny_chats, "train", tokenizer)
    assert (left_out.num_examples, left_out.num_truncated, left_out.num_left_out) == (40, 8, 8)
    assert len(left_out.rows) == 32
    assert "8 of 40 examples are left out" in caplog.text
    kept = read(tiny_chats, "train", tokenizer, keep_truncated=True)
    assert (kept.num_truncated, kept.num_left_out, len(kept.rows)) == (8, 0, 40)


def test_nothing_that_fits_is_refused_with_what_to_do(tiny_chats, tokenizer):
    with pytest.raises(ValueError, match=r"\b40\b.*\b40\b.*--keep_truncated"):
        read(tiny_chats, "train", tokenizer, max_seq_length=4)


def test_less_text_than_one_row_is_refused(rain, tokenizer):
    with pytest.raises(ValueError, match=r"\b5000 tokens.*'train'"):
        read(rain, "train", tokenizer, max_seq_length=5000)


def test_the_tokens_that_are_counted_are_those_of_the_text(rain, tokenizer):
    for apart in (True, False):
        found = read(rain, "test", tokenizer, apart=apart, max_seq_length=50)
        whole = read(rain, "test", tokenizer, apart=False, max_seq_length=2)
        padding = 0 if apart else found.rows.num_rows * 50 - found.num_tokens
        assert padding == 0
        assert abs(found.num_tokens - whole.num_tokens) <= (1 if apart else 50)


def test_the_report_counts_each_split_and_says_what_is_missing(tiny_chats, tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} " * 30}) for i in range(20)))
    config = DataConfig(datasets=f"{tiny_chats},{tmp_path}", max_seq_length=64)
    report = count_data(config, tokenizer, seed=0, apart=True)
    assert [(line["split"], line["kind"]) for line in report] == [
        ("train", "instruction"),
        ("validation", "instruction"),
        ("test", "instruction"),
        ("train", "text"),
        ("validation", ""),
        ("test", ""),
    ]
    assert {name: report[0][name] for name in ("examples", "rows", "truncated", "left out")} == {
        "examples": 40,
        "rows": 32,
        "truncated": 8,
        "left out": 8,
    }
    assert report[3]["tokens"] == 64 * report[3]["rows"]
    text = as_text(report, config)
    assert f"{tmp_path} has no document in its split 'validation'" in text
    assert "left out (keep them with --keep_truncated)" in text
    assert "cut to it" in as_text(report, DataConfig(keep_truncated=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": " , "}, "names no dataset"),
        ({"datasets": "prose,prose"}, "names one twice"),
        ({"training_subset": 0}, "training_subset is 0"),
        ({"eval_subset": 100.5}, "eval_subset is 100.5"),
        ({"eval_blocks": 0}, "eval_blocks is 0"),
        ({"max_seq_length": 1}, "max_seq_length is 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
