"""How far a token's id decides its expert.

Shape letters: L gates, V vocabulary, E experts, X ids that are seen often enough.
"""

import numpy as np
import torch
from torch import Tensor

LEAST_SEEN = 10  # times: below it an id's best expert is mostly luck (the OLMoE authors list such ids alone, too)
DRAWS = 200


def specialisation(table_LVE: Tensor, *, least_seen: int = LEAST_SEEN, weights_V: Tensor | None = None) -> Tensor:
    """mean_x max_e N_(x,e) / N_x, [L]: how much of an id's tokens have the id's favourite expert as first choice.

    Vocabulary specialisation of OLMoE with k = 1 (Muennighoff et al. 2024, arXiv:2409.02060, section 5.4), each id
    counted once. Chance is well above 1 / E for an id that is seen a few times; `specialisation_by_chance`.

    Args:
        table_LVE: N_(x,e).
        least_seen: ids seen less often are left out; the authors' script takes all (1).
        weights_V: how often a bootstrap drew each id.

    Returns:
        NaN where no id is seen often enough.
    """
    seen_V = table_LVE[0].sum(dim=-1)
    ids_X = (seen_V >= least_seen).nonzero()[:, 0]
    best_LX = table_LVE[:, ids_X].amax(dim=-1) / seen_V[ids_X]
    weights_X = torch.ones(len(ids_X)) if weights_V is None else weights_V[ids_X]
    return (best_LX.double() * weights_X).sum(dim=-1) / weights_X.double().sum()


def specialisation_by_chance(table_LVE: Tensor, *, least_seen: int = LEAST_SEEN, seed: int = 0) -> float:
    """The same where every token draws its first choice evenly: mean_x E[max of a multinomial of N_x draws] / N_x."""
    seen_V = table_LVE[0].sum(dim=-1)
    seen_X, ids_X = torch.unique(seen_V[seen_V >= least_seen], return_counts=True)
    if not len(seen_X):
        return float("nan")
    generator, E = np.random.default_rng(seed), table_LVE.shape[-1]
    best_X = [generator.multinomial(n, [1 / E] * E, size=DRAWS).max(axis=1).mean() / n for n in seen_X.tolist()]
    return float(np.average(best_X, weights=ids_X.numpy()))


def favourites(
    table_LVE: Tensor, gate: int, expert: int, *, least_seen: int = LEAST_SEEN, most: int = 10
) -> list[tuple[int, float, int]]:
    """The ids that an expert takes the largest part of: (id, N_(x,e) / N_x, N_x)."""
    table_VE = table_LVE[gate]
    seen_V = table_VE.sum(dim=-1)
    part_V = torch.where(seen_V >= least_seen, table_VE[:, expert] / seen_V.clamp_min(1), -1.0)
    ids = part_V.argsort(descending=True, stable=True)[:most].tolist()
    return [(place, float(part_V[place]), int(seen_V[place])) for place in ids if part_V[place] > 0]
