"""What a program in the sandbox may not do, and that it leaves nothing behind."""

import sys
import tempfile
import time
from pathlib import Path

import pytest

from dylo_moe.evaluate.sandbox import TimedOut, run_untrusted

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
SECONDS = 20.0  # enough for a Python to start on a busy machine


def test_a_program_runs_and_its_exit_code_comes_back():
    assert run_untrusted("raise SystemExit(7)", seconds=SECONDS).returncode == 7


def test_what_it_says_on_stderr_comes_back():
    assert "ZeroDivisionError" in run_untrusted("1 / 0", seconds=SECONDS).stderr


def test_one_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    trace = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(trace)!r}, 'w')"
    program = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    start = time.monotonic()
    with pytest.raises(TimedOut, match=r"killed.*\b1\.5 s"):
        run_untrusted(program, seconds=1.5)
    assert time.monotonic() - start < 10
    time.sleep(3)
    assert not trace.exists()


def test_it_sees_an_empty_environment_and_an_empty_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "swordfish")
    program = (
        "import os, sys\n"
        "given = ('PATH', 'HOME', 'TMPDIR', 'OMP_NUM_THREADS', 'LC_CTYPE')\n"
        "found = [name for name in os.environ if name not in given]\n"
        "sys.exit(str([found, sorted(os.listdir()), os.environ['HOME'] == os.getcwd()]))"
    )
    assert run_untrusted(program, seconds=SECONDS).stderr.strip() == "[[], ['program.py', 'stderr.txt'], True]"


def test_it_gets_no_more_memory_than_is_set():
    assert "MemoryError" in run_untrusted("x = bytearray(3 << 30)", seconds=SECONDS).stderr


def test_it_writes_no_large_files():
    done = run_untrusted("open('big', 'wb').write(bytes(5 << 20))", seconds=SECONDS)
    assert done.returncode != 0


def test_nothing_stays_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_untrusted("open('left', 'w').write('x')", seconds=SECONDS)
    assert list(Path(tmp_path).iterdir()) == []
