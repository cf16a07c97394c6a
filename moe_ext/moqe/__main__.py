"""python -m moe_ext.moqe --train | --eval | quantize | run | memory; each with --help."""

import logging
import sys

from foundation.allocator import keep_freed_memory
from foundation.downloads import DownloadError
from foundation.options import OptionParser
from moe_ext.moqe.eval_command import evaluate
from moe_ext.moqe.memory_command import memory
from moe_ext.moqe.options import EvalOptions, MemoryOptions, QuantizeOptions, RunOptions, TrainOptions
from moe_ext.moqe.quantize_command import quantize
from moe_ext.moqe.run_command import run
from moe_ext.moqe.train_command import train

PROGRAM = "python -m moe_ext.moqe"
COMMANDS = {
    "--train": (TrainOptions, "Train a router over frozen experts."),
    "--eval": (EvalOptions, "Measure trained mixtures on held-out text, in one table."),
    "quantize": (QuantizeOptions, "Make a set of experts from one model."),
    "run": (RunOptions, "Make experts, train routers and measure them, for several sets of experts."),
    "memory": (MemoryOptions, "Load one expert and say what memory it takes."),
}
USAGE = f"usage: {PROGRAM} {{{','.join(COMMANDS)}}} [options]"
# What a user can set right: told in one line, exit code 2.
REFUSALS = (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    named = [word for word in argv if word in COMMANDS]
    if not named and {"-h", "--help"} & set(argv):
        print(USAGE, *(f"  {name}  {about}" for name, (_, about) in COMMANDS.items()), sep="\n")
        return 0
    if len(named) != 1:
        given = " and ".join(named) if named else f"'{argv[0]}'" if argv else "nothing"
        print(f"{PROGRAM}: error: {given} was given. Give one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command = named[0]
    argv.remove(command)
    options_class, about = COMMANDS[command]
    parser = OptionParser((options_class,), prog=f"{PROGRAM} {command}", description=about)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if command != "memory":  # there the process is to give back what it frees
        keep_freed_memory()
    try:
        (options,) = parser.parse(argv)
        if command == "--train":
            print(f"The mixture lies in {train(options)}")
        elif command == "--eval":
            print(evaluate(options))
        elif command == "quantize":
            print("The experts lie in", *quantize(options), sep="\n")
        elif command == "run":
            print(run(options))
        else:
            print(memory(options))
    except REFUSALS as refused:
        parser.error(str(refused))
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from where it was.", file=sys.stderr)
        return 130
    except DownloadError as failed:
        print(failed, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
