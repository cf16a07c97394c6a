"""What stage 3 rewards: right tokens, in order, in few passes, ended where the answer ends.

Each part lies between 0 and 1; the reward is their weighted sum.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class RewardWeights:
    """How much each part counts."""

    accuracy: float = 1.0
    order: float = 0.5
    efficiency: float = 0.5
    stop: float = 0.5

    def total(self, parts: dict[str, float]) -> float:
        """The weighted sum of what `reward_parts` gives."""
        return sum(getattr(self, part.name) * parts[part.name] for part in fields(self))


def reward_parts(
    written: Sequence[int], reference: Sequence[int], *, num_passes: int, num_heads: int, end_ids: Sequence[int]
) -> dict[str, float]:
    """The parts of an answer's reward by name.

    Args:
        written: tokens of the answer, with the token that ended it if one did.
        reference: tokens of the right answer, its end included.
        num_passes: backbone passes that wrote it.
        num_heads: H, so that a pass gives at most H + 1 tokens.
        end_ids: tokens that end a text.

    Returns:
        accuracy: F1 of the tokens whatever their order; order: the longest common subsequence over the longer of the
        two; efficiency: 0 at one token a pass, 1 at H + 1; stop: 1 where the answer ended by itself.
    """
    common = sum((Counter(written) & Counter(reference)).values())
    return {
        "accuracy": 2 * common / (len(written) + len(reference)) if common else 0.0,
        "order": common_subsequence(written, reference) / max(1, len(written), len(reference)),
        "efficiency": (len(written) / num_passes - 1) / num_heads if num_passes else 0.0,
        "stop": float(len(written) > 0 and written[-1] in end_ids),
    }


def common_subsequence(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest subsequence that both have."""
    row = [0] * (len(second) + 1)
    for token in first:
        before = 0
        for place, other in enumerate(second, start=1):
            before, row[place] = row[place], before + 1 if token == other else max(row[place], row[place - 1])
    return row[-1]
