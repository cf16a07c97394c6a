"""The figures of a study as JSON and as Parquet tables.

Shape letters: L gates, E experts.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from moe_ext.router_study.analysis.measure import Measured
from moe_ext.router_study.analysis.router_analyzer import Compared
from moe_ext.router_study.collect.collector import Activations
from moe_ext.router_study.collect.vocabulary_counts import KINDS
from moe_ext.router_study.metrics.vocabulary import favourites

AXES = ("layer", "other_layer", "step", "window", "domain", "other_domain", "expert", "other")
FIGURES = ("value", "low", "high", "chance", "shuffled", "on_sample")
LARGEST_IN_JSON = 4096  # numbers; larger ones are in the Parquet table alone
FAVOURITES = 20


def as_json(measured: Mapping[str, Measured], compared: Iterable[Compared]) -> dict[str, Any]:
    """Every figure by name, with its interval, chance and control; NaN as null."""
    routing = {
        name: {
            "title": found.title,
            "axes": list(found.axes),
            "tokens": found.tokens,
            "sample_tokens": found.sample_tokens,
            **{figure: _numbers(getattr(found, figure)) for figure in FIGURES},
        }
        for name, found in measured.items()
        if found.value.numel() <= LARGEST_IN_JSON
    }
    weights = {
        found.name: {
            "values": _numbers(found.values),
            "mean": found.mean,
            "low": found.low,
            "high": found.high,
            "chance": found.chance,
            "shuffled": found.shuffled,
        }
        for found in compared
    }
    return {"routing": routing, "weights": weights}


def write_figures(measured: Mapping[str, Measured], activations: Activations, path: str | Path) -> None:
    """One row for each number of each figure: its name, its place on the axes, and what it is judged by."""
    columns: dict[str, list[Any]] = {name: [] for name in ("figure", *AXES, *FIGURES)}
    for found in measured.values():
        places = torch.cartesian_prod(*(torch.arange(size) for size in found.value.shape)).view(-1, found.value.ndim)
        columns["figure"] += [found.name] * len(places)
        for axis in AXES:
            if axis in found.axes:
                names = _names(axis, activations)
                columns[axis] += [names(place) for place in places[:, found.axes.index(axis)].tolist()]
            else:
                columns[axis] += [None] * len(places)
        for figure in FIGURES:
            columns[figure] += getattr(found, figure).flatten().tolist()
    text = pyarrow.string()
    types = {name: pyarrow.int32() if name in ("expert", "other") else text for name in ("figure", *AXES)}
    types |= {name: pyarrow.float64() for name in FIGURES}
    _write(columns, types, path)


def write_favourites(activations: Activations, tokenizer, path: str | Path, *, least_seen: int) -> None:
    """The token ids that each expert takes the largest part of."""
    columns: dict[str, list[Any]] = {name: [] for name in ("kind", "layer", "expert", "id", "token", "part", "seen")}
    for kind, table_LVE in zip(KINDS, activations.vocabulary.table_3LVE, strict=True):
        for gate, label in enumerate(activations.gates.labels):
            for expert in range(activations.gates.num_experts):
                for token, part, seen in favourites(table_LVE, gate, expert, least_seen=least_seen, most=FAVOURITES):
                    text = tokenizer.decode([token]) if tokenizer is not None else None
                    for name, value in zip(columns, (kind, label, expert, token, text, part, seen), strict=True):
                        columns[name].append(value)
    text, count = pyarrow.string(), pyarrow.int32()
    types = {"kind": text, "layer": text, "expert": count, "id": count, "token": text, "part": pyarrow.float64()}
    _write(columns, {**types, "seen": count}, path)


def _write(columns: dict[str, list[Any]], types: dict[str, pyarrow.DataType], path: str | Path) -> None:
    table = pyarrow.table({name: pyarrow.array(values, types[name]) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, path)


def _names(axis: str, activations: Activations):
    labels = activations.gates.labels
    if axis in ("domain", "other_domain"):
        return activations.domains.__getitem__
    if axis in ("layer", "other_layer", "window"):
        return labels.__getitem__
    if axis == "step":
        return lambda place: f"{labels[place]}-{labels[place + 1]}"
    return int


def _numbers(tensor: Tensor) -> Any:
    return _finite(tensor.tolist())


def _finite(content: Any) -> Any:
    if isinstance(content, list):
        return [_finite(item) for item in content]
    return content if math.isfinite(content) else None
