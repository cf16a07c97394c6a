import json

import pytest

from moe_common.text.packing import IGNORED_LABEL
from moe_ext.multi_token.training.data import (
    Pair,
    Source,
    continued_row,
    prompt_tokens,
    read_pairs,
    read_source,
    to_prompts,
    to_rows,
)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


GOOD = {"question": "Where?", "response": "Here."}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Where?"}, r"line 2\b.*response.*columns question"),
        ({"response": "Here."}, "line 2 has no question"),
        ({"question": "Where?", "response": ""}, "line 2 has an empty response"),
        ({"question": "Where?", "response": "  \n"}, "line 2 has an empty response"),
        ({"question": "", "response": "Here."}, "line 2 has an empty question"),
        ({"question": "Where?", "response": 3}, "line 2: its response is a int"),
        ("[1, 2]", "line 2 holds a JSON list"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_a_line_that_is_no_pair_is_refused_and_named(tmp_path, line, message):
    path = write(tmp_path / "qa.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_empty_lines_between_pairs_do_not_count(tmp_path):
    assert read_pairs(write(tmp_path / "qa.jsonl", GOOD, "", GOOD)) == [Pair("Where?", "Here.")] * 2


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        read_pairs(write(tmp_path / "qa.jsonl", ""))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        read_source(str(tmp_path / "none.jsonl"))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "qa.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_source(str(tmp_path / "qa.jsonl"))


def test_what_is_held_out_is_not_trained_on_and_nothing_is_lost(tmp_path):
    pairs = [{"question": f"What is {n}?", "response": f"{n}."} for n in range(200)]
    path = str(write(tmp_path / "qa.jsonl", *pairs))
    parts = {split: set(read_source(path, split).pairs) for split in ("train", "validation", "test", "all")}
    assert parts["train"] | parts["validation"] | parts["test"] == parts["all"]
    assert len(parts["all"]) == 200
    assert not parts["train"] & parts["test"]
    assert 0 < len(parts["test"]) < 30


def test_text_and_pairs_can_be_read_together(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("one\n\ntwo")
    path = write(tmp_path / "qa.jsonl", *[GOOD] * 3)
    found = read_source(f"{path}, {tmp_path / 'text'}", "all")
    assert len(found.pairs) == 3
    assert found.texts == ["one", "two"]


def test_a_jsonl_of_plain_text_is_text(tmp_path):
    path = write(tmp_path / "text.jsonl", {"text": "one"}, {"text": "two"})
    assert read_source(str(path), "all").texts == ["one", "two"]


def test_data_without_a_word_is_refused():
    with pytest.raises(ValueError, match="holds no text"):
        read_source(" , ")


def test_a_pair_is_one_row_and_every_token_of_it_is_learnt(tokenizer):
    row = to_rows(Source(pairs=[Pair("Where?", "Here.")], texts=[]), tokenizer, length=64)[0]
    assert row["labels"] == row["input_ids"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    asked = prompt_tokens("Where?", tokenizer)
    assert row["input_ids"][: len(asked)] == asked
    assert tokenizer.decode(row["input_ids"][len(asked) : -1]) == "Here."


def test_a_tokenizer_without_a_template_asks_by_the_default_one(tokenizer):
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert tokenizer.decode(prompt_tokens("Where?", tokenizer)) == "User: Where?\nAssistant:"
    finally:
        tokenizer.chat_template = template


def test_a_long_pair_is_cut(tokenizer):
    rows = to_rows(Source(pairs=[Pair("Where?", "Here. " * 99)], texts=[]), tokenizer, length=16)
    assert len(rows[0]["input_ids"]) == 16


def test_text_is_packed_with_ends_between_documents(tokenizer):
    rows = to_rows(Source(pairs=[], texts=["one two", "three"]), tokenizer, length=8)
    tokens = [
        token for row in rows for token, real in zip(row["input_ids"], row["attention_mask"], strict=True) if real
    ]
    assert tokenizer.decode(tokens) == f"one two{tokenizer.eos_token}three{tokenizer.eos_token}"


def test_prompts_are_pieces_of_a_text_or_its_beginning(tokenizer):
    text = "word " * 50
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    source = Source(pairs=[], texts=[text])
    pieces = to_prompts(source, tokenizer, length=16, whole_texts=False)
    assert pieces == [tokens[start : start + 16] for start in range(0, len(tokens) - 15, 16)]
    assert to_prompts(source, tokenizer, length=16, whole_texts=True) == [tokens[:16]]


def test_of_a_short_text_the_first_half_is_the_prompt(tokenizer):
    tokens = tokenizer("one two three four", add_special_tokens=False)["input_ids"]
    found = to_prompts(Source(pairs=[], texts=["one two three four"]), tokenizer, length=16, whole_texts=False)
    assert found == [tokens[: (len(tokens) + 1) // 2]]


def test_of_a_continued_row_only_the_continuation_is_learnt():
    row = continued_row([5, 6], [7, 8])
    assert row["input_ids"] == [5, 6, 7, 8]
    assert row["labels"] == [IGNORED_LABEL, IGNORED_LABEL, 7, 8]
