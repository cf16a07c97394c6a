"""A plan: which matrix gets which number format, and for which model it was made."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_common.runs.whole_files import read_json
from moe_ext.router_ft.formats import bits_per_weight, check_format, group_size
from moe_ext.router_ft.matrices import Matrix

MATRICES = "matrices"


@dataclass(frozen=True)
class Plan:
    """The format of every matrix.

    Args:
        formats: format by matrix name.
        shapes: rows and columns by matrix name.
        made_by: the options it was allocated with, for the record.
    """

    formats: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights of all matrices whose format has scales, scales included; BF16 ones stay out."""
        return self._mean_bits([name for name, given in self.formats.items() if given != "BF16"])

    @property
    def bits_per_weight_with_bf16(self) -> float:
        """The same over all matrices of the plan."""
        return self._mean_bits(list(self.formats))

    def _mean_bits(self, names: list[str]) -> float:
        sizes = [rows * columns for rows, columns in (self.shapes[name] for name in names)]
        bits = [bits_per_weight(self.formats[name], self.shapes[name][1]) for name in names]
        return sum(size * cost for size, cost in zip(sizes, bits, strict=True)) / sum(sizes) if sizes else 16.0

    def counts(self) -> dict[str, int]:
        """How many matrices have each format."""
        return dict(Counter(self.formats.values()))

    def check_model(self, matrices: Iterable[Matrix]) -> None:
        """Refuse another model's plan.

        Raises:
            ValueError: a matrix that the plan lacks or holds in another shape, or one the model does not have.
        """
        found = {matrix.name: (matrix.num_rows, matrix.num_columns) for matrix in matrices}
        for name, shape in found.items():
            if name not in self.formats:
                raise ValueError(
                    f"The plan has no format for {name}, which the model has: it was made for another model. Make "
                    "one with: python -m moe_ext.router_ft allocate"
                )
            if self.shapes[name] != shape:
                raise ValueError(
                    f"The plan holds {name} as {self.shapes[name][0]} x {self.shapes[name][1]}, but the model's is "
                    f"{shape[0]} x {shape[1]}: it was made for another model."
                )
        if unknown := [name for name in self.formats if name not in found]:
            raise ValueError(
                f"The plan gives a format to {unknown[0]}, which the model does not have ({len(unknown)} such "
                "matrices): it was made for another model."
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "bits_per_weight": round(self.bits_per_weight, 4),
            "made_by": self.made_by,
            MATRICES: {
                name: {"format": given, "rows": self.shapes[name][0], "columns": self.shapes[name][1]}
                for name, given in self.formats.items()
            },
        }

    @classmethod
    def from_dict(cls, content: Any, where: str) -> "Plan":
        """Read what `to_dict` wrote.

        Args:
            content: parsed JSON.
            where: its file, for errors.

        Raises:
            ValueError: no plan, an unknown format, or one that does not fit a matrix.
        """
        if not isinstance(content, dict) or not isinstance(content.get(MATRICES), dict) or not content[MATRICES]:
            raise ValueError(f"{where} holds no plan: expected an object with '{MATRICES}' that is not empty.")
        formats, shapes = {}, {}
        for name, entry in content[MATRICES].items():
            try:
                formats[name], shapes[name] = entry["format"], (int(entry["rows"]), int(entry["columns"]))
            except (KeyError, TypeError, ValueError) as wrong:
                raise ValueError(
                    f"{where} holds {json.dumps(entry)} for {name}. Expected its format, rows and columns."
                ) from wrong
            try:
                if check_format(formats[name]).preset is not None:
                    group_size(formats[name], shapes[name][1])
            except ValueError as wrong:
                raise ValueError(f"{where}, {name}: {wrong}") from wrong
        return cls(formats, shapes, content.get("made_by") or {})


def uniform_plan(matrices: Iterable[Matrix], name: str, *, dense: str = "BF16") -> Plan:
    """One format for all experts, and one for what every token passes."""
    matrices = list(matrices)
    formats = {matrix.name: name if matrix.kind == "expert" else dense for matrix in matrices}
    shapes = {matrix.name: (matrix.num_rows, matrix.num_columns) for matrix in matrices}
    return Plan.from_dict(Plan(formats, shapes, {"uniform": name, "dense": dense}).to_dict(), f"uniform {name}")


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or no plan; see `Plan.from_dict`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no plan {path}. Write one with: python -m moe_ext.router_ft allocate")
    return Plan.from_dict(read_json(path), str(path))
