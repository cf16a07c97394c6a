"""python -m moe_ext.router_ft STEP: alpha, allocate, quantize, finetune, evaluate, export, or run for all of them."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from foundation.allocator import keep_freed_memory
from foundation.downloads import DownloadError
from foundation.options import OptionParser
from moe_ext.router_ft import commands
from moe_ext.router_ft.run import RunOptions, run

STEPS: dict[str, tuple[type, Callable[[Any], str]]] = {
    "alpha": (commands.AlphaOptions, commands.run_alpha),
    "allocate": (commands.AllocateOptions, commands.run_allocate),
    "quantize": (commands.QuantizeOptions, commands.run_quantize),
    "finetune": (commands.FinetuneOptions, commands.run_finetune),
    "evaluate": (commands.EvaluateOptions, commands.run_evaluate),
    "export": (commands.ExportOptions, commands.run_export),
    "run": (RunOptions, run),
}
# What a user can set right: told in one line, exit code 2.
REFUSALS = (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError, DownloadError)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = f"usage: python -m moe_ext.router_ft {{{','.join(STEPS)}}} [--help] [options]"
    if argv[:1] in (["--help"], ["-h"]):
        print(usage)
        return 0
    if not argv or argv[0] not in STEPS:
        found = f"'{argv[0]}' is no step" if argv else "no step was named"
        print(f"python -m moe_ext.router_ft: error: {found}; give one of {', '.join(STEPS)}", file=sys.stderr)
        return 2
    options_class, step = STEPS[argv[0]]
    parser = OptionParser((options_class,), prog=f"python -m moe_ext.router_ft {argv[0]}", description=step.__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    keep_freed_memory()
    try:
        (options,) = parser.parse(argv[1:])
        print(step(options))
    except REFUSALS as refused:
        parser.error(str(refused))
    return 0


if __name__ == "__main__":
    sys.exit(main())
