import json

import pyarrow as pa
import torch
from pyarrow.parquet import write_table

from moe_ext.moqe.training.documents import read_documents
from moe_ext.moqe.training.rows import collate_rows, to_rows


def test_parquet_jsonl_and_text_are_read_and_what_cannot_be_is_counted(tmp_path):
    write_table(pa.table({"text": ["one", None, "", "two"]}), tmp_path / "a.parquet")
    lines = ['{"text": "three"}', "not json", '{"other": 1}', '{"text": 7}', "[1]", '{"text": "four"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.txt").write_text("five")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    read = read_documents(str(tmp_path), "all")
    assert read.texts == {str(tmp_path): ["one", "two", "three", "four", "five"]}
    assert read.unreadable == 2 + 4 + 1


def test_files_named_for_splits_are_those_splits(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}-0.jsonl").write_text(json.dumps({"text": split}))
    assert read_documents(str(tmp_path), "validation").texts == {str(tmp_path): ["validation"]}


def test_without_such_names_every_document_is_in_one_split(tmp_path):
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(200)))
    parts = [read_documents(str(tmp_path), split).texts[str(tmp_path)] for split in ("train", "validation", "test")]
    assert sorted(sum(parts, [])) == sorted(f"text {n}" for n in range(200))


def test_another_column_can_be_named(tmp_path):
    write_table(pa.table({"body": ["one"]}), tmp_path / "a.parquet")
    assert read_documents(str(tmp_path), "all", text_column="body").texts == {str(tmp_path): ["one"]}


def test_rows_hold_every_token_of_a_document_once_and_all_of_its_bytes(tokenizer):
    text = "Ein Bär läuft durch den Wald. 東京 and more words \U0001f600 to the end." * 3
    rows = to_rows([text, "short"], "own", tokenizer, row_length=11)
    whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    own = [row for row in rows if row.document == 0]
    assert sum((row.tokens[1:] for row in own), []) == whole
    assert all(row.tokens[0] == tokenizer.eos_token_id and len(row.tokens) <= 11 for row in own)
    assert sum(row.num_bytes for row in own) == len(text.encode())
    assert [row.num_bytes for row in rows if row.document == 1] == [len("short")]


def test_labels_are_the_tokens_behind_and_padding_has_none(tokenizer):
    rows = to_rows(["one two three", "one"], "own", tokenizer, row_length=20)
    batch = collate_rows(rows, pad=1)
    for row, held in enumerate(rows):
        ids, mask, labels = (batch[name][row] for name in ("input_ids", "attention_mask", "labels"))
        real = len(held.tokens)
        assert ids[:real].tolist() == held.tokens
        assert mask.sum() == real
        assert torch.equal(labels[: real - 1], ids[1:real])
        assert (labels[real - 1 :] == -100).all()


def test_a_long_document_can_be_cut(tokenizer):
    assert len(to_rows(["word " * 100], "own", tokenizer, row_length=10, rows_per_document=2)) == 2


def test_reading_stops_where_there_are_tokens_enough(tokenizer):
    rows = to_rows(["some words"] * 100, "own", tokenizer, row_length=10, max_tokens=12)
    assert 12 <= sum(len(row.tokens) - 1 for row in rows) < 24
