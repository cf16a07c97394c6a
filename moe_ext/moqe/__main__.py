"""python -m moe_ext.moqe --train | --eval | quantize | run | memory; each with --help."""

import sys

from moe_common.runs.commands import Command, run_program
from moe_ext.moqe.commands.memory import memory
from moe_ext.moqe.commands.run import run
from moe_ext.moqe.experts.quantize import quantize
from moe_ext.moqe.options import EvalOptions, MemoryOptions, QuantizeOptions, RunOptions, TrainOptions
from moe_ext.moqe.training.report import evaluate
from moe_ext.moqe.training.train import train


def train_and_say(options: TrainOptions) -> str:
    return f"The mixture lies in {train(options)}"


def quantize_and_say(options: QuantizeOptions) -> str:
    return "\n".join(["The experts lie in", *map(str, quantize(options))])


COMMANDS = {
    "--train": Command(TrainOptions, train_and_say, "Train a router over frozen experts."),
    "--eval": Command(EvalOptions, evaluate, "Measure trained mixtures on held-out text, in one table."),
    "quantize": Command(QuantizeOptions, quantize_and_say, "Make a set of experts from one model."),
    "run": Command(RunOptions, run, "Make experts, train routers and measure them, for several sets of experts."),
    "memory": Command(MemoryOptions, memory, "Load one expert and say what memory it takes.", keeps_memory=False),
}


def main(argv: list[str] | None = None) -> int:
    return run_program("python -m moe_ext.moqe", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
