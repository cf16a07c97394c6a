"""GPTQ: round a matrix column by column, the columns to come making up for the error of each.

Frantar et al. 2022, arXiv:2210.17323, algorithm 1. With H = 2 X X^T / T of the inputs and U the upper Cholesky factor
of H^-1, the error of column c, (w_c - q_c) / U_cc, is subtracted along row c of U from the columns that are still to
come. Columns are taken in the order of falling diag(H) (act-order) while each keeps the scale of its own group, chosen
before anything was rounded (static groups). In float64 throughout: on any device the result does not hang on the order
of sums, but for ties.

Shape letters: T tokens, O rows, C columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_SIZE = 128  # columns whose errors reach the rest of the matrix in one product
DAMP = 0.01  # of the mean of diag(H), added to it


def hessian_of(inputs_TC: Tensor) -> Tensor:
    """2 X^T X / T of the inputs [C, C], in float64.

    Args:
        inputs_TC: what the matrix was multiplied with; at least one token.
    """
    # One product in float64 of bfloat16 or float32 inputs: a sum over many tokens must not lose the small ones.
    inputs_TC = inputs_TC.double()
    return 2 * inputs_TC.T @ inputs_TC / len(inputs_TC)


def gptq(
    weight_OC: Tensor,
    hessian_CC: Tensor,
    round_column: Callable[[Tensor, int], Tensor],
    *,
    block_size: int = BLOCK_SIZE,
    damp: float = DAMP,
) -> Tensor:
    """The matrix rounded to a format so that its outputs on the calibration inputs change little.

    Args:
        weight_OC: the matrix.
        hessian_CC: of its inputs; a column that no input reached (a zero on the diagonal) is rounded for itself.
        round_column: takes numbers of a column [O] and the column's place in the matrix, and returns the nearest
            numbers that the format can hold there.
        block_size: see BLOCK_SIZE; the result does not depend on it.
        damp: see DAMP.

    Returns:
        The rounded matrix [O, C] in float64.

    Raises:
        ValueError: the Hessian is not finite.
    """
    diagonal_C = hessian_CC.diagonal()
    if not torch.isfinite(diagonal_C).all():
        raise ValueError(
            "The calibration inputs of a matrix are not finite. Check the checkpoint, or use a wider dtype."
        )
    order_C = torch.argsort(diagonal_C, descending=True, stable=True)
    upper_CC = _inverse_factor(hessian_CC[order_C][:, order_C].double(), damp)
    columns, weight_OC = order_C.tolist(), weight_OC.double()[:, order_C]
    rounded_OC = torch.empty_like(weight_OC)
    for start in range(0, weight_OC.shape[1], block_size):
        block = slice(start, min(start + block_size, weight_OC.shape[1]))
        errors_OB = torch.empty_like(weight_OC[:, block])
        for place, column in enumerate(range(block.start, block.stop)):
            rounded_OC[:, column] = round_column(weight_OC[:, column], columns[column])
            errors_OB[:, place] = (weight_OC[:, column] - rounded_OC[:, column]) / upper_CC[column, column]
            rest = slice(column, block.stop)
            weight_OC[:, rest] -= torch.outer(errors_OB[:, place], upper_CC[column, rest])
        weight_OC[:, block.stop :] -= errors_OB @ upper_CC[block, block.stop :]
    return rounded_OC[:, torch.argsort(order_C)]


def _inverse_factor(hessian_CC: Tensor, damp: float) -> Tensor:
    """The upper triangular U with U^T U = (H + damping)^-1."""
    diagonal_C = hessian_CC.diagonal()
    unseen_C = diagonal_C == 0
    extra_C = torch.where(unseen_C, 1.0, damp * diagonal_C.mean())
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(hessian_CC + torch.diag(extra_C)))
    return torch.linalg.cholesky(inverse_CC, upper=True)
