"""Where the time goes: operators by the time they take themselves, of two ways, side by side.

    python -m benchmarks.operators --way routed-8-top2 --against lora-r128

A ratio that misses its target comes with this table; `python -m benchmarks` writes it as the part `operators`.
"""

import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import forward_of, step_of
from benchmarks.models import SIZES, Setting, random_tokens
from benchmarks.parts import build
from benchmarks.ways import Way, all_ways, lora, routed
from moe_common.runs.allocator import keep_freed_memory
from moe_common.runs.options import PlainParser

SHOWN = 12
TURNS = 5


def operators(setting: Setting, rounds: int) -> dict:
    """Routed top-2 of 8 against one LoRA of the same arithmetic; a fixed number of turns, whatever `rounds`."""
    rank = setting.size.rank
    mixture, limit = routed(8, 2, rank=rank), lora(8 * rank)
    return {"groups": [compare(mixture, limit, setting, training=kind) for kind in (False, True)], "checks": []}


def compare(way: Way, against: Way, setting: Setting, *, training: bool) -> dict:
    """Milliseconds a call of each operator in both ways, those that differ most first."""
    runs = build([way, against], setting, training=training)
    input_ids = random_tokens(setting.size.vocab, setting.size.tokens, setting.device)
    actions = {
        name: step_of(run, input_ids, setting) if training else forward_of(run, input_ids)
        for name, run in runs.items()
    }
    times = profile_in_turns(actions, setting.device)
    mine, other = times[way.name], times[against.name]
    rows = [{"operator": name, "mine": mine.get(name, 0.0), "other": other.get(name, 0.0)} for name in {*mine, *other}]
    rows.sort(key=lambda row: (-abs(row["mine"] - row["other"]), row["operator"]))
    step = "training" if training else "forward"
    return {
        "name": f"operators-{step}",
        "title": f"{'Training step' if training else 'Forward pass'}: {way.label} against {against.label}",
        "ways": [way.name, against.name],
        "total": [sum(mine.values()), sum(other.values())],
        "rows": rows[:SHOWN],
    }


def profile_in_turns(actions: dict[str, Callable[[], object]], device: str) -> dict[str, dict[str, float]]:
    """Operator -> its own milliseconds a call, for each action; the actions take turns."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    for action in actions.values():
        action()
    times = {name: {} for name in actions}
    for _ in range(TURNS):
        for name, action in actions.items():
            with profile(activities=activities) as profiled:
                action()
                if device == "cuda":
                    torch.cuda.synchronize()
            for event in profiled.key_averages():
                own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
                if own:
                    times[name][event.key] = times[name].get(event.key, 0.0) + own / 1000 / TURNS
    return times


def as_text(table: dict) -> str:
    """The table of `compare`, as Markdown."""
    mine, other = table["ways"]
    lines = [f"| operator | {mine}, ms | {other}, ms | difference, ms |", "| --- | --- | --- | --- |"]
    total = {"operator": "all operators", "mine": table["total"][0], "other": table["total"][1]}
    for row in (*table["rows"], total):
        name = row["operator"] if row is total else f"`{row['operator']}`"
        lines.append(f"| {name} | {row['mine']:.2f} | {row['other']:.2f} | {row['mine'] - row['other']:+.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = PlainParser(
        __doc__.splitlines()[0],
        example="python -m benchmarks.operators --way routed-8-top2 --against lora-r128 --step forward",
        prog="python -m benchmarks.operators",
    )
    parser.add_argument("--way", default="routed-8-top2", help="the way to explain")
    parser.add_argument("--against", default="lora-r128", help="the way to subtract")
    parser.add_argument("--step", choices=("forward", "training"), default="training", help="what to profile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="number format")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="dimensions of the base model")
    arguments = parser.parse_args(argv)
    setting = Setting(device=arguments.device, dtype=arguments.dtype, size=SIZES[arguments.size])
    known = {way.name: way for way in all_ways(setting.size.rank)}
    for name in (arguments.way, arguments.against):
        if name not in known:
            parser.error(f"there is no way {name!r}; known are {', '.join(known)}")
    keep_freed_memory()
    table = compare(known[arguments.way], known[arguments.against], setting, training=arguments.step == "training")
    print(f"{table['title']}\n\n{as_text(table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
