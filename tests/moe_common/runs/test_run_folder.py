"""A run's folder: who may write there, what is the same run, and what is measured once."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from moe_common.runs.folder_lock import FolderBusyError
from moe_common.runs.run_folder import RunFolder

SETTINGS = {"text": {"name": "prose", "rows": 4}, "seed": 0}


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def begun(folder, settings=SETTINGS, **how):
    """A run that was interrupted after one measurement."""
    with RunFolder(folder, "grow", settings, **how) as run:
        run.measured("loss", lambda: 2.5)
    return run


def test_making_one_writes_nothing(tmp_path):
    RunFolder(tmp_path / "deep" / "run", "grow", SETTINGS)
    RunFolder.beside(tmp_path / "out.json", "grow", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_the_same_settings_continue_and_measure_nothing_twice(tmp_path):
    begun(tmp_path / "run")
    with RunFolder(tmp_path / "run", "grow", SETTINGS) as run:
        assert run.measured("loss", lambda: pytest.fail("measured again")) == 2.5
        assert run.measured("loss of a/b:c", lambda: {"of": (1, 2)}) == {"of": [1, 2]}  # as JSON holds it
    names = files(tmp_path / "run")
    assert names[0] == "measured/loss.json" and names[-1] == "run.json" and len(names) == 3


def test_other_settings_are_refused_by_name_and_free_ones_are_not(tmp_path):
    begun(tmp_path / "run")
    other = {"text": {"name": "code", "rows": 4}, "seed": 1}
    RunFolder(tmp_path / "run", "grow", {**SETTINGS, "seed": 1}, free=("seed",))
    with pytest.raises(
        ValueError, match=r"name \(prose there, code asked for\); seed \(0 there, 1 asked for\).*--out"
    ):
        RunFolder(tmp_path / "run", "grow", other, option="--out")
    with pytest.raises(ValueError, match="'grow', but this is 'shrink'"):
        RunFolder(tmp_path / "run", "shrink", SETTINGS)
    RunFolder(tmp_path / "run", "grow", other, starts_again=True)


def test_what_reading_finds_is_part_of_the_run(tmp_path):
    run = RunFolder(tmp_path / "run", "grow", SETTINGS)
    run.know(weights=1)
    with run:
        run.measured("loss", lambda: 2.5)
    with pytest.raises(ValueError, match=r"weights \(1 there, 2 asked for\)"):
        RunFolder(tmp_path / "run", "grow", SETTINGS).know(weights=2)


@pytest.mark.parametrize("held", ["", "{", "[]", "[" * 100_000, '{"settings": 3}', '"run"'])
def test_a_note_that_is_no_note_is_refused_by_name(tmp_path, held):
    (tmp_path / "run.json").write_text(held)
    with pytest.raises(ValueError, match="run.json"):
        RunFolder(tmp_path, "grow", SETTINGS)


def test_a_file_and_a_folder_of_something_else_are_refused_and_kept(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file"):
        RunFolder(tmp_path / "notes", "grow", SETTINGS)
    with pytest.raises(ValueError, match="something else than a run"):
        RunFolder(tmp_path, "grow", SETTINGS)
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("name", ["n" * 300, "loop/run", "notes/run", "n" * 250])
def test_a_place_that_cannot_be_is_refused_at_once(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "notes").write_text("mine")
    for make in (RunFolder, RunFolder.beside):
        with pytest.raises(OSError, match=r"too long|Too many levels|Not a directory"):
            make(tmp_path / name, "grow", SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "notes"]


def test_a_run_that_failed_before_it_kept_anything_leaves_nothing(tmp_path):
    def make_folders(run):
        (run.folder / "checkpoints").mkdir()
        raise ValueError("seed is -1")

    with pytest.raises(ValueError, match="seed"), RunFolder(tmp_path / "a" / "run", "grow", {"seed": -1}) as run:
        make_folders(run)
    assert not list(tmp_path.iterdir())
    with RunFolder(tmp_path / "a" / "run", "grow", {"seed": 0}):
        pass
    assert files(tmp_path) == ["a/run/run.json"]


def test_a_failure_that_leaves_nothing_leaves_what_others_wrote_beside_it(tmp_path):
    mine = RunFolder(tmp_path / "runs" / "mine", "grow", SETTINGS)
    mine.__enter__()
    begun(tmp_path / "runs" / "theirs")
    mine.__exit__(ValueError)
    assert not (tmp_path / "runs" / "mine").exists()
    assert (tmp_path / "runs" / "theirs" / "run.json").exists()


def test_a_number_that_is_not_finite_is_refused_with_its_place(tmp_path):
    with (
        pytest.raises(ValueError, match=r"found\.prose\.1 is nan"),
        RunFolder(tmp_path / "run", "grow", SETTINGS) as run,
    ):
        run.measured("loss", lambda: {"prose": [1.0, float("nan")]})
    assert not (tmp_path / "run").exists()


# -- one at a time ---------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from moe_common.runs.run_folder import RunFolder
with RunFolder(sys.argv[1], "grow", {settings}) as run:
    run.measured("loss", lambda: 2.5)
    (run.folder / f"a.{{__import__('os').getpid()}}.partial").write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run, and has half a file there."""
    script = textwrap.dedent(HOLDER).format(settings=SETTINGS)
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_while_the_first_lives_and_goes_on_when_it_was_killed(tmp_path, holder):
    before = files(tmp_path / "run")
    with pytest.raises(FolderBusyError, match=f"run is being written by another run.*{holder.pid}"):
        RunFolder(tmp_path / "run", "grow", SETTINGS)
    assert files(tmp_path / "run") == before and ".lock" in before
    RunFolder(tmp_path / "run", "grow", SETTINGS, writes=False)  # of the same run, as torchrun starts them
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path / "run", "grow", SETTINGS) as run:
        assert run.measured("loss", lambda: pytest.fail("measured again")) == 2.5
        assert files(tmp_path / "run") == [".lock", "measured/loss.json", "run.json"]  # half a file is swept
    assert files(tmp_path / "run") == ["measured/loss.json", "run.json"]


