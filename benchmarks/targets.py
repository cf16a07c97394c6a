"""The targets for speed and memory, and what was measured beside them."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.engine import rows_of
from benchmarks.measure import Ratio, ratio


@dataclass(frozen=True)
class Target:
    """A target and its measurement.

    Args:
        what: what is compared.
        wanted, measured: as text for a table.
        met: whether the median reaches the target.
    """

    what: str
    wanted: str
    measured: str
    met: bool


def targets(results: dict[str, dict], rank: int) -> list[Target]:
    """Those that the parts in `results` (by name) can tell about. `rank` is that of an expert."""
    limit = f"lora-r{8 * rank}"
    found = [*_near_the_limit(results, limit), *_against_passes(results)]
    found += _generation(results, limit, f"lora-r{rank}")
    for group, title, wanted in (("forward", "forward pass", 2.8), ("training", "training step", 2.0)):
        what = f"{title} of X-LoRA, 4 adapters, over routed, all of 4"
        found += _times_as_fast(results, group, what, "xlora-4", "routed-4-dense", wanted)
    for group, title in (("experts-forward", "forward pass"), ("experts-training", "training step")):
        what = f"{title}, top-2 of 64 over top-2 of 4"
        found += _at_most(results, group, what, "routed-64-top2", "routed-4-top2", 1.3)
    return found


def _near_the_limit(results: dict, limit: str) -> Iterator[Target]:
    for kind, told in (("dense", "all of 8"), ("top2", "top-2 of 8")):
        for group, title in (("forward", "forward pass"), ("training", "training step")):
            what = f"{title}, routed, {told}, over one LoRA of the same arithmetic"
            yield from _at_most(results, group, what, f"routed-8-{kind}", limit, 1.05)
        rows = {row["way"]: row for row in rows_of(results, "memory")}
        if rows:
            found = rows[f"routed-8-{kind}"]["training_peak"] / rows[limit]["training_peak"]
            what = f"peak memory of the training step, routed, {told}, over one LoRA of the same arithmetic"
            yield Target(what, "at most 1.05", f"{found:.3f}", found <= 1.05)


def _against_passes(results: dict) -> Iterator[Target]:
    rows = {row["way"]: row for row in rows_of(results, "forward")}
    for experts in (2, 4, 8) if rows else ():
        passes, routed = rows[f"passes-{experts}"], rows[f"routed-{experts}-dense"]
        allowed, found = passes["flops"] / routed["flops"], ratio(passes["seconds"], routed["seconds"])
        share = found.median / allowed
        measured = f"{share:.0%}: {found} of {allowed:.2f}"
        what = f"{experts} separate passes over one routed pass of {experts}, as a share of what the operations allow"
        yield Target(what, "at least 90 %", measured.replace("%", " %"), share >= 0.9)


def _generation(results: dict, limit: str, small: str) -> Iterator[Target]:
    # Seconds of the plain LoRA by those of the routed model: the ratio of their tokens a second.
    for lora in (small, limit):
        what = f"generated tokens/s, routed, top-2 of 8, over {lora}"
        yield from _times_as_fast(results, "generation", what, lora, "routed-8-top2", 0.9)
    for adapters in (4, 8):
        what = f"generated tokens/s, routed, top-2 of 8, over X-LoRA with {adapters} adapters"
        yield from _times_as_fast(results, "generation", what, f"xlora-{adapters}", "routed-8-top2", 8.0)


def _at_most(results: dict, group: str, what: str, way: str, over: str, limit: float) -> Iterator[Target]:
    for found in _ratios(results, group, way, over):
        yield Target(what, f"at most {limit:.2f}", str(found), found.median <= limit)


def _times_as_fast(results: dict, group: str, what: str, way: str, over: str, least: float) -> Iterator[Target]:
    for found in _ratios(results, group, way, over):
        yield Target(what, f"at least {least}", str(found), found.median >= least)


def _ratios(results: dict, group: str, way: str, over: str) -> Iterator[Ratio]:
    """The ratio of the two, or nothing where the group was not measured."""
    rows = {row["way"]: row for row in rows_of(results, group)}
    if rows:
        yield ratio(rows[way]["seconds"], rows[over]["seconds"])
