"""Blocks of a source: the first of its documents, in its own order or a seed's; too little text is refused."""

import pytest

from moe_common.models.base_model import load_base_model
from moe_common.text.documents import load_documents
from moe_common.text.packing import pack_documents
from moe_common.text.reading import enough_texts, read_blocks, reading_order


@pytest.fixture(scope="module")
def tokenizer():
    return load_base_model()[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("rain") / "train.txt"
    file.write_text("\n\n".join(f"rain on hill {i} runs to the sea and comes back" for i in range(60)))
    return str(file.parent)


def test_blocks_are_the_first_of_all_documents_packed(source, tokenizer):
    packed = pack_documents(load_documents(source, "train")["text"], tokenizer, block_size=16, keep_remainder=False)
    assert read_blocks(source, "train", tokenizer, block_size=16)[:] == packed[:]
    assert read_blocks(source, "train", tokenizer, block_size=16, max_blocks=7)[:] == packed[:7]


def test_a_seed_orders_the_documents_whatever_the_number_of_blocks(source, tokenizer):
    few, many, other = (
        read_blocks(source, "train", tokenizer, block_size=16, max_blocks=count, seed=seed)["input_ids"][:]
        for count, seed in ((4, 1), (20, 1), (4, 2))
    )
    assert few == many[:4] and few != other
    assert few != read_blocks(source, "train", tokenizer, block_size=16, max_blocks=4)["input_ids"][:]
    assert sorted(reading_order(60, 1)) == list(range(60))


def test_a_source_with_fewer_blocks_than_are_needed_is_refused(source, tokenizer):
    with pytest.raises(ValueError, match=r"has 0 blocks of 5000 tokens in its split 'train', but 1 are needed"):
        read_blocks(source, "train", tokenizer, block_size=5000)
    with pytest.raises(ValueError, match=r"has \d+ blocks of 16 tokens .* but 900 are needed"):
        read_blocks(source, "train", tokenizer, block_size=16, at_least=900)


def test_no_more_texts_are_read_than_surely_hold_the_tokens():
    texts = iter(["x" * 30] * 10)
    assert len(enough_texts(texts, 10)) == 3 and len(list(texts)) == 7
    assert len(enough_texts(["x"] * 4, None)) == 4
