"""python -m moe_ext.multi_token train | infer | bench; each with --help."""

import logging
import sys

from foundation.allocator import keep_freed_memory
from foundation.downloads import DownloadError
from foundation.options import OptionParser
from moe_ext.multi_token.bench import bench
from moe_ext.multi_token.infer_command import infer
from moe_ext.multi_token.options import BenchOptions, InferOptions, TrainOptions
from moe_ext.multi_token.train_command import train

PROGRAM = "python -m moe_ext.multi_token"
COMMANDS = {
    "train": (TrainOptions, "Train token heads and a router beside a frozen causal language model."),
    "infer": (InferOptions, "Continue a prompt, several tokens a backbone pass."),
    "bench": (BenchOptions, "Measure tokens a pass, acceptance, wall clock and exact match on held-out text."),
}
USAGE = f"usage: {PROGRAM} {{{','.join(COMMANDS)}}} [options]"


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE, *(f"  {name}  {about}" for name, (_, about) in COMMANDS.items()), sep="\n")
        return 0
    if not argv or argv[0] not in COMMANDS:
        given = f"'{argv[0]}'" if argv else "nothing"
        print(f"{PROGRAM}: error: {given} is no command. Give one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command = argv[0]
    options_class, about = COMMANDS[command]
    parser = OptionParser((options_class,), prog=f"{PROGRAM} {command}", description=about)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    keep_freed_memory()
    try:
        (options,) = parser.parse(argv[1:])
        if command == "train":
            print(f"Router and heads lie in {train(options)}")
        elif command == "infer":
            infer(options)
        else:
            print(bench(options))
    except (ValueError, FileNotFoundError) as refused:
        parser.error(str(refused))
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from the newest checkpoint.", file=sys.stderr)
        return 130
    except DownloadError as failed:
        print(failed, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
