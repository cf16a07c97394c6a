"""python -m moe_ext.router_study run | evolution | intervene | reproduce olmoe | overhead; each with --help."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from foundation.allocator import keep_freed_memory
from foundation.downloads import DownloadError
from foundation.options import OptionParser
from moe_ext.router_study.evolution_command import evolution
from moe_ext.router_study.intervene_command import intervene_on
from moe_ext.router_study.options import (
    EvolutionOptions,
    InterveneOptions,
    OverheadOptions,
    ReproduceOptions,
    RunOptions,
)
from moe_ext.router_study.overhead_command import overhead
from moe_ext.router_study.reproduce import reproduce_olmoe
from moe_ext.router_study.run_command import run

PROGRAM = "python -m moe_ext.router_study"
COMMANDS: dict[str, tuple[type, Callable[[Any], str], str]] = {
    "run": (RunOptions, run, "Measure what the routers of a mixture do with text, and write a report."),
    "evolution": (EvolutionOptions, evolution, "Compare the routing of checkpoints with that of the last one."),
    "intervene": (
        InterveneOptions,
        intervene_on,
        "Take experts away or send their tokens elsewhere; the change of loss.",
    ),
    "reproduce olmoe": (ReproduceOptions, reproduce_olmoe, "Hold a model against the figures of the OLMoE paper."),
    "overhead": (OverheadOptions, overhead, "Time a pass that collects against a plain one."),
}
USAGE = f"usage: {PROGRAM} {{{','.join(COMMANDS)}}} [options]"
# What a user can set right: told in one line, exit code 2.
REFUSALS = (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError, DownloadError)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE, *(f"  {name}  {about}" for name, (_, _, about) in COMMANDS.items()), sep="\n")
        return 0
    command = " ".join(argv[:2]) if argv[:1] == ["reproduce"] else " ".join(argv[:1])
    if command not in COMMANDS:
        given = f"'{command}'" if argv else "nothing"
        print(f"{PROGRAM}: error: {given} is no command. Give one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    options_class, work, about = COMMANDS[command]
    parser = OptionParser((options_class,), prog=f"{PROGRAM} {command}", description=about)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    keep_freed_memory()
    try:
        (options,) = parser.parse(argv[len(command.split()) :])
        print(work(options))
    except REFUSALS as refused:
        parser.error(str(refused))
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from where it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
