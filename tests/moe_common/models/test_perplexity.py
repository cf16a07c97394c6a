"""Perplexity against a plain loop over the tokens, with and without padding, plain and with an adapter."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import committed_tokenizer, tiny_model

from moe_common.models.perplexity import block_losses, measure_blocks, measure_texts
from moe_common.text.packing import IGNORED_LABEL, pack_apart, pack_documents

TOKENIZER = committed_tokenizer()
TEXTS = ["The cat sat on the mat.", "def add(a, b):\n    return a + b\n", "Question: 2 + 2?\nAnswer: 4"]


@pytest.fixture
def model():
    # far from uniform, so that a wrong token costs visibly
    return tiny_model(vocab_size=len(TOKENIZER), initializer_range=0.3)


@torch.no_grad()
def one_token_at_a_time(model, blocks) -> tuple[float, int]:
    """Oracle: ask for each real token alone, given only the real tokens before it in its block."""
    total, count = 0.0, 0
    for row in blocks:
        real = [token for token, attended in zip(row["input_ids"], row["attention_mask"], strict=True) if attended]
        for place in range(1, len(real)):
            logits = model(input_ids=torch.tensor([real[:place]])).logits[0, -1]
            total -= torch.log_softmax(logits.double(), dim=-1)[real[place]].item()
            count += 1
    return total, count


@pytest.mark.parametrize("block_size", [8, 13, 500])  # whole and padded last blocks; one block, mostly padding
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_the_token_loops(model, block_size, batch_size):
    blocks = pack_documents(TEXTS, TOKENIZER, block_size=block_size)
    total, count = one_token_at_a_time(model, blocks)
    found = measure_blocks(model, blocks, batch_size=batch_size)
    assert found.num_tokens == count
    assert found.total_nll == pytest.approx(total, rel=1e-5)  # float32 sums
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_each_block_has_its_own_loss_and_count(model):
    blocks = pack_documents(TEXTS, TOKENIZER, block_size=13)  # the last one is padded
    expected = [one_token_at_a_time(model, [block]) for block in blocks]
    torch.testing.assert_close(
        block_losses(model, blocks, batch_size=2),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-5,  # float32 losses
        atol=0,
    )


def test_one_whole_block_is_the_models_own_loss(model):
    blocks = pack_documents(TEXTS * 3, TOKENIZER, block_size=32).select([0])
    tokens = torch.tensor(blocks["input_ids"][:])
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert measure_blocks(model, blocks).mean_nll == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("block_size", [13, 500])
def test_documents_kept_apart_are_measured_one_by_one(model, block_size):
    blocks = pack_apart(TEXTS, TOKENIZER, block_size=block_size, keep_remainder=True)
    whole = [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in TEXTS]
    if block_size > 400:
        alone = [{"input_ids": text, "attention_mask": [1] * len(text), "labels": text} for text in whole]
        total, count = one_token_at_a_time(model, alone)
        found = measure_blocks(model, blocks)
        assert found.num_tokens == count
        assert found.total_nll == pytest.approx(total, rel=1e-5)  # float32 sums
    else:  # a document that is cut begins anew: fewer tokens are predicted, none twice
        assert measure_blocks(model, blocks).num_tokens < sum(len(text) - 1 for text in whole)


def test_tokens_weigh_the_same_in_a_short_block_and_a_long_one(model):
    long, short = pack_documents(TEXTS, TOKENIZER, block_size=24), pack_documents(["a b"], TOKENIZER, block_size=24)
    both = Dataset.from_list([*long, *short])
    found, of_long, of_short = (measure_blocks(model, blocks, batch_size=2) for blocks in (both, long, short))
    assert found.num_tokens == of_long.num_tokens + of_short.num_tokens
    assert found.total_nll == pytest.approx(of_long.total_nll + of_short.total_nll, rel=1e-6)


def test_what_stands_in_padding_changes_nothing(model):
    blocks = pack_documents(TEXTS, TOKENIZER, block_size=37)
    other = [
        {**row, "input_ids": [t if m else 77 for t, m in zip(row["input_ids"], row["attention_mask"], strict=True)]}
        for row in blocks
    ]
    assert other != list(blocks)
    found = measure_blocks(model, Dataset.from_list(other)).total_nll
    assert found == pytest.approx(measure_blocks(model, blocks).total_nll, rel=1e-6)


def test_an_adapter_counts(model):
    blocks = pack_documents(TEXTS, TOKENIZER, block_size=16)
    plain = measure_blocks(model, blocks).total_nll
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    total, _ = one_token_at_a_time(adapted, blocks)
    found = measure_blocks(adapted, blocks).total_nll
    assert found == pytest.approx(total, rel=1e-5)
    assert abs(found - plain) > 1


def test_it_gives_the_mode_back_and_measures_without_dropout(model):
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    )
    blocks = pack_documents(TEXTS, TOKENIZER, block_size=16)
    adapted.train()
    first, second = (measure_blocks(adapted, blocks).total_nll for _ in range(2))
    assert adapted.training
    assert first == second
    adapted.eval()
    measure_blocks(adapted, blocks)
    assert not adapted.training


def test_texts_are_packed_and_cut_to_the_first_blocks(model):
    blocks = pack_documents(TEXTS, TOKENIZER, block_size=8)
    assert measure_texts(model, TOKENIZER, TEXTS, block_size=8) == measure_blocks(model, blocks)
    first = measure_texts(model, TOKENIZER, TEXTS, block_size=8, max_blocks=2)
    assert first == measure_blocks(model, blocks.select(range(2)))
    assert first.num_tokens == 14


def test_nothing_to_predict_is_refused(model):
    blocks = Dataset.from_list([{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, IGNORED_LABEL]}])
    with pytest.raises(ValueError, match=r"\b1 blocks"):
        measure_blocks(model, blocks)
