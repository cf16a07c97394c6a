"""Run a Python program that nobody has read, in a subprocess with limits.

The program gets an empty folder that is deleted afterwards, an empty environment, no inherited files, and limits on
its time, memory, open files and their sizes; it is killed with all it started when its time is up. This stops
accidents. It is no wall against malice: the program can read what the user can read, start processes, and reach the
network. Run untrusted models in a container or a virtual machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
OPEN_FILES = 64


class TimedOut(Exception):
    """The program was killed because its time was up."""


def run_untrusted(program: str, *, seconds: float) -> subprocess.CompletedProcess:
    """Run a program's text; its output is cut to what fits into a file of FILE_BYTES.

    Args:
        program: Python source.
        seconds: of wall-clock time, and of processor time rounded up, before it is killed.

    Returns:
        The finished process with `returncode` and the end of `stderr`.

    Raises:
        TimedOut: it took longer.
        NotImplementedError: the system has no resource limits.
    """
    if resource is None:
        raise NotImplementedError("Code is executed under resource limits only, which this system does not have.")
    with tempfile.TemporaryDirectory(prefix="untrusted-") as folder:
        source = Path(folder) / "program.py"
        source.write_text(program, encoding="utf-8")
        with (Path(folder) / "stderr.txt").open("w+b") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(source)],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                preexec_fn=lambda: _limit(int(seconds) + 1),
            )
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                raise TimedOut(f"The program was killed after {seconds} s.") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
                process.wait()
            errors.seek(0)
            said = errors.read().decode("utf-8", errors="replace")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout="", stderr=said[-2000:])


def _limit(processor_seconds: int) -> None:
    for kind, value in (
        (resource.RLIMIT_CPU, processor_seconds),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
