"""Rows to tensors, and the order in which a run reads its rows.

Two kinds of rows cannot stand in one batch: those without an attention mask, whose documents are kept apart by their
positions (`packing.pack_apart`), and those that have one and are padded. `TurnTakingSampler` gives each batch one
kind.

Shape letters: B rows, L tokens of the longest row.
"""

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from moe_common.text.packing import IGNORED_LABEL


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor | bool]:
    """One batch of rows of the same kind.

    Args:
        rows: `input_ids`, `labels` where they are wanted, and `position_ids` (all of one length) or `attention_mask`.

    Returns:
        The same columns as int64 tensors [B, L]; shorter rows are padded on the right, with a mask of 0 and labels of
        -100. The padding token is 0, which any vocabulary has and no model is shown. Rows of documents that are kept
        apart also say `use_cache=False`: with a cache transformers does not look where positions start again.
    """
    apart = rows[0].get("position_ids") is not None
    assert all((row.get("position_ids") is not None) == apart for row in rows), "two kinds of rows in one batch"
    padding = {"input_ids": 0, "labels": IGNORED_LABEL, "position_ids" if apart else "attention_mask": 0}
    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Tensor | bool] = {
        name: torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])
        for name, value in padding.items()
        if name in rows[0]
    }
    if apart:
        batch["use_cache"] = False
    return batch


def batches_of(rows: Dataset, size: int, device: torch.device) -> Iterator[dict[str, Tensor | bool]]:
    """The rows in order, so many at once, on a device."""
    for start in range(0, len(rows), size):
        batch = collate(list(rows.select(range(start, min(start + size, len(rows))))))
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class TurnTakingSampler(Sampler[int]):
    """Shuffled rows, anew for each epoch, where every batch holds one kind and, if asked, datasets take turns.

    Args:
        kinds: the kind of each row; rows of two kinds are never in one batch.
        sources: the dataset of each row.
        batch_size: rows of one step over all processes and accumulated batches, so that no split of it mixes kinds.
        interleaved: rows of the datasets alternate, so that each has the same share; a dataset that is through begins
            again until the longest is. Otherwise each row comes once.
        seed: of the order.

    A batch at the end of its kind is filled up with rows from that kind's beginning where there are two kinds.
    """

    def __init__(
        self, kinds: Sequence[int], sources: Sequence[int], *, batch_size: int, interleaved: bool, seed: int
    ) -> None:
        self.groups: dict[int, dict[int, list[int]]] = {}
        for row, (kind, source) in enumerate(zip(kinds, sources, strict=True)):
            self.groups.setdefault(kind, {}).setdefault(source, []).append(row)
        self.batch_size = batch_size
        self.interleaved = interleaved
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self._padded(self._num_rows(group)) for group in self.groups.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        batches = []
        for group in self.groups.values():
            order = self._order(group, generator)
            order += order[: self._padded(len(order)) - len(order)]
            batches += [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if len(self.groups) > 1:
            batches = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([row for batch in batches for row in batch])

    def _order(self, group: dict[int, list[int]], generator: torch.Generator) -> list[int]:
        if not self.interleaved:
            rows = [row for source in group.values() for row in source]
            return [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
        turns = max(map(len, group.values()))
        columns = []
        for rows in group.values():
            column: list[int] = []
            while len(column) < turns:
                column += [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
            columns.append(column[:turns])
        return [row for turn in zip(*columns, strict=True) for row in turn]

    def _num_rows(self, group: dict[int, list[int]]) -> int:
        lengths = [len(rows) for rows in group.values()]
        return max(lengths) * len(lengths) if self.interleaved else sum(lengths)

    def _padded(self, num_rows: int) -> int:
        """Rows of whole batches, where batches must be whole because another kind follows them."""
        if len(self.groups) == 1:
            return num_rows
        return -(-num_rows // self.batch_size) * self.batch_size if num_rows >= self.batch_size else self.batch_size
