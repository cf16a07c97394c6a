"""Run the benchmarks: `python -m benchmarks`. Results go to a folder; the page in it is printed."""

import argparse
import logging
import sys
from pathlib import Path

from benchmarks.engine import MIN_ROUNDS, PARTS, run_part
from benchmarks.machine import supports
from benchmarks.models import SIZES, Setting
from benchmarks.report import write_report
from moe_common.runs.options import PlainParser

ROUNDS = 15


def main(argv: list[str] | None = None) -> int:
    parser = PlainParser(
        "Time routed LoRA and its alternatives.",
        example="python -m benchmarks --dtype bfloat16 --parts forward,training --rounds 15",
        prog="python -m benchmarks",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="number format")
    parser.add_argument("--size", choices=tuple(SIZES), help="the base model; small on a CPU, large on CUDA")
    parser.add_argument("--parts", type=part_names, default=",".join(PARTS), metavar="NAMES", help="which, by commas")
    parser.add_argument("--rounds", type=number_of_rounds, default=ROUNDS, metavar="N", help="times each way is run")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the results; by default results/DEVICE-DTYPE"
    )
    parser.add_argument("--again", action="store_true", help="measure also what is done with the same settings")
    arguments = parser.parse_args(argv)
    if not supports(arguments.device, arguments.dtype):
        parser.error(f"this machine has no {arguments.device} that computes in {arguments.dtype}")
    output = arguments.output or default_output(arguments.device, arguments.dtype)
    if output.exists() and not output.is_dir():
        parser.error(f"{output} is a file; --output takes a folder")
    setting = setting_of(arguments.device, arguments.dtype, arguments.size)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    for part in arguments.parts:
        run_part(part, setting, arguments.rounds, output, again=arguments.again)
        write_report(output, command_of(setting, arguments.rounds))
    print((output / "README.md").read_text(encoding="utf-8"))
    return 0


def part_names(text: str) -> list[str]:
    """The parts named in a comma-separated list, in the order in which they run."""
    named = text.split(",")
    if unknown := [name for name in named if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(unknown)!r}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in named]


def number_of_rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds; it must be at least {MIN_ROUNDS}")
    return int(text)


def default_output(device: str, dtype: str) -> Path:
    return Path("results") / f"{device}-{dtype}"


def setting_of(device: str, dtype: str, size: str | None = None) -> Setting:
    """The setting of a device and number format, with the size that suits the device unless one is named."""
    return Setting(device=device, dtype=dtype, size=SIZES[size or {"cpu": "small", "cuda": "large"}[device]])


def command_of(setting: Setting, rounds: int) -> str:
    """The command that repeats a run."""
    usual = setting_of(setting.device, setting.dtype)
    size = next(name for name, size in SIZES.items() if size == setting.size)
    named = "" if setting == usual else f" --size {size}"
    counted = "" if rounds == ROUNDS else f" --rounds {rounds}"
    return f"python -m benchmarks --device {setting.device} --dtype {setting.dtype}{named}{counted}"


if __name__ == "__main__":
    sys.exit(main())
