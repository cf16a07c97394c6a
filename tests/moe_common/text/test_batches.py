"""Batches hold one kind of row, padded only where a mask says so, in an order that the seed and the epoch decide."""

from collections import Counter

import pytest
import torch

from moe_common.text.batches import TurnTakingSampler, collate
from moe_common.text.packing import IGNORED_LABEL


def padded_row(length):
    return {"input_ids": [7] * length, "attention_mask": [1] * length, "labels": [7] * length, "position_ids": None}


def apart_row():
    return {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0], "labels": [IGNORED_LABEL, 2, IGNORED_LABEL]}


def test_shorter_rows_are_padded_on_the_right_and_neither_seen_nor_learnt():
    batch = collate([padded_row(2), padded_row(4)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[7, 7, IGNORED_LABEL, IGNORED_LABEL], [7, 7, 7, 7]]
    assert batch["input_ids"].dtype == torch.int64


def test_rows_whose_documents_are_apart_have_positions_and_no_mask():
    batch = collate([apart_row(), apart_row()])
    assert set(batch) == {"input_ids", "position_ids", "labels", "use_cache"}
    assert batch["use_cache"] is False
    assert batch["position_ids"].tolist() == [[0, 1, 0]] * 2


def test_two_kinds_in_one_batch_are_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="two kinds of rows"):
        collate([apart_row(), padded_row(3)])


def sampler(kinds, sources, **changed):
    return TurnTakingSampler(kinds, sources, **{"batch_size": 4, "interleaved": False, "seed": 0, **changed})


def batches(order, size=4):
    order = list(order)
    return [order[start : start + size] for start in range(0, len(order), size)]


KINDS = [0] * 13 + [1] * 6


@pytest.mark.parametrize("interleaved", [True, False])
def test_every_batch_holds_one_kind_and_no_row_is_lost(interleaved):
    order = sampler(KINDS, [0] * 8 + [1] * 5 + [2] * 6, interleaved=interleaved)
    found = batches(order)
    assert all(len({KINDS[row] for row in batch}) == 1 for batch in found)
    assert all(len(batch) == 4 for batch in found)
    assert {row for batch in found for row in batch} == set(range(19))
    assert len(order) == sum(map(len, found))
    assert [KINDS[batch[0]] for batch in found] != sorted(KINDS[batch[0]] for batch in found)


def test_datasets_that_take_turns_have_the_same_share_of_every_batch():
    sources = [0] * 10 + [1] * 3
    found = batches(sampler([0] * 13, sources, interleaved=True))
    assert all(Counter(sources[row] for row in batch) == {0: len(batch) / 2, 1: len(batch) / 2} for batch in found)
    seen = Counter(row for batch in found for row in batch)
    assert all(seen[row] == 1 for row in range(10))
    assert sorted(seen[row] for row in range(10, 13)) == [3, 3, 4]
    assert len(sampler([0] * 13, sources, interleaved=True)) == 20


def test_without_turns_a_single_kind_is_a_plain_shuffle():
    order = list(sampler([0] * 30, [0] * 20 + [1] * 10))
    assert sorted(order) == list(range(30)) != order


def test_the_order_is_that_of_the_seed_and_changes_with_the_epoch():
    def order(seed, epoch):
        made = sampler(KINDS, KINDS, seed=seed)
        made.set_epoch(epoch)
        return list(made)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
