"""The command `dylo-moe-validate`, with the speed table of benchmarks/, which only a checkout has."""

import sys
from importlib import import_module

from dylo_moe.equivalence import command


def main(argv: list[str] | None = None) -> int:
    return command.main(argv, speed_table=lambda: import_module("benchmarks.table"))


if __name__ == "__main__":
    sys.exit(main())
