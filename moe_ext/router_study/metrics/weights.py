"""What the rows of the routers say by themselves, without any text.

Chance is a router whose rows are drawn from a normal distribution, once more in the same shape: random directions in
H dimensions are nearly, but not quite, orthogonal.

Shape letters: L gates, E experts, H hidden size, R dimensions of a subspace.
"""

import math

import torch
from torch import Tensor


def cosines(weight_EH: Tensor) -> Tensor:
    """w_i . w_j / |w_i| |w_j|, [E, E]. By chance 0 off the diagonal, give or take 1 / sqrt(H)."""
    rows_EH = torch.nn.functional.normalize(weight_EH.double(), dim=-1)
    return rows_EH @ rows_EH.T


def mean_cosine(weight_EH: Tensor) -> Tensor:
    """mean_(i != j) |cos(w_i, w_j)|, []. By chance sqrt(2 / (pi H)) for wide H."""
    E = len(weight_EH)
    return (cosines(weight_EH).abs().sum() - E) / (E * (E - 1))


def mean_cosine_by_chance(weight_EH: Tensor) -> float:
    return math.sqrt(2 / (math.pi * weight_EH.shape[1]))


def spectrum(weight_EH: Tensor, *, centred: bool = False) -> Tensor:
    """Singular values, largest first, [min(E, H)]; centred on the mean row they are those of a PCA (Pearson 1901).

    The mean row adds the same score to every expert and changes no softmax, so that the centred ones are what routes.
    """
    weight_EH = weight_EH.double()
    return torch.linalg.svdvals(weight_EH - weight_EH.mean(dim=0) if centred else weight_EH)


def effective_rank(weight_EH: Tensor) -> Tensor:
    """exp(-sum_i q_i log q_i), q_i = s_i / sum s, [] (Roy and Vetterli 2007). At most min(E, H)."""
    singular = spectrum(weight_EH)
    return torch.special.entr(singular / singular.sum()).sum().exp()


def principal_angles(one_EH: Tensor, other_EH: Tensor, *, num_dimensions: int) -> Tensor:
    """Angles between the leading subspaces of two routers' rows, smallest first, [R], radians (Björck and Golub 1973).

    arccos of the singular values of Q1^T Q2. By chance, of random subspaces of R in H dimensions, the smallest comes
    near arccos(2 sqrt(R / H)) where R is much smaller than H; `random_like` measures it.

    Raises:
        ValueError: the two look at hidden states of different widths, or hold fewer dimensions.
    """
    if one_EH.shape[1] != other_EH.shape[1]:
        raise ValueError(
            f"One router reads {one_EH.shape[1]} numbers and the other {other_EH.shape[1]}; their subspaces cannot be "
            "compared."
        )
    most = min(*one_EH.shape, *other_EH.shape)
    if not 1 <= num_dimensions <= most:
        raise ValueError(f"num_dimensions is {num_dimensions}, but must lie between 1 and {most}.")
    bases = [
        torch.linalg.svd(weight.double(), full_matrices=False).Vh[:num_dimensions] for weight in (one_EH, other_EH)
    ]
    # arccos loses half of the digits near 0; the sine is accurate there.
    cosine_R = torch.linalg.svdvals(bases[0] @ bases[1].T).clamp(0, 1)
    rest = bases[1] - bases[1] @ bases[0].T @ bases[0]
    sine_R = torch.linalg.svdvals(rest).flip(0).clamp(0, 1)
    return torch.where(cosine_R**2 < 0.5, torch.arccos(cosine_R), torch.arcsin(sine_R))


def random_like(weight_EH: Tensor, generator: torch.Generator) -> Tensor:
    """A router of the same shape whose rows point anywhere."""
    return torch.randn(weight_EH.shape, generator=generator, dtype=torch.float64)


def shuffled_rows(weight_EH: Tensor, generator: torch.Generator) -> Tensor:
    """The same numbers in each row, in another order: the control that keeps every row's length and distribution."""
    order_EH = torch.rand(weight_EH.shape, generator=generator).argsort(dim=-1)
    return weight_EH.gather(-1, order_EH.to(weight_EH.device))