def test_of_two_that_looked_at_the_same_time_one_gets_the_folder(tmp_path):
    first, second = (RunFolder(tmp_path / "run", "grow", SETTINGS) for _ in range(2))
    with first:
        with pytest.raises(FolderBusyError), second:
            pass
        assert (tmp_path / "run" / "run.json").exists()
    other = RunFolder(tmp_path / "run", "grow", {**SETTINGS, "seed": 1}, starts_again=True)
    with other:
        other.measured("loss", lambda: 1.0)
    with pytest.raises(ValueError, match="seed"), second:
        pass


# -- results that appear whole ----------------------------------------------------------------------------------------


def test_a_result_appears_when_all_is_done_and_then_the_same_command_finds_it(tmp_path):
    run = RunFolder.beside(tmp_path / "study", "grow", SETTINGS)
    assert not run.is_done
    with run:
        run.measured("loss", lambda: 2.5)
        assert (tmp_path / "study.unfinished").is_dir()
        with run.whole_result() as folder:
            (folder / "report.html").write_text("found")
    assert files(tmp_path) == ["study/report.html", "study/run.json"]
    assert RunFolder.beside(tmp_path / "study", "grow", SETTINGS).is_done
    with pytest.raises(ValueError, match="seed"):
        RunFolder.beside(tmp_path / "study", "grow", {**SETTINGS, "seed": 1})


def test_a_result_in_a_file_says_of_which_run_it_is(tmp_path):
    with RunFolder.beside(tmp_path / "out.json", "grow", SETTINGS) as run:
        run.write_result({"loss": 2.5})
    held = json.loads((tmp_path / "out.json").read_text())
    assert held == {"loss": 2.5, "run": {"command": "grow", "settings": SETTINGS}}
    assert RunFolder.beside(tmp_path / "out.json", "grow", SETTINGS).is_done
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("held", [b"weights", b"{}", b"[1]", b'{"r": 8}', b"\xff\xfe", b'{"run": 3}'])
def test_a_file_of_something_else_is_never_taken_for_a_result(tmp_path, held):
    (tmp_path / "adapter_config.json").write_bytes(held)
    with pytest.raises(FileExistsError, match="adapter_config.json is there already"):
        RunFolder.beside(tmp_path / "adapter_config.json", "grow", SETTINGS)
    assert (tmp_path / "adapter_config.json").read_bytes() == held


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="may not be written"):
        RunFolder(tmp_path / "theirs" / "run", "grow", SETTINGS)
