"""Every snippet and every command of README.md and docs/ is tested, or says which test does it.

A fenced block of Python is run by itself, in an empty folder. Of a block of commands, each line must be one that
`why_refused` knows how to check:

    make TARGET ...               the target stands in the Makefile
    python FILE ... , python -m M ...   run with --help added: its arguments are read, its options are known
    pip install PATH              the folder is a project and has the extras that are named

Whatever else it holds, a block is let through only below a line `<!-- tested-by: tests/test_x.py::test_name -->`, and
that test must be there. In a ```console block the commands are the lines that begin with `$ `, the rest is output.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[^\n]*)\n(?P<text>.*?)^ *(?P=ticks) *$", re.M | re.S
)
TESTED_BY = re.compile(r"<!-- tested-by: (?P<file>\S+?\.py)::(?P<test>\w+) -->\s*\Z")
COMMAND_LANGUAGES = ("bash", "console", "sh", "shell")
# Shown, never run: what a program prints, files and formulas.
OTHER_LANGUAGES = ("diff", "json", "math", "mermaid", "text", "toml", "yaml")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page, line: where its first fence stands.
        language: first word after the fence.
        text: what lies between the fences.
        tested_by: file and name of the test that the page names for it, or None.
    """

    page: Path
    line: int
    language: str
    text: str
    tested_by: tuple[str, str] | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()]
        named = TESTED_BY.search(before)
        content = re.sub(rf"^{fence['indent']}", "", fence["text"], flags=re.M)
        language = (fence["language"].split() or [""])[0]
        tested_by = (named["file"], named["test"]) if named else None
        found.append(Block(page, before.count("\n") + 1, language, content, tested_by))
    return found


def commands(block: Block) -> list[str]:
    """The command lines of a block, those broken by a backslash joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def why_refused(command: str, root: Path = ROOT) -> str | None:
    """Why this command line is not tested or does not work, or None when it was checked and holds."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError as unreadable:
        return f"{command!r}: {unreadable}"
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        del words[0]
    if not words or any(re.search(r"[|&;<>`]|\$\(", word) for word in words):
        return f"{command!r} is more than one plain command; name the test that runs it in a tested-by comment"
    program, *arguments = words
    if program == "make":
        return _why_make_refuses(arguments, root)
    if program in ("python", "python3", ".venv/bin/python"):
        return _why_python_refuses(arguments, root)
    if program in ("pip", ".venv/bin/pip") and arguments[:1] == ["install"]:
        return _why_pip_refuses(arguments[1:], root)
    return f"{command!r} is run by no test; name one in a tested-by comment"


def _why_make_refuses(arguments: list[str], root: Path) -> str | None:
    known = set(re.findall(r"^([\w.-]+)(?: [\w. -]+)?:(?!=)", (root / "Makefile").read_text(encoding="utf-8"), re.M))
    missing = [word for word in arguments if "=" not in word and word not in known]
    return f"the Makefile has no target {', '.join(missing)}" if missing else None


def _why_python_refuses(arguments: list[str], root: Path) -> str | None:
    line = shlex.join(["python", *arguments])
    if not arguments or arguments[0] == "-c":
        return f"{line!r}: make it a ```python block, or name its test in a tested-by comment"
    where = root / (arguments[1].replace(".", "/") if arguments[0] == "-m" and arguments[1:] else arguments[0])
    if not any(path.exists() for path in (where, where.with_suffix(".py"))):
        return f"{line!r} names a file or module that this repository does not hold"
    done = help_of(tuple(arguments), root)
    if done.returncode:
        return f"{line!r} does not read its arguments: {done.stderr.strip()[-300:]}"
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    if unknown := sorted(option for option in options if not re.search(rf"{re.escape(option)}(?![\w-])", done.stdout)):
        return f"{line!r}: --help does not know {', '.join(unknown)}"
    return None


@cache
def help_of(arguments: tuple[str, ...], root: Path) -> subprocess.CompletedProcess:
    """What the command answers when --help is added: a parser first reads, and so checks, the arguments before it."""
    return run_python([*arguments, "--help"], cwd=root)


def _why_pip_refuses(arguments: list[str], root: Path) -> str | None:
    for word in arguments:
        named = re.fullmatch(r"(?P<path>\.[\w./-]*)(\[(?P<extras>[\w,-]+)\])?", word)
        if named is None:
            if word in ("-e", "--editable"):
                continue
            return f"'pip install {word}' installs something else than a folder of this repository"
        project_file = root / named["path"] / "pyproject.toml"
        if not project_file.is_file():
            return f"'pip install {word}': {named['path']} is no project"
        project = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]
        wanted = set(filter(None, (named["extras"] or "").split(",")))
        if missing := wanted - project.get("optional-dependencies", {}).keys():
            return f"'pip install {word}': no extra {', '.join(sorted(missing))}"
    return None


def why_not_a_test(file: str, name: str, root: Path = ROOT) -> str | None:
    """Why file::name names no test, or None."""
    path = root / file
    if not path.is_file():
        return f"tested-by names {file}, which is not there"
    if not name.startswith("test_") or name not in defined_functions(path):
        return f"tested-by names {file}::{name}, and {file} has no such test"
    return None


