"""python -m moe_ext.router_study run | evolution | intervene | reproduce olmoe | overhead; each with --help."""

import sys

from moe_common.runs.commands import Command, run_program
from moe_ext.router_study import options
from moe_ext.router_study.commands.evolution import evolution
from moe_ext.router_study.commands.intervene import intervene_on
from moe_ext.router_study.commands.overhead import overhead
from moe_ext.router_study.commands.reproduce import reproduce_olmoe
from moe_ext.router_study.commands.run import run

COMMANDS = {
    "run": Command(options.RunOptions, run, "Measure what the routers of a mixture do with text, and write a report."),
    "evolution": Command(
        options.EvolutionOptions, evolution, "Compare the routing of checkpoints with that of the last one."
    ),
    "intervene": Command(
        options.InterveneOptions, intervene_on, "Take experts away or send their tokens elsewhere; the change of loss."
    ),
    "reproduce olmoe": Command(
        options.ReproduceOptions, reproduce_olmoe, "Hold a model against the figures of the OLMoE paper."
    ),
    "overhead": Command(options.OverheadOptions, overhead, "Time a pass that collects against a plain one."),
}


def main(argv: list[str] | None = None) -> int:
    return run_program("python -m moe_ext.router_study", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
