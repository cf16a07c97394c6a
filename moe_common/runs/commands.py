"""Run a command: options in, text out; what a user can set right is told in one line, and a stop says how to go on.

def main(argv=None):
    return run_program("python -m moe_ext.router_ft", {"alpha": Command(AlphaOptions, alpha, "...")}, argv)
"""

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_common.runs.allocator import keep_freed_memory
from moe_common.runs.failures import WORLD, as_line
from moe_common.runs.options import OptionParser
from moe_common.runs.processes import process_rank

REFUSED = 2
INTERRUPTED = 130  # what a shell reports of a program that was stopped by Ctrl-C
LOG_FORMAT, LOG_TIME = "%(asctime)s %(message)s", "%H:%M:%S"
# A line for every request; a line for every product of an 8-bit layer.
QUIETER = {"httpx": logging.WARNING, "bitsandbytes.autograd._functions": logging.ERROR}
# PEFT 0.21.2 asks transformers 5 by the older name whether checkpointing is on, whenever an adapter is loaded.
OLDER_NAME = ".*gradient_checkpointing.* is deprecated.*"
STOPPED = "Stopped. The same command goes on from what it has kept, unless it is told to begin anew."


@dataclass(frozen=True)
class Command:
    """One command of a program.

    Args:
        options: dataclass of its options.
        work: takes one of these, and returns the text to print, or None.
        about: what it does, in a line.
        keeps_memory: whether freed memory stays with the process, which is quicker.
    """

    options: type
    work: Callable[[Any], str | None]
    about: str
    keeps_memory: bool = True


def run_program(program: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None) -> int:
    """Run the command that is named first; one whose name is a flag, wherever it stands.

    Args:
        program: how it is called, as `python -m package`.
        commands: by name, which may be of several words.
        argv: words behind the program; by default those of the process.

    Returns:
        The exit code: 0, 2 refused, 130 stopped.

    Raises:
        SystemExit: as `run_command`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    named = [name for name in commands if argv[: len(name.split())] == name.split() or _is_flag_in(name, argv)]
    if not named and {"-h", "--help"} & set(argv):
        width = max(map(len, commands))
        listed = "\n".join(f"  {name:{width}}  {command.about}" for name, command in commands.items())
        print(f"usage: {program} {{{','.join(commands)}}} [--option value ...]\n\ncommands:\n{listed}")
        return 0
    if len(named) != 1:
        print(f"{program}: error: {_fault(named, argv)}. Give one of {', '.join(commands)}.", file=sys.stderr)
        return REFUSED
    (name,) = named
    command = commands[name]
    parser = OptionParser((command.options,), prog=f"{program} {name}", description=command.about)
    if command.keeps_memory:
        keep_freed_memory()
    return run_command(parser, command.work, _without(argv, name.split()))


def run_command(parser: OptionParser, work: Callable[..., str | None], argv: Sequence[str] | None = None) -> int:
    """Parse the options, do the work and print what it returns; the log goes to stderr.

    Args:
        parser: of the options.
        work: takes an instance of each of the parser's dataclasses.
        argv: words of the command line; by default those of the process.

    Returns:
        The exit code: 0, or 130 after Ctrl-C or SIGTERM.

    Raises:
        SystemExit: with code 2 after one line, where options or `work` are refused; with 0 after --help.
    """
    for name, least in QUIETER.items():
        logging.getLogger(name).setLevel(least)
    warnings.filterwarnings("ignore", message=OLDER_NAME, category=FutureWarning)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # what a scheduler sends ends as Ctrl-C does
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        level = logging.INFO if process_rank() == 0 else logging.ERROR
        logging.basicConfig(level=level, format=LOG_FORMAT, datefmt=LOG_TIME, stream=sys.stderr)
        text = work(*parser.parse(argv))
    except KeyboardInterrupt:
        print(f"\n{STOPPED}", file=sys.stderr)  # below the line of a progress bar
        return INTERRUPTED
    except WORLD as failed:
        if (line := as_line(failed)) is None:
            raise
        parser.error(line)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    if text:
        print(text)
    return 0


def _fault(named: Sequence[str], argv: Sequence[str]) -> str:
    if named:
        return f"{' and '.join(named)} were given"
    return f"'{argv[0]}' is no command" if argv else "no command was given"


def _is_flag_in(name: str, argv: Sequence[str]) -> bool:
    return name.startswith("--") and name in argv


def _without(argv: Sequence[str], words: Sequence[str]) -> list[str]:
    """argv without one run of these words."""
    start = argv.index(words[0])
    return [*argv[:start], *argv[start + len(words) :]]
