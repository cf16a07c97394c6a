"""Runs the parts one after another, keeps each as it is done, and writes the report.

A part's file holds what it was run with. It is not run again while that is the same: the setting, the rounds, the
machine's processor, the versions and the code that is measured.
"""

import gc
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.forms import forms
from benchmarks.generation import generation
from benchmarks.machine import machine, measured_code
from benchmarks.models import Setting
from benchmarks.operators import operators
from benchmarks.parts import forward, memory, scaling, scope, training
from moe_common.runs.allocator import keep_freed_memory
from moe_common.runs.whole_files import write_text

logger = logging.getLogger(__name__)

PARTS = {
    "forward": forward,
    "training": training,
    "memory": memory,
    "generation": generation,
    "scaling": scaling,
    "scope": scope,
    "forms": forms,
    "operators": operators,
}
MIN_ROUNDS = 2


def run_part(part: str, setting: Setting, rounds: int, output: Path, *, again: bool = False) -> dict:
    """The result of one part: from its file where that was made with the same settings, otherwise measured now.

    Args:
        part: a name of PARTS.
        setting: where and in which number format.
        rounds: how often each way is timed, at least 2.
        output: folder of the results; the part goes to `<part>.json`.
        again: measure whatever there is.

    Returns:
        What the part returns, with `part`, `made_with`, and `took`, the seconds it took.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds is {rounds}, but must be at least {MIN_ROUNDS}: a spread needs two.")
    file = output / f"{part}.json"
    made_with = settings_of(setting, rounds)
    if not again and (held := _read(file)) and _same(held["made_with"], made_with):
        logger.info("%s: done before, in %s", part, file.name)
        return held
    keep_freed_memory()
    logger.info("%s: measuring, %d rounds, %s on %s", part, rounds, setting.dtype, setting.device)
    start = time.perf_counter()
    result = PARTS[part](setting, rounds)
    result |= {"part": part, "made_with": made_with, "took": time.perf_counter() - start}
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    write_text(file, json.dumps(result, indent=1) + "\n")
    logger.info("%s: done in %.0f s", part, result["took"])
    return result


def settings_of(setting: Setting, rounds: int) -> dict:
    return {
        "setting": setting.to_dict(),
        "rounds": rounds,
        "machine": machine(setting.device),
        "code": measured_code(),
    }


def held_parts(output: Path) -> dict[str, dict]:
    """The results that lie in a folder, in the order of PARTS."""
    found = {part: _read(output / f"{part}.json") for part in PARTS}
    return {part: result for part, result in found.items() if result}


def rows_of(results: dict[str, dict], group: str) -> Iterable[dict]:
    """The rows of a group, whichever part holds it; none where that part has not run."""
    for result in results.values():
        for timed in result["groups"]:
            if timed["name"] == group:
                yield from timed["rows"]


def _same(held: dict, wanted: dict) -> bool:
    """The commit may differ: what counts of it is the code that is measured."""
    return _without_commit(held) == _without_commit(wanted)


def _without_commit(made_with: dict) -> dict:
    return made_with | {"machine": {**made_with["machine"], "commit": None}}


def _read(file: Path) -> dict | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