def defined_functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def faults(block: Block, root: Path = ROOT) -> list[str]:
    """What is wrong with a block, but for Python, which `test_python_snippets_run` runs."""
    if block.tested_by:
        return [fault for fault in [why_not_a_test(*block.tested_by, root)] if fault]
    if block.language in COMMAND_LANGUAGES:
        if not commands(block):
            return ["no command"]
        return [fault for fault in (why_refused(line, root) for line in commands(block)) if fault]
    if block.language in ("python", *OTHER_LANGUAGES):
        return []
    return [f"the language {block.language!r} of a block is none of those that are tested or only shown"]


def run_python(arguments: list[str], *, cwd: Path) -> subprocess.CompletedProcess:
    """Run this Python without the hub, and with long lines, so that --help breaks no option in two."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL)


ALL_BLOCKS = [block for page in PAGES if page.is_file() for block in blocks(page)]


def test_there_is_a_readme_with_commands_and_python():
    languages = {block.language for block in ALL_BLOCKS if block.page == ROOT / "README.md"}
    assert "python" in languages
    assert languages & set(COMMAND_LANGUAGES)


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=str)
def test_every_command_is_tested(block):
    assert faults(block) == []


@pytest.mark.parametrize(
    "block", [block for block in ALL_BLOCKS if block.language == "python" and not block.tested_by], ids=str
)
def test_python_snippets_run(block, tmp_path):
    done = run_python(["-c", block.text], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def house(tmp_path) -> Path:
    """A small repository with a Makefile, a script, a project and a test."""
    (tmp_path / "Makefile").write_text("VENV := x\n\n.PHONY: demo hidden\ndemo: ready\n\techo\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\noptional-dependencies.eval = []\n')
    (tmp_path / "tool.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--size', type=int)\n"
        "parser.add_argument('--sizes')\nparser.parse_args()\nraise SystemExit('really ran')\n"
    )
    (tmp_path / "test_tool.py").write_text("def test_it():\n    pass\n")
    return tmp_path


def page_of(house: Path, text: str) -> list[str]:
    page = house / "page.md"
    page.write_text(text, encoding="utf-8")
    return [fault for block in blocks(page) for fault in faults(block, house)]


@pytest.mark.parametrize(
    "command",
    [
        "make demo",
        "make demo SIZE=3",
        "python tool.py",
        "SEED=1 python tool.py --size 3 --sizes=a,b   # a remark",
        "python -m tool --size 3",
        "pip install .",
        "pip install -e '.[eval]'",
    ],
)
def test_a_command_that_works_is_let_through(house, command):
    assert page_of(house, f"```bash\n{command}\n```\n") == []
    assert page_of(house, f"```console\n$ {command}\nprinted\n```\n") == []


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("make hidden", "no target hidden"),
        ("make VENV", "no target VENV"),
        ("python other.py", "does not hold"),
        ("python -m other", "does not hold"),
        ("python tool.py --size three", "invalid int value: 'three'"),
        ("python tool.py --colour red", "does not know --colour"),
        ("python tool.py --s 3", "ambiguous option: --s"),
        ("python -c 'print(1)'", "```python block"),
        ("pip install '.[study]'", "no extra study"),
        ("pip install ./other", "is no project"),
        ("pip install numpy", "something else than a folder"),
        ("curl example.org", "is run by no test"),
        ("make demo && rm -rf results", "more than one plain command"),
        ("echo 'half", "No closing quotation"),
    ],
)
def test_a_command_that_fails_or_is_not_tested_is_found(house, command, fault):
    for page in (f"```bash\n{command}\n```\n", f"1. First:\n\n   ```console\n   $ {command}\n   ```\n"):
        found = page_of(house, page)
        assert len(found) == 1
        assert fault in found[0]


def test_a_line_broken_by_a_backslash_is_one_command(house):
    assert page_of(house, "```bash\npython tool.py \\\n    --size 3\n```\n") == []
    assert "does not know --colour" in page_of(house, "```bash\npython tool.py \\\n    --colour 3\n```\n")[0]


def test_a_named_test_stands_in_for_a_command_and_must_be_there(house):
    block = "```bash\ncurl example.org\n```\n"
    assert page_of(house, f"<!-- tested-by: test_tool.py::test_it -->\n{block}") == []
    assert "has no such test" in page_of(house, f"<!-- tested-by: test_tool.py::test_that -->\n{block}")[0]
    assert "which is not there" in page_of(house, f"<!-- tested-by: test_other.py::test_it -->\n{block}")[0]
    assert "is run by no test" in page_of(house, f"<!-- tested-by: test_tool.py::test_it -->\nText.\n\n{block}")[0]


@pytest.mark.parametrize("fence", ["```", "```rust", "~~~"])
def test_a_block_of_no_known_language_is_refused(house, fence):
    assert "is none of those" in page_of(house, f"{fence}\nmake demo\n{fence[:3]}\n")[0]


def test_a_console_block_without_a_command_is_refused(house):
    assert page_of(house, "```console\nmake demo\n```\n") == ["no command"]
