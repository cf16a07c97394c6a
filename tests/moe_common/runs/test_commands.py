"""Commands: which one is meant, what is printed, and how refusals, stops and errors end."""

import sys
import warnings
from dataclasses import dataclass, field

import pytest

from moe_common.runs.commands import Command, run_program
from moe_common.runs.downloads import DownloadError


@dataclass(kw_only=True)
class Options:
    size: int = field(default=3, metadata={"help": "How many."})

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size is {self.size}, but must be at least 0.\nGive another.")


def raises(error: BaseException):
    def work(_: Options) -> str:
        raise error

    return work


def warns(_: Options) -> None:
    for message in ("`is_gradient_checkpointing` is deprecated and will be removed", "water the roses"):
        warnings.warn(message, FutureWarning, stacklevel=1)


COMMANDS = {
    "grow tall": Command(Options, lambda options: f"tall {options.size}", "Grow upwards."),
    "--trim": Command(Options, lambda options: f"trimmed to {options.size}", "Cut.", keeps_memory=False),
    "rest": Command(Options, lambda options: None, "Say nothing."),
    "stop": Command(Options, raises(KeyboardInterrupt()), "Be stopped."),
    "fetch": Command(Options, raises(DownloadError("no network")), "Have no network."),
    "find": Command(Options, raises(FileNotFoundError("no file\nhere")), "Miss a file."),
    "write": Command(Options, raises(NotADirectoryError(20, "Not a directory", "notes.txt/run")), "Find no folder."),
    "warn": Command(Options, warns, "Warn twice."),
    "break": Command(Options, raises(TypeError("a fault of the program")), "Fail."),
}
NAMES = ", ".join(COMMANDS)


@pytest.fixture
def say(capsys):
    """A function that runs the program, and returns its exit code, output and error."""

    def run(*words):
        try:
            code = run_program("garden", COMMANDS, words)
        except SystemExit as left:
            code = left.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grow", "tall", "--size", "2"], "tall 2\n"),
        (["--trim"], "trimmed to 3\n"),
        (["--size", "1", "--trim"], "trimmed to 1\n"),
        (["rest"], ""),
    ],
)
def test_the_command_that_is_named_runs(say, words, said):
    assert say(*words) == (0, said, "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], f"garden: error: no command was given. Give one of {NAMES}.\n"),
        (["dig"], f"garden: error: 'dig' is no command. Give one of {NAMES}.\n"),
        (["rest", "--trim"], "garden: error: --trim and rest were given."),
        (["rest", "--size=-1"], "garden rest: error: size is -1, but must be at least 0. Give another.\n"),
        (["rest", "--sice=1"], "garden rest: error: Unknown option --sice=1. Closest: --size."),
        (["fetch"], "garden fetch: error: no network\n"),
        (["find"], "garden find: error: no file here\n"),
        (["write"], "garden write: error: [Errno 20] Not a directory: 'notes.txt/run'\n"),
    ],
)
def test_what_a_user_can_set_right_is_one_line_and_exit_code_2(say, words, told):
    code, out, error = say(*words)
    assert (code, out) == (2, "")
    assert error.startswith(told)
    assert error.count("\n") == 1


def test_a_stop_says_how_to_go_on(say):
    assert say("stop") == (
        130,
        "",
        "\nStopped. The same command goes on from what it has kept, unless it is told to begin anew.\n",
    )


def test_what_peft_asks_by_an_older_name_is_not_told_to_the_user(say, recwarn):
    assert say("warn") == (0, "", "")
    assert [str(warning.message) for warning in recwarn] == ["water the roses"]


def test_a_fault_of_the_program_keeps_its_traceback(say):
    with pytest.raises(TypeError, match="a fault of the program"):
        say("break")


def test_help_lists_the_commands_and_that_of_one_its_options(say, monkeypatch):
    code, out, _ = say("--help")
    assert code == 0
    assert "usage: garden {grow tall,--trim," in out
    assert "  grow tall  Grow upwards.\n  --trim     Cut.\n" in out
    code, out, _ = say("grow", "tall", "--help")
    assert code == 0
    assert "--size N" in out and "How many. [3]" in out
    monkeypatch.setattr(sys, "argv", ["garden", "rest"])
    assert run_program("garden", COMMANDS) == 0
