import json

import pytest
from transformers import AutoTokenizer

from moe_ext.moqe.experts.tokenizer_contract import check_tokenizers


def changed(tokenizer, folder, change):
    """The tokenizer after an edit of its tokenizer.json."""
    tokenizer.save_pretrained(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    change(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return AutoTokenizer.from_pretrained(folder)


def test_a_tokenizer_agrees_with_itself(tokenizer, tiny_base):
    check_tokenizers(("a", tokenizer), ("b", AutoTokenizer.from_pretrained(tiny_base)))


def test_two_tokens_that_changed_places_are_named(tokenizer, tmp_path):
    words = {place: token for token, place in tokenizer.get_vocab().items()}

    def swap(whole):
        vocab = whole["model"]["vocab"]
        vocab[words[50]], vocab[words[51]] = 51, 50

    other = changed(tokenizer, tmp_path, swap)
    with pytest.raises(ValueError, match=rf"token 50\b.*{words[50]!r}"):
        check_tokenizers(("first", tokenizer), ("second", other))


def test_a_token_more_is_named(tokenizer, tiny_base):
    other = AutoTokenizer.from_pretrained(tiny_base)
    other.add_tokens(["<one more>"])
    with pytest.raises(ValueError, match=r"'<one more>'.*second\b.*first\b"):
        check_tokenizers(("first", tokenizer), ("second", other))


def test_another_end_of_text_is_named(tokenizer, tiny_base):
    other = AutoTokenizer.from_pretrained(tiny_base)
    other.eos_token = other.convert_ids_to_tokens(60)
    with pytest.raises(ValueError, match="eos_token"):
        check_tokenizers(("first", tokenizer), ("second", other))


def test_another_way_to_cut_text_is_named_although_the_tokens_are_the_same(tokenizer, tmp_path):
    def merge_across_words(whole):
        whole["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False

    other = changed(tokenizer, tmp_path, merge_across_words)
    with pytest.raises(ValueError, match=r"token \d+ of '.*' is '.*' in the first and '.*' in the second"):
        check_tokenizers(("first", tokenizer), ("second", other))


def test_another_padding_token_is_no_difference(tokenizer, tiny_base):
    other = AutoTokenizer.from_pretrained(tiny_base)
    other.pad_token = other.eos_token
    check_tokenizers(("first", tokenizer), ("second", other))
