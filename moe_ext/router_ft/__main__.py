"""python -m moe_ext.router_ft STEP: alpha, allocate, quantize, finetune, evaluate, export, or run for all of them."""

import sys

from moe_common.runs.commands import Command, run_program
from moe_ext.router_ft import commands
from moe_ext.router_ft.run import RunOptions, run

COMMANDS = {
    "alpha": Command(commands.AlphaOptions, commands.run_alpha, "Write the alpha table of a model."),
    "allocate": Command(commands.AllocateOptions, commands.run_allocate, "Write a plan: a format for each matrix."),
    "quantize": Command(commands.QuantizeOptions, commands.run_quantize, "Write a quantised checkpoint."),
    "finetune": Command(commands.FinetuneOptions, commands.run_finetune, "Finetune a checkpoint's routers, no more."),
    "evaluate": Command(commands.EvaluateOptions, commands.run_evaluate, "Write perplexities and task results."),
    "export": Command(commands.ExportOptions, commands.run_export, "Write the older .pt layout of a checkpoint."),
    "run": Command(RunOptions, run, "Do all of it for several plans, with controls, and write a table."),
}


def main(argv: list[str] | None = None) -> int:
    return run_program("python -m moe_ext.router_ft", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
