"""python -m moe_ext.multi_token train | infer | bench; each with --help."""

import sys

from moe_common.runs.commands import Command, run_program
from moe_ext.multi_token.commands.bench import bench
from moe_ext.multi_token.commands.infer import infer
from moe_ext.multi_token.commands.train import train
from moe_ext.multi_token.options import BenchOptions, InferOptions, TrainOptions


def train_and_say(options: TrainOptions) -> str:
    return f"Router and heads lie in {train(options)}"


COMMANDS = {
    "train": Command(
        TrainOptions, train_and_say, "Train token heads and a router beside a frozen causal language model."
    ),
    "infer": Command(InferOptions, infer, "Continue a prompt, several tokens a backbone pass."),
    "bench": Command(BenchOptions, bench, "Measure tokens a pass, acceptance, wall clock and exact match."),
}


def main(argv: list[str] | None = None) -> int:
    return run_program("python -m moe_ext.multi_token", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
