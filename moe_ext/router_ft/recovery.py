"""How much of the loss of quantisation a finetuning won back, with its control and an interval.

    recovery = ((Q - R) - (F - C)) / (Q - F)

F is the loss in full precision, Q after quantisation, R after quantisation and router finetuning, and C that of the
full precision after the same router finetuning. What C gains is more training, no repair, and is taken off.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Losses = Mapping[str, np.ndarray]

RESAMPLES = 2000


@dataclass(frozen=True)
class Recovery:
    """A share of the damage, 1 being all of it.

    Args:
        plain: (Q - R) / (Q - F), the control not taken off.
        beyond_control: as above.
        low, high: the 95 % interval of beyond_control.
        damage: Q - F in nats a token.
    """

    plain: float
    beyond_control: float
    low: float
    high: float
    damage: float


def measure_recovery(
    full: Losses, quantized: Losses, finetuned: Losses, control: Losses, *, seed: int = 0
) -> Recovery:
    """Recovery and its interval by a bootstrap over blocks.

    Args:
        full, quantized, finetuned, control: the loss of each held-out block by source, the same blocks for all four; a
            resample takes the same blocks of all, and as many of each source as there are.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    whole = {source: np.arange(len(values)) for source, values in full.items()}

    def shares(rows: dict[str, np.ndarray]) -> tuple[float, float, float]:
        f, q, r, c = (
            np.mean([losses[source][rows[source]].mean() for source in rows])
            for losses in (full, quantized, finetuned, control)
        )
        return (q - r) / (q - f), ((q - r) - (f - c)) / (q - f), q - f

    resampled = [
        shares({source: rng.integers(len(rows), size=len(rows)) for source, rows in whole.items()})[1]
        for _ in range(RESAMPLES)
    ]
    plain, beyond, damage = shares(whole)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Recovery(float(plain), float(beyond), float(low), float(high), float(damage))
