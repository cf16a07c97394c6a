"""Packing keeps every token and masks nothing but padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import committed_tokenizer, tiny_model

from moe_common.text.batches import collate
from moe_common.text.packing import IGNORED_LABEL, keeps_documents_apart, pack_apart, pack_documents, token_stream

TOKENIZER = committed_tokenizer()


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


def test_a_stream_stops_reading_where_there_are_tokens_enough():
    texts = [f"document {n}" for n in range(1000)]
    unread = iter(texts)
    stream = token_stream(unread, TOKENIZER, enough=600)
    assert len(stream) >= 600 and 0 < len(list(unread)) < 1000
    np.testing.assert_array_equal(stream, token_stream(texts, TOKENIZER)[: len(stream)])


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    tokenizer = committed_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end-of-text token to separate documents with"):
        pack_documents(["a"], tokenizer, block_size=8)


def test_a_block_of_one_token_is_refused():
    with pytest.raises(ValueError, match=r"block_size.*\b1\b.*\b2\b"):
        pack_documents(["a"], TOKENIZER, block_size=1)


# -- documents kept apart ------------------------------------------------------------------------------------------


def decided_llama(**changed):
    return tiny_model(vocab_size=len(TOKENIZER), initializer_range=0.3, **changed)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_a_packed_row_each_document_is_read_as_if_it_stood_alone(attention):
    model = decided_llama(attn_implementation=attention)
    texts = ["one two three", "def f(x):", "the sea, the sea", "4"]
    row = pack_apart(texts, TOKENIZER, block_size=999, keep_remainder=True).with_format("torch")[0]
    with torch.no_grad():
        batch = collate([{name: values.tolist() for name, values in row.items()}])
        del batch["labels"]
        together = model(**batch).logits[0]
        start = 0
        for text in texts:
            alone = torch.tensor([[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]])
            end = start + alone.shape[1]
            # float32: the masked sums run in another order
            torch.testing.assert_close(together[start:end], model(input_ids=alone).logits[0], rtol=1e-4, atol=1e-4)
            assert row["labels"][start:end].tolist() == [IGNORED_LABEL, *alone[0, 1:].tolist()]
            start = end


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="ascii"), max_size=30), min_size=1, max_size=8),
    block_size=st.integers(2, 24),
)
def test_positions_count_from_the_start_of_the_document_or_of_the_row(texts, block_size):
    blocks = pack_apart(texts, TOKENIZER, block_size=block_size)
    plain = pack_documents(texts, TOKENIZER, block_size=block_size, keep_remainder=False)
    assert blocks["input_ids"][:] == plain["input_ids"][:]
    for row in blocks:
        expected, place = [], 0
        for token in row["input_ids"]:
            expected.append(place)
            place = 0 if token == TOKENIZER.eos_token_id else place + 1
        assert row["position_ids"] == expected
        labels = [
            IGNORED_LABEL if place == 0 else token for place, token in zip(expected, row["input_ids"], strict=True)
        ]
        assert row["labels"] == labels


def test_a_model_that_keeps_documents_apart_is_known_by_trying():
    assert keeps_documents_apart(decided_llama())
    assert keeps_documents_apart(tiny_model("gpt2"))


def test_a_model_that_does_not_is_known_too():
    assert not keeps_documents_apart(tiny_model("MambaConfig"))
    assert not keeps_documents_apart(tiny_model("FalconConfig"))


def test_trying_leaves_the_mode_as_it_was():
    model = decided_llama()
    for training in (True, False):
        model.train(training)
        keeps_documents_apart(model)
        assert model.training is training
