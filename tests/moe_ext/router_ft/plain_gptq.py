"""GPTQ once more, slow and plain, by which the fast one is judged; and the golden values that it made.

    python tests/moe_ext/router_ft/plain_gptq.py     # writes golden_gptq.json anew

It shares no line with moe_ext: NumPy in float64, one column after the other, and the inverse Hessian of the columns
that are left is updated explicitly after each (Frantar et al. 2022, arXiv:2210.17323, equations 2 and 3) rather than
read from a Cholesky factor. Number formats are spelt out as lists of their values.
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden_gptq.json"
CASES = [
    # format, rows, columns, tokens, group size
    ("INT4", 6, 64, 200, 64),
    ("INT3", 6, 128, 400, 128),
    ("INT3", 5, 96, 300, 32),
    ("INT2", 4, 256, 600, 128),
    ("MXFP4", 6, 64, 200, 32),
    ("MXFP8", 4, 64, 200, 32),
]


def levels_of(name: str) -> np.ndarray:
    """Every number that a format has before it is scaled, ascending."""
    if name.startswith("INT"):
        half = 2 ** (int(name[3:]) - 1)
        return np.arange(-half, half, dtype=np.float64)
    if name == "MXFP4":
        positive = [0.5, 1, 1.5, 2, 3, 4, 6]
    else:  # e4m3: exponents -6 to 8 with bias 7, three mantissa bits, subnormals; 480 is no number
        positive = [m / 8 * 2.0**-6 for m in range(1, 8)]
        positive += [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)]
    return np.array([-x for x in reversed(positive)] + [0.0] + positive)


def nearest_level(x: float, levels: np.ndarray) -> float:
    """The nearest level; no case here lies halfway between two."""
    return float(levels[np.abs(levels - x).argmin()])


def to_bfloat16(x: float) -> float:
    """The nearest bfloat16, ties to even."""
    bits = int(np.float32(x).view(np.uint32))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def plain_gptq(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, name: str, damp: float) -> np.ndarray:
    """The rounded matrix.

    Args:
        weight: [rows, columns].
        hessian: [columns, columns].
        scales: of each weight, [rows, columns].
        name: of the format.
        damp: part of the Hessian's mean diagonal that is added to it.
    """
    weight, levels = weight.astype(np.float64).copy(), levels_of(name)
    inverse = np.linalg.inv(hessian + damp * np.diag(hessian).mean() * np.eye(len(hessian)))
    left = list(np.argsort(-np.diag(hessian), kind="stable"))
    rounded = np.zeros_like(weight)
    while left:
        column = left.pop(0)
        for row in range(len(weight)):
            scale = scales[row, column]
            rounded[row, column] = to_bfloat16(nearest_level(weight[row, column] / scale, levels) * scale)
        error = (weight[:, column] - rounded[:, column]) / inverse[column, column]
        for other in left:
            weight[:, other] -= error * inverse[column, other]
        inverse = inverse - np.outer(inverse[:, column], inverse[column, :]) / inverse[column, column]
    return rounded


def make_case(number: int) -> dict:
    """Weights, the Hessian of correlated inputs, and power-of-two or bfloat16 scales of the largest weight."""
    name, rows, columns, tokens, group = CASES[number]
    rng = np.random.default_rng(number)
    weight = (rng.standard_normal((rows, columns)) * 0.1).astype(np.float32)
    inputs = rng.standard_normal((tokens, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    hessian = 2 * inputs.T @ inputs / tokens
    largest = np.abs(weight).reshape(rows, -1, group).max(axis=2)
    if name.startswith("INT"):
        scale = largest / ((2 ** int(name[3:]) - 1) / 2)
        scale = np.vectorize(to_bfloat16)(scale)
    else:
        top = {"MXFP4": 2, "MXFP8": 8}[name]
        scale = 2.0 ** (np.floor(np.log2(largest)) - top)
    return {"name": name, "weight": weight, "hessian": hessian, "scale": scale, "group": group}


def golden() -> list[dict]:
    """The rounded matrix of each case as levels (integers for INT) and what else identifies it."""
    found = []
    for number in range(len(CASES)):
        case = make_case(number)
        scales = case["scale"].repeat(case["group"], axis=1)
        rounded = plain_gptq(case["weight"], case["hessian"], scales, case["name"], damp=0.01)
        found.append({"format": case["name"], "rounded": [[float(x).hex() for x in row] for row in rounded]})
    return found


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), separators=(",", ":")) + "\n")
