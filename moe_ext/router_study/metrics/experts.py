"""What the rows of a router have to do with the experts that they call.

Shape letters: E experts, H hidden size, N rows of an expert, T tokens.
"""

import math

import torch
from torch import Tensor


def alignment(weight_EH: Tensor, readers: list[Tensor]) -> Tensor:
    """a_(e,f) = sqrt(H) |W_f w_e| / (|W_f|_F |w_e|), [E, E]: how strongly expert f answers the direction of row e.

    1 for a random direction, up to sqrt(H) for the only direction that W_f reads. Rows e = f are an expert's own;
    the others are what it must be judged by.
    """
    H = weight_EH.shape[1]
    unit_EH = torch.nn.functional.normalize(weight_EH.double(), dim=-1)
    columns = []
    for reader_NH in readers:
        answer_E = (unit_EH @ reader_NH.double().T).norm(dim=-1)
        columns.append(math.sqrt(H) * answer_E / reader_NH.double().norm().clamp_min(1e-30))
    return torch.stack(columns, dim=-1)


def own_and_others(table_EE: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the diagonal and of the rest."""
    E = len(table_EE)
    own = table_EE.diagonal().mean()
    return own, (table_EE.sum() - table_EE.diagonal().sum()) / (E * (E - 1))


def agreement(one_EE: Tensor, other_EE: Tensor) -> Tensor:
    """Correlation of the entries above the diagonal of two similarity matrices, [] (Mantel 1967).

    Of router rows and experts' weights: do alike experts have alike rows (Lo et al. 2024, arXiv:2406.18219)? By chance
    0; the control renames the experts of one of the two.
    """
    above = torch.triu_indices(len(one_EE), len(one_EE), offset=1).unbind()
    return _correlation(one_EE[above].double(), other_EE[above].double())


def ranks(values_TE: Tensor) -> Tensor:
    """Rank of each expert for each token, 0 for the largest, [T, E]."""
    return values_TE.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)


def rank_table(gate_TE: Tensor, norms_TE: Tensor) -> Tensor:
    """P(rank by output norm | rank by gate), [E, E], row the gate's rank (Lo et al. 2024, arXiv:2406.18219). By
    chance 1 / E."""
    T, E = gate_TE.shape
    cells = ranks(gate_TE) * E + ranks(norms_TE)
    return torch.bincount(cells.flatten(), minlength=E * E).view(E, E).double() / T


def rank_correlation(gate_TE: Tensor, norms_TE: Tensor) -> Tensor:
    """Spearman's correlation of gate score and output norm over the experts of each token, [T]. By chance 0."""
    one, other = ranks(gate_TE).double(), ranks(norms_TE).double()
    centre = (gate_TE.shape[-1] - 1) / 2
    spread = ((torch.arange(gate_TE.shape[-1], dtype=torch.float64) - centre) ** 2).sum()
    return ((one - centre) * (other - centre)).sum(dim=-1) / spread


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    one, other = one - one.mean(), other - other.mean()
    return (one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-30)
