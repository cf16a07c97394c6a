"""The one door to text: files, folders and hub names, what they give and what they refuse."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from moe_common.runs.downloads import DownloadError
from moe_common.text import documents as data
from moe_common.text.documents import SPLITS, load_documents, main

LINES = [{"text": f"document number {n}"} for n in range(400)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "own.jsonl", LINES)


def test_a_built_in_domain_comes_with_text_and_where_it_has_them_prompt_and_response():
    assert load_documents("code", "validation").column_names == ["key", "text"]
    assert load_documents("math", "validation").column_names == ["key", "text", "prompt", "response"]


def test_all_is_the_splits_together():
    sizes = [len(load_documents("math", split)) for split in (*SPLITS, "all")]
    assert sum(sizes[:-1]) == sizes[-1]


def test_the_splits_of_a_file_are_disjoint_complete_and_about_5_percent(jsonl):
    train, validation, test = (load_documents(jsonl, split)["text"] for split in ("train", "validation", "test"))
    assert sorted([*train, *validation, *test]) == sorted(row["text"] for row in LINES)
    assert 5 <= len(validation) <= 40
    assert 5 <= len(test) <= 40


def test_the_split_of_a_document_depends_on_its_text_alone(jsonl, tmp_path):
    turned = write_jsonl(tmp_path / "turned.jsonl", [*reversed(LINES), *LINES[:50]])
    assert set(load_documents(turned, "test")["text"]) == set(load_documents(jsonl, "test")["text"])


def test_parquet_and_jsonl_give_the_same(jsonl, tmp_path):
    pq.write_table(pa.Table.from_pylist(LINES), tmp_path / "own.parquet")
    assert load_documents(tmp_path / "own.parquet", "all")["text"] == load_documents(jsonl, "all")["text"]


def test_a_text_file_by_itself_is_a_document_for_each_paragraph(tmp_path):
    (tmp_path / "book.txt").write_text("one\nstill one\n\n\ntwo\n \nthree\n", encoding="utf-8")
    assert load_documents(tmp_path / "book.txt", "all")["text"] == ["one\nstill one", "two", "three"]


def test_a_folder_of_text_files_is_a_document_for_each_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one\n\nstill one")
    (tmp_path / "deep" / "b.md").write_text("two")
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert load_documents(tmp_path, "all")["text"] == ["one\n\nstill one", "two"]


def test_files_named_for_splits_are_those_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "validation-0001.jsonl", [{"text": "b"}])
    write_jsonl(tmp_path / "other.jsonl", [{"text": "c"}])
    assert load_documents(tmp_path, "train")["text"] == ["a"]
    assert load_documents(tmp_path, "validation")["text"] == ["b"]
    assert load_documents(tmp_path, "all")["text"] == ["a", "b"]
    with pytest.raises(ValueError, match="'test'"):
        load_documents(tmp_path, "test")


@pytest.mark.parametrize(
    ("row", "text", "kept"),
    [
        ({"prompt": "2+2?", "response": "4"}, "2+2?\n4", {"prompt": "2+2?", "response": "4"}),
        ({"prompt": "2+2? ", "completion": "4"}, "2+2? 4", {"prompt": "2+2? ", "response": "4"}),
        ({"question": "q", "answer": " a"}, "q a", {"prompt": "q", "response": " a"}),
        ({"instruction": "q", "output": "a", "text": "whole"}, "whole", {"prompt": "q", "response": "a"}),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            "hi\nho",
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        ),
    ],
)
def test_prompts_and_messages_give_text_and_stay_beside_it(row, text, kept, tmp_path):
    (document,) = load_documents(write_jsonl(tmp_path / "own.jsonl", [row]), "all")
    assert document == {"text": text, **kept}


def test_the_text_column_that_is_named_wins(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "not this", "body": "this"}])
    assert load_documents(path, "all", text_column="body")["text"] == ["this"]


def test_a_column_that_only_some_rows_have_is_left_out(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "a", "response": "b"}, {"text": "c"}])
    assert load_documents(path, "all").column_names == ["text"]


# What is refused, and that the message says what was given and what to do.


def test_an_unknown_name_gives_the_closest_one():
    with pytest.raises(ValueError, match="'prsoe'.*'prose'.*prose, code, math"):
        load_documents("prsoe")


def test_an_unknown_split_names_those_there_are():
    with pytest.raises(ValueError, match="split.*'valid'.*pretraining, train, validation, test,"):
        load_documents("prose", "valid")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/nowhere/at/all", "data/missing.parquet"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"no file or folder {name}"):
        load_documents(name)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "own.jsonl").touch()
    with pytest.raises(ValueError, match=r"own\.jsonl.*empty"):
        load_documents(tmp_path / "own.jsonl")


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.jsonl, \.parquet, \.txt"):
        load_documents(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "own.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"own\.csv.*\.jsonl"):
        load_documents(tmp_path / "own.csv")


def test_a_line_that_is_not_json_is_named_by_its_number(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"own\.jsonl, line 3\b.*JSON.*column 10\b"):
        load_documents(tmp_path / "own.jsonl")


def test_a_line_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"line 2\b.*JSON list"):
        load_documents(tmp_path / "own.jsonl")


def test_a_missing_column_names_those_that_are_there(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"body": "x", "title": "y"}])
    with pytest.raises(ValueError, match=r"line 1\b.*'text'.*body, title.*text_column"):
        load_documents(path)
    with pytest.raises(ValueError, match=r"line 1\b.*'boddy'.*body, title"):
        load_documents(path, text_column="boddy")


def test_a_text_column_that_is_named_is_not_made_up_from_others(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "a", "body": None}])
    with pytest.raises(ValueError, match=r"line 1\b.*'body'"):
        load_documents(path, text_column="body")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "own.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"own\.txt.*UTF-8.*byte 3\b"):
        load_documents(tmp_path / "own.txt")


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "own.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"own\.parquet.*Parquet"):
        load_documents(tmp_path / "own.parquet")


def test_too_few_documents_for_a_split_say_so(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", LINES[:1])
    with pytest.raises(ValueError, match="'test'.*split='all'"):
        load_documents(path, "test")


# Hub datasets, with the hub stood in for.


def test_the_splits_of_a_hub_dataset_count_and_a_subset_is_passed_on(monkeypatch):
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return Dataset.from_list([{"text": split}])

    monkeypatch.setattr(data, "get_dataset_split_names", lambda *_: ["train", "validation", "test"])
    monkeypatch.setattr(data, "load_dataset", load)
    assert load_documents("owner/name:main", "validation")["text"] == ["validation"]
    assert asked == [("owner/name", "main", "validation")]


def test_a_hub_dataset_with_training_data_only_is_split_like_a_file(monkeypatch, jsonl):
    monkeypatch.setattr(data, "get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr(data, "load_dataset", lambda *_, split: Dataset.from_list(LINES))
    for split in ("train", "validation", "test"):
        assert list(load_documents("owner/name", split)["text"]) == list(load_documents(jsonl, split)["text"])


def test_a_split_the_hub_dataset_lacks_is_cut_out_of_its_training_part(monkeypatch, jsonl):
    held_out = [{"text": f"another document {n}"} for n in range(5)]
    monkeypatch.setattr(data, "get_dataset_split_names", lambda *_: ["train", "test"])
    monkeypatch.setattr(
        data, "load_dataset", lambda *_, split: Dataset.from_list(LINES if split == "train" else held_out)
    )
    train, validation, test = (set(load_documents("owner/name", s)["text"]) for s in ("train", "validation", "test"))
    assert validation == set(load_documents(jsonl, "validation")["text"])
    assert train | validation == {row["text"] for row in LINES}
    assert not train & validation
    assert test == {row["text"] for row in held_out}


def test_a_hub_dataset_that_cannot_be_had_is_one_clear_line(monkeypatch):
    def refuse(*_):
        raise DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub.\nmore")

    monkeypatch.setattr(data, "get_dataset_split_names", refuse)
    with pytest.raises(ValueError, match=r"'owner/name'.*Dataset .* Hub\b") as caught:
        load_documents("owner/name")
    assert "\n" not in str(caught.value)


# The command that make's set-up step calls.


def test_the_fetch_command_says_where_the_text_lies(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path)
    assert main([]) == 0
    assert f"prose, code, math is ready; what was fetched lies in {tmp_path}" in capsys.readouterr().out


def test_the_fetch_command_fails_with_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise DownloadError("carrier==1.0 could not be downloaded")

    monkeypatch.setitem(data.DOMAINS, "prose", refuse)
    assert main([]) == 1
    assert capsys.readouterr().err.strip().endswith("carrier==1.0 could not be downloaded")
