"""Is this text one of the skills we know? Cosine similarity to each, against a threshold measured for each.

A threshold is not guessed: batches of a skill's own held-out text are compared with the skill, and what lies clearly
below the worst of them is something else:

    threshold = q - margin * (1 - q),    q = a low quantile of the held-out batches' similarities

With a margin of one, a text must fall as far below the quantile as that lies below the similarity of identical texts.

Shape letters: N blocks, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dylo_moe.skills import SkillLibrary

BLOCKS_IN_A_BATCH = 8
FEWEST_BATCHES = 4  # held-out batches of a skill; a quantile of fewer says nothing


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the detector says of a text.

    Args:
        is_novel: it is none of the skills that are known.
        nearest: the most similar skill; None where none is known.
        similarity: to that skill, the mean over the text's batches.
        threshold: of that skill.
        similarities: to every skill, the most similar first.
    """

    is_novel: bool
    nearest: str | None
    similarity: float | None
    threshold: float | None
    similarities: dict[str, float]


class NoveltyDetector:
    """Compares texts with the skills of a library.

    Args:
        library: the skills; their thresholds are kept there, and so are saved with them.
        quantile: which quantile of the held-out similarities counts as the worst.
        margin: how far below it a text must fall to be novel, in units of that quantile's distance from one.
    """

    def __init__(self, library: SkillLibrary, *, quantile: float = 0.05, margin: float = 1.0) -> None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is {quantile}, but must lie in [0, 1].")
        if margin < 0:
            raise ValueError(f"margin is {margin}, but must not be negative.")
        self.library = library
        self.quantile = quantile
        self.margin = margin

    def calibrate(self, name: str, held_out_NH: Tensor) -> float:
        """Measure a skill's threshold.

        Args:
            name: a skill of the library.
            held_out_NH: embeddings of blocks of its text that its own embedding was not made of.

        Returns:
            The threshold, which is also noted in the library.

        Raises:
            ValueError: no such skill, or too few blocks.
        """
        skill = self.library[name]
        needed = FEWEST_BATCHES * BLOCKS_IN_A_BATCH
        if len(held_out_NH) < needed:
            raise ValueError(
                f"The skill '{name}' has {len(held_out_NH)} held-out blocks, but calibration needs {needed} "
                f"({FEWEST_BATCHES} batches of {BLOCKS_IN_A_BATCH}). Give more text, or shorter blocks."
            )
        measured = [self.library.similarity(name, batch_H) for batch_H in batch_means(held_out_NH)]
        low = torch.quantile(torch.tensor(measured, dtype=torch.float64), self.quantile).item()
        skill.threshold = low - self.margin * (1 - low)
        return skill.threshold

    def judge(self, blocks_NH: Tensor) -> Verdict:
        """Say whether a text is one of the skills.

        Args:
            blocks_NH: embeddings of some blocks of it, at least one batch.

        Raises:
            ValueError: too few blocks, or a skill that was never calibrated.
        """
        if len(blocks_NH) < BLOCKS_IN_A_BATCH:
            raise ValueError(
                f"{len(blocks_NH)} blocks are too few to judge a text by; give at least {BLOCKS_IN_A_BATCH}."
            )
        if uncalibrated := [skill.name for skill in self.library if skill.threshold is None]:
            raise ValueError(f"No threshold was calibrated for {', '.join(uncalibrated)}. Call calibrate first.")
        means = batch_means(blocks_NH)
        measured = {
            name: sum(self.library.similarity(name, batch_H) for batch_H in means) / len(means)
            for name in self.library.names
        }
        measured = dict(sorted(measured.items(), key=lambda item: -item[1]))
        if not measured:
            return Verdict(is_novel=True, nearest=None, similarity=None, threshold=None, similarities={})
        nearest, similarity = next(iter(measured.items()))
        threshold = self.library[nearest].threshold
        return Verdict(
            is_novel=similarity < threshold,
            nearest=nearest,
            similarity=similarity,
            threshold=threshold,
            similarities=measured,
        )


def batch_means(blocks_NH: Tensor) -> list[Tensor]:
    """Means over batches of blocks that lie as far apart as can be; what fills no batch is left out."""
    num_batches = len(blocks_NH) // BLOCKS_IN_A_BATCH
    return [blocks_NH[i::num_batches][:BLOCKS_IN_A_BATCH].mean(dim=0) for i in range(num_batches)]
