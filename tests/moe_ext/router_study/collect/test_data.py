"""Text of a study: what cannot be had is an error, and nothing stands in for it."""

import json

import pytest
import torch
from datasets import Dataset

from moe_ext.router_study.collect.data import HUB_TEXTS, DatasetLoader, parse_sources


def loader(tokenizer, **changed):
    return DatasetLoader(tokenizer, **{"split": "all", "max_tokens": 64, "row_tokens": 16, **changed})


def test_rows_hold_the_documents_and_an_end_of_text_token_after_each(tokenizer, tmp_path):
    file = tmp_path / "notes.jsonl"
    texts = [f"document number {number} says something" for number in range(20)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    rows = loader(tokenizer).rows({"notes": str(file)})["notes"]
    assert rows.ids_NS.shape == (4, 16)
    assert rows.num_tokens == 64
    stream = rows.ids_NS.flatten().tolist()
    first = stream[: stream.index(tokenizer.eos_token_id)]
    assert tokenizer.decode(first) in texts


def test_the_seed_decides_the_order_of_documents(tokenizer, sources):
    letters = parse_sources(sources)["letters"]
    rows = [loader(tokenizer, seed=seed).rows({"letters": letters})["letters"].ids_NS for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_the_built_in_domains_are_read_by_name(tokenizer):
    held = DatasetLoader(tokenizer)
    assert "Question:" in next(held.load_math_qa_data())
    assert len(next(held.load_code_data())) > 100
    assert len(next(held.load_prose_data())) > 20


def test_a_known_hub_dataset_is_streamed_and_its_columns_joined(tokenizer, monkeypatch):
    asked = []

    def stream(name, subset, *, split, streaming):
        asked.append((name, subset, split, streaming))
        return iter(Dataset.from_dict({"question": ["1 + 1?"], "answer": ["2"]}))

    monkeypatch.setattr("moe_ext.router_study.collect.data.load_dataset", stream)
    assert list(DatasetLoader(tokenizer).load_math_qa_data("gsm8k")) == ["1 + 1?\n2"]
    assert asked == [("openai/gsm8k", "main", "test", True)]


@pytest.mark.parametrize("source", sorted(HUB_TEXTS))
def test_a_hub_dataset_that_cannot_be_had_is_an_error_and_nothing_stands_in(tokenizer, source, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network here.")

    monkeypatch.setattr("moe_ext.router_study.collect.data.load_dataset", refuse)
    with pytest.raises(ValueError, match=rf"{HUB_TEXTS[source].name}' \({source}\).*no network here"):
        next(DatasetLoader(tokenizer).load(source))


def test_a_text_that_is_too_short_names_both_counts(tokenizer, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("three words only")
    with pytest.raises(ValueError, match=r"notes \(.*short\.txt\).*\d.*\b64\b"):
        loader(tokenizer).rows({"notes": str(file)})


def test_domains_are_named_or_named_as_their_source():
    assert parse_sources("prose, code=humaneval,notes=a/b.txt") == {
        "prose": "prose",
        "code": "humaneval",
        "notes": "a/b.txt",
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is no list of domains"),
        ("prose,,code", "is no list of domains"),
        ("prose=", "is no list of domains"),
        ("a=prose,a=code", r"domain a\b.*twice"),
    ],
)
def test_a_malformed_list_of_domains_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"row_tokens": 1}, r"row_tokens.*\b1\b.*\b2\b"),
        ({"max_tokens": 8}, r"max_tokens.*\b8\b.*\b16\b"),
    ],
)
def test_impossible_sizes_are_refused(tokenizer, changed, message):
    with pytest.raises(ValueError, match=message):
        loader(tokenizer, **changed)
