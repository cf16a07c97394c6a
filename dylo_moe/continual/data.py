"""The text of a skill for a continual run: blocks to train on at each visit, to calibrate with, and to measure on."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from datasets import Dataset

from moe_common.text.reading import read_blocks

HeldOut = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True)
class SkillText:
    """Blocks of one skill.

    Args:
        visits: training blocks of each visit; a later one reads on where the earlier stopped, and begins anew when the
            text is used up.
        calibration: held-out blocks (validation documents) that the novelty threshold is measured on.
        measured: held-out blocks that perplexity is measured on.
    """

    visits: list[Dataset]
    calibration: Dataset
    measured: Dataset


def read_skill(
    name: str,
    tokenizer,
    *,
    num_visits: int,
    blocks_a_visit: int,
    calibration_blocks: int,
    measured_blocks: int,
    block_size: int,
    measured_split: HeldOut = "test",
    seed: int = 0,
) -> SkillText:
    """Read the blocks of a skill.

    Args:
        name: a built-in domain, a file, a folder or a hub dataset; see `load_documents`.
        tokenizer: of the base model.
        num_visits: how often the skill comes.
        blocks_a_visit: training blocks of each visit.
        calibration_blocks, measured_blocks: held-out blocks.
        block_size: tokens in a block.
        measured_split: documents that the measured blocks are of.
        seed: of the order of the documents.

    Raises:
        ValueError: unknown or empty data, or not enough of it to calibrate, to measure or to train.
    """

    read = partial(read_blocks, name, tokenizer=tokenizer, block_size=block_size, seed=seed)
    train = read("train", max_blocks=num_visits * blocks_a_visit)
    visits = [
        train.select([i % len(train) for i in range(visit * blocks_a_visit, (visit + 1) * blocks_a_visit)])
        for visit in range(num_visits)
    ]
    calibration = read("validation", max_blocks=4 * calibration_blocks, at_least=calibration_blocks)
    return SkillText(
        visits=visits,
        calibration=spread(calibration, calibration_blocks),
        measured=read(measured_split, max_blocks=measured_blocks),
    )


def spread(blocks: Dataset, count: int) -> Dataset:
    """So many blocks, evenly spread over all: neighbours are often of one document."""
    count = min(count, len(blocks))
    return blocks.select([i * len(blocks) // count for i in range(count)])
