"""The heavy-tail exponent alpha of every matrix: how slowly its largest eigenvalues fall off.

The eigenvalues of W W^T of a trained matrix have a tail like a power law, p(x) ~ x^-alpha; the smaller alpha, the
heavier the tail and, by heavy-tailed self-regularisation theory, the better trained the matrix (Martin and Mahoney
2021, JMLR 22(165)). Three estimates of alpha, all of the eigenvalues above 1e-5:

- `mid`: the tail begins at the middle eigenvalue, which counts: alpha = 1 + n / sum ln(x_i / x_min). The estimate of
  AlphaPruning (Lu et al. 2024, arXiv:2410.10912), there called `xmin_mid`.
- `hill`: the same tail in Hill's form (1975), whose n values are those strictly beyond x_min.
- `ks`: the x_min whose power law lies closest to the tail by the Kolmogorov-Smirnov distance (Clauset et al. 2009,
  SIAM Review 51(4), sections 3.1 and 3.3).
"""

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_common.runs.failures import reading
from moe_common.runs.whole_files import write_text
from moe_ext.router_ft.matrices import Matrix

Estimate = Literal["mid", "hill", "ks"]

SMALLEST_EIGENVALUE = 1e-5
SHORTEST_TAIL = 8  # eigenvalues; of fewer, the Kolmogorov-Smirnov distance says nothing


@dataclass(frozen=True)
class AlphaRow:
    """One line of the alpha table.

    Args:
        layer_name: the matrix, by its checkpoint name.
        alpha_hill: its exponent; the column has this name whichever estimate was taken.
        kind: `expert` or `dense`.
        xmin: eigenvalue at which the tail begins.
        num_tail: eigenvalues in the tail.
        num_eigenvalues: eigenvalues above 1e-5.
    """

    layer_name: str
    alpha_hill: float
    kind: str
    xmin: float
    num_tail: int
    num_eigenvalues: int


def eigenvalues(weight_OC: Tensor) -> np.ndarray:
    """The eigenvalues of W W^T above 1e-5, ascending, in float64."""
    values = torch.linalg.svdvals(weight_OC.double()).square().flip(0).cpu().numpy()
    return values[values > SMALLEST_EIGENVALUE]


def alpha_mid(values: np.ndarray) -> tuple[float, float, int]:
    """The exponent, x_min and the number of tail values; x_min is the middle value and counts."""
    first = len(values) // 2
    tail = values[first:]
    return _exponent(tail, values[first]), float(values[first]), len(tail)


def alpha_hill(values: np.ndarray) -> tuple[float, float, int]:
    """The same for the values beyond the middle one."""
    first = len(values) // 2
    tail = values[first + 1 :]
    return _exponent(tail, values[first]), float(values[first]), len(tail)


def alpha_ks(values: np.ndarray) -> tuple[float, float, int]:
    """The same for the x_min that fits best, among those that leave at least eight values."""
    fits = []
    for first in range(max(1, len(values) - SHORTEST_TAIL + 1)):
        tail = values[first:]
        alpha = _exponent(tail, values[first])
        expected = 1 - (tail / values[first]) ** (1 - alpha)
        places = np.arange(len(tail) + 1) / len(tail)
        distance = max(np.abs(expected - places[:-1]).max(), np.abs(expected - places[1:]).max())
        fits.append((distance, alpha, float(values[first]), len(tail)))
    return min(fits)[1:]


ESTIMATES: dict[Estimate, Callable[[np.ndarray], tuple[float, float, int]]] = {
    "mid": alpha_mid,
    "hill": alpha_hill,
    "ks": alpha_ks,
}


def alpha_table(model: PreTrainedModel, matrices: Iterable[Matrix], *, estimate: Estimate = "mid") -> list[AlphaRow]:
    """The exponent of every matrix.

    Args:
        model: as it was before quantisation.
        matrices: of `matrices.find_matrices`; wrap them in a progress bar where one is wanted.
        estimate: which of the three.

    Raises:
        ValueError: a matrix with fewer than two eigenvalues above 1e-5, such as an expert of zeros; one whose largest
            eigenvalues are all alike.
    """
    rows = []
    for matrix in matrices:
        values = eigenvalues(matrix.weight(model))
        if len(values) < 2:
            raise ValueError(
                f"{matrix.name} has {len(values)} eigenvalues above {SMALLEST_EIGENVALUE}, but at least 2 are needed "
                "for an exponent: the matrix is all but zero. Check the checkpoint."
            )
        alpha, xmin, num_tail = ESTIMATES[estimate](values)
        if not math.isfinite(alpha):
            raise ValueError(
                f"{matrix.name} has no eigenvalue beyond {xmin:.4g}, where its tail begins ({len(values)} eigenvalues "
                "in all), so it has no exponent. Check the checkpoint, or take another estimate."
            )
        rows.append(AlphaRow(matrix.name, alpha, matrix.kind, xmin, num_tail, len(values)))
    return rows


def write_alpha_csv(rows: Iterable[AlphaRow], path: str | Path) -> None:
    """Write the table as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.name for column in fields(AlphaRow)]
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    write_text(path, text.getvalue())


def read_alpha_csv(path: str | Path) -> dict[str, float]:
    """The exponent of each matrix by its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a value is no finite number above 1, a matrix comes twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no alpha table {path}. Write one with: python -m moe_ext.router_ft alpha")
    alphas: dict[str, float] = {}
    with reading(path), open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"layer_name", "alpha_hill"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has no column {' and '.join(sorted(missing))}; its columns are "
                f"{', '.join(reader.fieldnames or ()) or 'none'}. Write it with: python -m moe_ext.router_ft alpha"
            )
        for row in reader:
            name = row["layer_name"]
            if name in alphas:
                raise ValueError(f"{path} names {name} twice, in line {reader.line_num} again. Keep one of the lines.")
            alphas[name] = _as_alpha(row["alpha_hill"], f"{path}, line {reader.line_num}")
    return alphas


def _exponent(tail: np.ndarray, xmin: float) -> float:
    logarithms = np.log(tail / xmin).sum()
    return float(1 + len(tail) / logarithms) if logarithms > 0 else math.inf


def _as_alpha(text: str | None, where: str) -> float:
    try:
        alpha = float(text or "")
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 1):
        raise ValueError(f"{where} holds '{text}' as alpha_hill, but an exponent is a finite number above 1.")
    return alpha
