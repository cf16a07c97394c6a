"""What holds for every test here: which peft is meant, no hub, one thread a worker, GPU tests skipped aloud."""

import os
import sys
from pathlib import Path

import pytest

FORK = Path(__file__).parent / "peft"

# Before anything imports them: huggingface_hub and the thread pools read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Imported here, first, because pytest gives a test in peft/tests/ the name peft.tests.test_x and would otherwise make
# a module `peft` of the folder, in which no test finds the fork.
try:
    import peft

    fork_is_installed = peft.__file__ is not None and hasattr(peft, "MoELoraConfig")
except ModuleNotFoundError:
    fork_is_installed = False


def pytest_configure(config):
    if not fork_is_installed:
        raise pytest.UsageError(
            "The fork of PEFT is not installed in this Python. Install it with `pip install -e ./peft`, or let "
            "`make test` make the environment."
        )

    # That routing off is the pristine release, bit for bit, is tested against it; pytest-xdist's workers inherit it.
    os.environ.setdefault("PEFT_PRISTINE", str(pristine_release() / "src"))


def pristine_release() -> Path:
    """The pinned release of PEFT as it was published, unpacked once in the fork's cache."""
    sys.path.insert(0, str(FORK))
    try:
        from fork_tool.release import cache_folder, load_release, read_pin
    finally:
        sys.path.remove(str(FORK))
    pin = read_pin(FORK / "upstream.toml")
    folder = cache_folder() / f"pristine-{pin.sha256[:16]}"
    if not folder.exists():
        scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
        for name, content in load_release(pin).files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)
        os.replace(scratch, folder)
    return folder


def pytest_report_header():
    return f"peft {peft.__version__} from {os.path.dirname(peft.__file__)}"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and this machine has none")
