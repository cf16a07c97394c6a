"""`--help` of every command says of each option what it is, in which unit and by default, and ends with an example."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "dylo_moe", "moe_common", "moe_ext")
KIND = r" (?:[A-Z][A-Z=_]*|\{[^}]*\})(?: \[[A-Z]+ \.\.\.\]| \.\.\.)?"
OPTION = re.compile(rf"  ((?:--?\w[\w-]*(?:{KIND})?(?:, )?)+)(?:\s{{2,}}(\S.*))?", flags=re.DOTALL)
NUMBER = re.compile(r" [NX]\b")
# What a value may not begin with: a verb or a question tells what happens, and not what the value is.
NO_NOUN = {"Also", "As", "At", "Change", "How", "In", "Measure", "Of", "On", "Only", "Run", "Stop", "Study", "Train"}
NO_NOUN |= {"What", "Where", "Which", "Write"}
# What the help of a number says that is called so, for it has no meaning without.
UNITS = {
    r"_mb$": "MiB",
    r"_gb$": "GiB",
    r"_bits$": "Bits",
    r"_minutes$": "Minutes",
    r"_subset$": "Percent",
    r"_epochs$|^--epochs$": "Passes|Times",
    r"_steps$": "[Ss]tep",
    r"_blocks$": "[Bb]locks|[Rr]ows",
    r"_tokens$|_length$|^--seqlen$": "[Tt]okens",
    r"batch_size$": "Rows|Blocks",
}


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
def test_help_tells_of_each_option_and_ends_with_an_example(path, monkeypatch, capsys):
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
    for entry in re.split(r"\n(?=  -)", options):
        option = OPTION.fullmatch(entry)
        if option is None:
            found.append(f"not an option: {entry!r}")
        elif not option[2]:
            found.append(f"an option without a word: {entry!r}")
        elif "[--option value ...]" in text and "--help" not in option[1]:  # made of a dataclass
            found += field_faults(option[1], option[2])
    if not re.match(r"examples?:", examples):
        found.append(f"no example at the end, but {examples[-60:]!r}")
    return found


def field_faults(option: str, said: str) -> list[str]:
    """What the help of a dataclass's field lacks; `option` is its flag and what it takes."""
    name, first = option.split()[0], said.split()[0]
    found = []
    if not first[0].isupper():
        found.append(f"{name} begins in lower case: {said!r}")
    if " " in option and first in NO_NOUN and ", --no_" not in option:
        found.append(f"{name} takes a value and begins with no noun: {said!r}")
    if NUMBER.search(option):
        if not re.search(r"\[[^]]+\]$|[Dd]efault|in place of", said):
            found.append(f"{name} has no default: {said!r}")
        for ending, unit in UNITS.items():
            if re.search(ending, name) and not re.search(unit, said):
                found.append(f"{name} has no unit ({unit}): {said!r}")
    return found


def test_commands_are_found():
    found = {path.relative_to(ROOT).as_posix() for path in commands()}
    assert {"train.py", "peft/fork.py", "benchmarks/__main__.py", "moe_ext/multi_token/__main__.py"} <= found


GOOD = """usage: x [--option value ...]

Does it.

options:
  -h, --help   show
  --max_tokens N  Tokens of
               a row. [3]

example:
x --max_tokens 3
"""


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        ("  Tokens of\n               a row. [3]", "", "without a word"),
        ("Tokens", "tokens", "lower case"),
        ("Tokens", "How many tokens", "noun"),
        ("Tokens", "Length", "unit"),
        (" [3]", "", "default"),
        ("example:\nx --max_tokens 3\n", "", "no example at the end"),
    ],
)
def test_a_help_that_lacks_something_is_found(right, wrong, fault):
    assert faults(GOOD) == []
    assert [fault in found for found in faults(GOOD.replace(right, wrong))] == [True]
