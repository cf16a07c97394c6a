"""Packing keeps every token and masks nothing but padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dylo_moe.base_model import COMMITTED_FOLDER
from dylo_moe.packing import IGNORED_LABEL, pack_documents, token_stream

TOKENIZER = AutoTokenizer.from_pretrained(COMMITTED_FOLDER)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=8),
    block_size=st.integers(2, 40),
)
def test_the_blocks_hold_every_token_in_order_and_labels_are_the_tokens(texts, block_size):
    expected = [token for text in texts for token in [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]]
    blocks = pack_documents(texts, TOKENIZER, block_size=block_size).with_format("numpy")[:]
    real = blocks["attention_mask"] == 1
    assert blocks["input_ids"][real].tolist() == expected
    np.testing.assert_array_equal(blocks["labels"], np.where(real, blocks["input_ids"], IGNORED_LABEL))
    assert (blocks["input_ids"][~real] == TOKENIZER.pad_token_id).all()
    assert blocks["input_ids"].shape == (-(-len(expected) // block_size), block_size)


def test_only_the_end_of_the_last_block_is_padding():
    mask = pack_documents(["hello there " * 30], TOKENIZER, block_size=16).with_format("numpy")["attention_mask"][:]
    assert (np.diff(mask.flatten()) <= 0).all()
    assert mask[:-1].all()


def test_without_the_remainder_only_whole_blocks_stay():
    texts = ["hello there " * 30, "one more"]
    kept = pack_documents(texts, TOKENIZER, block_size=16, keep_remainder=False).with_format("numpy")
    stream = token_stream(texts, TOKENIZER)
    assert len(stream) % 16 != 0
    np.testing.assert_array_equal(kept["input_ids"][:].flatten(), stream[: len(stream) // 16 * 16])
    assert kept["attention_mask"][:].all()


def test_an_end_of_text_token_stands_after_each_document_and_nowhere_else():
    stream = token_stream(["one", "two three", "four"], TOKENIZER)
    assert (stream == TOKENIZER.eos_token_id).sum() == 3
    assert TOKENIZER.decode(stream).split(TOKENIZER.eos_token) == ["one", "two three", "four", ""]


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(COMMITTED_FOLDER)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token to separate documents with"):
        pack_documents(["a"], tokenizer, block_size=8)


def test_a_block_of_one_token_is_refused():
    with pytest.raises(ValueError, match="block_size is 1, but at least 2 tokens"):
        pack_documents(["a"], TOKENIZER, block_size=1)
