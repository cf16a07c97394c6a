"""Share a budget of bits among the matrices, the sensitive ones first.

Each matrix i gets one format f so that

    sum_i  n_i * s_i * e_if      is smallest, with      sum_i n_i * b_if  <=  budget * sum_i n_i

n_i weights, s_i the matrix's sensitivity, e_if the part of its energy that rounding it to f loses
(|W - round(W)|^2 / |W|^2), b_if bits a weight with scales. The problem is an integer program and is solved exactly,
by HiGHS. After AlphaQ (Yang et al. 2026, arXiv:2606.04980) a heavier tail, that is a smaller alpha, means a better
trained matrix that deserves more bits: s_i = mean(alpha) / alpha_i. Documents disagree on the direction, so it is an
option.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from torch import nn

from moe_ext.router_ft.formats import FORMATS, bits_per_weight, check_format, round_to_nearest
from moe_ext.router_ft.matrices import Matrix
from moe_ext.router_ft.plan import Plan

logger = logging.getLogger(__name__)

Sensitivity = Literal["lower_alpha", "higher_alpha", "none", "random"]

SECONDS_TO_SOLVE = 120


def sensitivities(alphas: Sequence[float], direction: Sensitivity, *, seed: int = 0) -> np.ndarray:
    """The factor of each matrix's error, about 1.

    Args:
        alphas: exponent of each matrix.
        direction: `lower_alpha` has the heavy-tailed matrices as the sensitive ones, `higher_alpha` the others;
            `none` goes by the rounding errors alone; `random` deals the factors of `lower_alpha` out by chance.
        seed: of the chance.
    """
    if direction not in get_args(Sensitivity):
        raise ValueError(f"sensitivity is '{direction}', but must be one of {', '.join(get_args(Sensitivity))}.")
    values = np.asarray(alphas, dtype=float)
    if direction == "none":
        return np.ones_like(values)
    if direction == "higher_alpha":
        return values / values.mean()
    factors = values.mean() / values
    return np.random.default_rng(seed).permutation(factors) if direction == "random" else factors


def rounding_errors(model: nn.Module, matrices: Iterable[Matrix], formats: Sequence[str]) -> np.ndarray:
    """The part of each matrix's energy that rounding it loses [matrices, formats]."""
    errors = []
    for matrix in matrices:
        weight_OC = matrix.weight(model).float()
        energy = weight_OC.square().sum()
        lost = [(weight_OC - round_to_nearest(weight_OC, name)).square().sum() / energy for name in formats]
        errors.append([float(part) for part in lost])
    return np.asarray(errors)


def allocate(
    model: nn.Module,
    matrices: Sequence[Matrix],
    alphas: dict[str, float],
    *,
    budget_bits: float,
    formats: Sequence[str] = ("BF16", "MXFP8", "MXFP4", "INT4", "INT3"),
    sensitivity: Sensitivity = "lower_alpha",
    dense_format: str | None = "BF16",
    seed: int = 0,
) -> Plan:
    """A plan that costs at most so many bits a weight.

    Args:
        model: the unquantised model, for the rounding errors.
        matrices: of `matrices.find_matrices`.
        alphas: exponent by matrix name, of `alpha.read_alpha_csv`.
        budget_bits: bits a weight, scales included, over the matrices that are allocated.
        formats: that may be given.
        sensitivity: see `sensitivities`.
        dense_format: of attention, shared experts and dense MLPs, which stay out of the budget; None lets them compete
            with the experts.
        seed: of `random`.

    Raises:
        ValueError: no alpha for a matrix, an unknown format, or a budget below the cheapest format.
    """
    for name in [*formats, *([dense_format] if dense_format else [])]:
        check_format(name)
    competing = [matrix for matrix in matrices if dense_format is None or matrix.kind == "expert"]
    missing = [matrix.name for matrix in competing if matrix.name not in alphas]
    if missing:
        raise ValueError(
            f"The alpha table has no row for {missing[0]} ({len(missing)} of {len(competing)} matrices are missing). "
            "Write it anew for this model with: python -m moe_ext.router_ft alpha"
        )
    sizes = np.array([matrix.num_weights for matrix in competing], dtype=float)
    bits = np.array([[bits_per_weight(name, matrix.num_columns) for name in formats] for matrix in competing])
    cheapest = float(sizes @ bits.min(axis=1) / sizes.sum())
    if budget_bits < cheapest:
        raise ValueError(
            f"The budget is {budget_bits} bits a weight, but the cheapest of {', '.join(formats)} already cost "
            f"{cheapest:.4g}, scales included. Raise the budget, or allow a smaller format: {', '.join(FORMATS)}."
        )
    factors = sensitivities([alphas[matrix.name] for matrix in competing], sensitivity, seed=seed)
    errors = rounding_errors(model, competing, formats)
    chosen = solve(sizes[:, None] * factors[:, None] * errors, sizes[:, None] * bits, budget_bits * sizes.sum())
    given = {matrix.name: formats[number] for matrix, number in zip(competing, chosen, strict=True)}
    return Plan(
        formats={matrix.name: given.get(matrix.name, dense_format) for matrix in matrices},
        shapes={matrix.name: (matrix.num_rows, matrix.num_columns) for matrix in matrices},
        made_by={
            "budget_bits": budget_bits,
            "formats": list(formats),
            "sensitivity": sensitivity,
            "dense_format": dense_format or "allocated",
            "seed": seed,
        },
    )


def solve(cost: np.ndarray, weight: np.ndarray, capacity: float) -> list[int]:
    """Choose one column of each row so that the chosen costs are smallest and the chosen weights within capacity.

    Args:
        cost, weight: [rows, columns].
        capacity: of the chosen weights together; at least the sum of each row's smallest.

    Returns:
        The chosen column of each row.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    rows, columns = cost.shape
    one_a_row = kron(eye_array(rows), np.ones((1, columns)))
    # In units of the capacity and of the largest cost, so that the solver's absolute tolerances mean something.
    within = LinearConstraint(csr_array(weight.reshape(1, -1) / capacity), ub=1 + 1e-12)
    found = milp(
        cost.ravel() / max(cost.max(), 1e-300),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_a_row, lb=1, ub=1), within],
        options={"mip_rel_gap": 0, "time_limit": SECONDS_TO_SOLVE},
    )
    if found.x is None:
        raise RuntimeError(f"The solver found no allocation: {found.message}")
    if found.status != 0:
        logger.warning(
            "the best allocation of %d s is taken; it may cost up to %.2g of the optimum more",
            SECONDS_TO_SOLVE,
            found.mip_gap,
        )
    return found.x.reshape(rows, columns).argmax(axis=1).tolist()
