"""Options of `make bench`, and the report at its end."""

from pathlib import Path

import pytest

from benchmarks.__main__ import ROUNDS, command_of, default_output, number_of_rounds, setting_of
from benchmarks.engine import run_part
from benchmarks.machine import supports
from benchmarks.models import SIZES
from benchmarks.report import write_report


def pytest_addoption(parser):
    options = parser.getgroup("benchmarks")
    options.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the benchmarks run")
    options.addoption("--size", choices=tuple(SIZES), help="the base model; small on a CPU, large on CUDA")
    options.addoption("--rounds", type=number_of_rounds, default=ROUNDS, help="times each way is run")
    options.addoption("--output", type=Path, help="folder of the results, one subfolder for each device and format")
    options.addoption("--again", action="store_true", help="measure also what is done with the same settings")


@pytest.fixture
def run(request):
    """Runs a part in a number format, and writes the report of all that is done."""
    option = request.config.getoption

    def run_and_report(part: str, dtype: str) -> dict:
        device = option("--device")
        if not supports(device, dtype):
            pytest.skip(f"this machine has no {device} that computes in {dtype}")
        setting, folder = setting_of(device, dtype, option("--size")), default_output(device, dtype)
        output = option("--output") / folder.name if option("--output") else folder
        result = run_part(part, setting, option("--rounds"), output, again=option("--again"))
        write_report(output, command_of(setting, option("--rounds")))
        return result

    return run_and_report
