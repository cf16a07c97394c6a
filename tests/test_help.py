"""`--help` of every command: a line an option, its default in it, and an example at the end."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "dylo_moe", "moe_common", "moe_ext")
KIND = r" (?:[A-Z][A-Z=_]*|\{[^}]*\})(?: \[[A-Z]+ \.\.\.\]| \.\.\.)?"
OPTION = re.compile(rf"^  (?:--?\w[\w-]*(?:{KIND})?(?:, )?)+(?:  +(?P<text>\S.*))?$")
LONGEST = 160  # characters of a line


def commands() -> list[Path]:
    """Every file that is run, rather than imported."""
    folders = [ROOT / name for name in (*PACKAGES, "examples", "scripts")]
    files = [
        *ROOT.glob("*.py"),
        *(ROOT / "peft").glob("*.py"),
        *(f for folder in folders for f in folder.rglob("*.py")),
    ]
    return sorted(file for file in files if '__name__ == "__main__"' in file.read_text(encoding="utf-8"))


def main_of(path: Path):
    """The function that a command runs."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] in PACKAGES:
        return importlib.import_module(".".join(relative.with_suffix("").parts)).main
    specification = importlib.util.spec_from_file_location(f"command_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module.main


def helps(path: Path, monkeypatch, capsys) -> dict[str, str]:
    """What a command and each of its subcommands answer to --help."""
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [path.name])
    monkeypatch.setenv("COLUMNS", "100")
    main = main_of(path)

    def ask(*words: str) -> str:
        try:
            code = main([*words, "--help"])
        except SystemExit as stopped:
            code = stopped.code
        assert code in (0, None)
        return capsys.readouterr().out

    found = {"": ask()}
    for name in subcommands(found[""]):
        found[name] = ask(*name.split())
    return found


def subcommands(text: str) -> list[str]:
    """The subcommands that a help lists: `usage: name {a,b} ...`, or argparse's own list of them."""
    listed = re.match(r"usage: (?:python -m )?[\w.]+ \{([^}]+)\}", text)
    if listed:
        return listed[1].split(",")
    return re.findall(r"^    ([a-z]+)  ", text, flags=re.M) if " COMMAND ..." in text else []


@pytest.mark.parametrize("path", commands(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_help_is_a_line_an_option_and_ends_with_an_example(path, monkeypatch, capsys):
    for name, text in helps(path, monkeypatch, capsys).items():
        if not name and subcommands(text):
            assert all(command in text for command in subcommands(text))
            continue
        for fault in faults(text):
            pytest.fail(f"{path.name} {name} --help: {fault}")


def faults(text: str) -> list[str]:
    """What is wrong with a help, one line each."""
    _, _, rest = text.partition("\noptions:\n")
    options, _, examples = rest.partition("\n\n")
    if not rest:
        return ["it lists no options"]
    found = []
    for line in options.splitlines():
        option = OPTION.match(line)
        if option is None:
            found.append(f"not an option on one line: {line!r}")
        elif not option["text"]:
            found.append(f"an option without a word: {line!r}")
        elif len(line) > LONGEST:
            found.append(f"{len(line)} characters: {line!r}")
    if not re.match(r"examples?:", examples):
        found.append(f"no example at the end, but {examples[-60:]!r}")
    return found


def test_commands_are_found():
    found = {path.relative_to(ROOT).as_posix() for path in commands()}
    assert {"train.py", "peft/fork.py", "benchmarks/__main__.py", "moe_ext/multi_token/__main__.py"} <= found


GOOD = "usage: x\n\nDoes it.\n\noptions:\n  -h, --help  show\n  --size N    How many. [3]\n\nexample:\nx --size 3\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD.replace("How many. [3]", "How\n              many. [3]"), "not an option on one line"),
        (GOOD.replace("    How many. [3]", ""), "an option without a word"),
        (GOOD.replace("example:\nx --size 3\n", ""), "no example at the end"),
        (GOOD.replace("How many.", "How many." * 30), "characters"),
    ],
)
def test_a_help_that_lacks_something_is_found(text, fault):
    assert faults(GOOD) == []
    assert [fault in found for found in faults(text)] == [True]
