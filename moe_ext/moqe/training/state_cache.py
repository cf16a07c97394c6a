"""What the frozen experts make of the training text, computed once and kept on disk.

What is kept of an expert is what its head reads, D numbers a token, and not its logits, V numbers a token: for the
committed base a sixteenth, for a vocabulary of 50,000 a hundredth. The loss of any mixture follows from it exactly.
An interrupted run goes on behind the last whole batch. Rows for which the allowed space is too small are
computed again each time they are read.

Shape letters: L tokens of a row, D size of a state.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_common.runs.whole_files import read_json, write_json
from moe_ext.moqe.mixture.expert_set import ExpertSet
from moe_ext.moqe.training.rows import Row, collate_rows, fingerprint

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 16


class StateCache:
    """The states of all experts for some rows.

    Args:
        folder: for the files.
        experts: the experts.
        rows: the text.
        max_bytes: most disk space.
    """

    def __init__(self, folder: Path, experts: ExpertSet, rows: Sequence[Row], *, max_bytes: float) -> None:
        self.folder, self.experts, self.rows = folder, experts, rows
        self.dtypes = [_state_dtype(expert) for expert in experts.experts]
        token_bytes = sum(
            expert.state_size * dtype.itemsize for expert, dtype in zip(experts.experts, self.dtypes, strict=True)
        )
        # Rows of one length stand together, so that batches hold little padding.
        by_length = sorted(range(len(rows)), key=lambda row: len(rows[row].tokens))
        self.starts: dict[int, int] = {}
        num_tokens = 0
        for row in by_length:
            if (num_tokens + len(rows[row].tokens)) * token_bytes > max_bytes:
                break
            self.starts[row] = num_tokens
            num_tokens += len(rows[row].tokens)
        self.order, self.num_tokens = list(self.starts), num_tokens
        if len(self.order) < len(rows):
            logger.warning(
                "%d of %d rows do not fit into %.1f GB of cached outputs and are computed anew each time; raise "
                "--cache_gb to make training cheaper",
                len(rows) - len(self.order),
                len(rows),
                max_bytes / 1e9,
            )
        self.files: list[np.ndarray] = []

    def fill(self) -> None:
        """Compute what is not on disk yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.order:
            return
        rows = fingerprint([self.rows[row] for row in self.order])
        self.files = [self._fill_expert(number, rows) for number in range(len(self.experts))]

    def states(self, row: int) -> list[Tensor]:
        """The states [L, D] of every expert for a row."""
        if row not in self.starts:
            return [state[0] for state in self._compute([row])]
        place = slice(self.starts[row], self.starts[row] + len(self.rows[row].tokens))
        return [
            torch.from_numpy(np.array(file[place])).view(dtype)
            for file, dtype in zip(self.files, self.dtypes, strict=True)
        ]

    def _fill_expert(self, number: int, rows: str) -> np.ndarray:
        expert = self.experts.experts[number]
        stem = f"{expert.identity.digest}-{str(self.dtypes[number]).removeprefix('torch.')}-{rows}"
        progress = self.folder / f"{stem}.json"
        done = read_json(progress)["rows"] if progress.exists() else 0
        place, dtype = self.folder / f"{stem}.states", _NUMPY[self.dtypes[number].itemsize]
        row_bytes = expert.state_size * self.dtypes[number].itemsize
        # Written as a file: where the disk is full, that is an error, and a store into mapped memory the end.
        with (
            place.open("r+b" if done else "wb") as kept,
            tqdm(total=len(self.order), initial=done, desc=f"outputs of {expert.name}", unit="row") as bar,
        ):
            while done < len(self.order):
                some = self.order[done : done + ROWS_AT_ONCE]
                for row, states_LD in zip(some, self._compute(some, number)[0], strict=True):
                    length = len(self.rows[row].tokens)
                    held = states_LD[:length].to("cpu", self.dtypes[number]).contiguous()
                    kept.seek(self.starts[row] * row_bytes)
                    kept.write(held.view(_TORCH[held.itemsize]).numpy().data)
                kept.flush()
                done += len(some)
                write_json(progress, {"rows": done})
                bar.update(len(some))
        return np.memmap(place, dtype=dtype, mode="r", shape=(self.num_tokens, expert.state_size))

    def _compute(self, some: Sequence[int], number: int | None = None) -> list[Tensor]:
        batch = collate_rows([self.rows[row] for row in some], self.experts.tokenizer.pad_token_id)
        tokens = batch["input_ids"], batch["attention_mask"]
        if number is None:
            return [state.cpu() for state in self.experts.states(*tokens)]
        return [self.experts.experts[number].states(*tokens)]


# Integers of the same size: numpy has no bfloat16.
_NUMPY = {2: np.int16, 4: np.int32}
_TORCH = {2: torch.int16, 4: torch.int32}


def _state_dtype(expert) -> torch.dtype:
    return torch.float32 if expert.embedding is None else expert.embedding.weight.dtype


def batches_of_states(cache: StateCache, rows: Sequence[int], size: int) -> Iterator[tuple[dict, list[Tensor]]]:
    """Batches of rows, and the states of every expert beside them, padded alike."""
    for start in range(0, len(rows), size):
        yield collate_states(cache, rows[start : start + size])


def collate_states(cache: StateCache, rows: Sequence[int]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One batch: `collate_rows`, and a tensor [B, L, D] for each expert."""
    batch = collate_rows([cache.rows[row] for row in rows], cache.experts.tokenizer.pad_token_id)
    by_expert = zip(*(cache.states(row) for row in rows), strict=True)
    states = [torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True) for pieces in by_expert]
    return batch, states
