"""Imports point one way, without a circle, and nothing imports a command.

    fork and moe_common <- dylo_moe <- scripts, and the same two <- each tool of moe_ext

Packages of others are declared in pyproject.toml where they are imported, and nowhere else.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("dylo_moe", "moe_common", "moe_ext")
# Front doors, as are the files at the top: they import the packages, and nothing imports them.
SCRIPT_FOLDERS = ("benchmarks", "examples", "scripts")
# Extras of a checkout, which no installed package needs.
TOOLS = ("dev", "docs", "upstream")
# Declared, but imported by no installed package.
NOT_IMPORTED = {
    "bitsandbytes": "transformers imports it for --quant",
    "tensorboard": "transformers imports it for --report_to",
    "trackio": "transformers imports it for --report_to",
    "trl": "trains the mixtures of whoever uses its trainers, as docs/quickstart.md does",
}
# Tools that are called, or plugins that are named in a file of settings.
USED_BY_NAME = {
    "mkdocs-material": "mkdocs.yml",
    "mkdocstrings": "mkdocs.yml",
    "pytest-benchmark": "plugin of pytest",
    "pytest-cov": "plugin of pytest",
    "pytest-timeout": "plugin of pytest",
    "pytest-xdist": "plugin of pytest",
    "ruff": "make lint",
    "setuptools": "builds the packages",
    "wheel": "builds the packages",
}
# Where a module is not called as its distribution.
DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "yaml": "pyyaml"}
IMPORT_FUNCTIONS = ("import_module", "__import__", "importorskip")


def layer_of(path: Path, root: Path = ROOT) -> str:
    """What a file belongs to: fork tool, fork, moe_common, dylo_moe, moe_ext, moe_ext.<tool> or script."""
    parts = path.relative_to(root).parts
    if parts[0] == "peft":
        return "fork" if parts[1] in ("src", "tests", "examples") else "fork tool"
    if parts[0] == "moe_ext" and len(parts) > 2:
        return f"moe_ext.{parts[1]}"
    return parts[0] if parts[0] in PACKAGES else "script"


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that this source imports, wherever in the file, relative ones resolved.

    Args:
        source: text of the file.
        package: dotted name of the package the file lies in; "" at the top.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function in IMPORT_FUNCTIONS and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def why_refused(layer: str, module: str, *, tools: set[str], scripts: set[str]) -> str | None:
    """The rule that an import of `module` in a file of `layer` breaks, or None.

    Args:
        layer: as `layer_of` gives it.
        module: full dotted name.
        tools: names of the tools of moe_ext.
        scripts: names of the modules that are scripts.
    """
    top, *below = module.split(".")
    if layer == "fork tool" and top in ("peft", *PACKAGES):
        return "the tool that builds the fork runs before anything is installed"
    if layer == "fork" and top in PACKAGES:
        return "the fork stands below everything of this project"
    if layer == "moe_common" and top in ("dylo_moe", "moe_ext"):
        return "the moe_common stands below dylo_moe and moe_ext"
    if layer == "dylo_moe" and top == "moe_ext":
        return "dylo_moe and moe_ext never import each other"
    if layer.startswith("moe_ext"):
        if top == "dylo_moe":
            return "dylo_moe and moe_ext never import each other"
        tool = below[0] if top == "moe_ext" and below else None
        if tool in tools and layer != f"moe_ext.{tool}":
            whose = "the tools of moe_ext never" if "." in layer else "what the tools share must not"
            return f"{whose} import a tool; move what both need to a module of moe_ext"
    if layer != "script" and top in scripts:
        return "nothing imports a script"
    return None


def faults(root: Path) -> list[str]:
    """One line for each import under `root` that points the wrong way."""
    tools = {folder.name for folder in (root / "moe_ext").glob("*/") if any(folder.glob("*.py"))}
    scripts = {path.stem for path in root.glob("*.py")} | set(SCRIPT_FOLDERS)
    found = []
    for path in source_files(root):
        layer = layer_of(path, root)
        folder = path.relative_to(root / "peft" / "src" if layer == "fork" and "src" in path.parts else root).parent
        for line, module in imported_modules(path.read_text(encoding="utf-8"), ".".join(folder.parts)):
            if reason := why_refused(layer, module, tools=tools, scripts=scripts):
                found.append(f"{path.relative_to(root)}:{line} imports {module}: {reason}")
    return found


def circles(root: Path) -> list[list[str]]:
    """The sets of files under `root` each of which imports, directly or not, all others of its set.

    Upstream's files, which import each other in circles, and what hangs among them are left out.
    """
    upstream = root / "peft" / "src"
    modules = {module_name(path, root): path for path in source_files(root) if upstream not in path.parents}
    imports = {
        name: {
            found
            for _, module in imported_modules(path.read_text(encoding="utf-8"), package_of(name, path))
            if (found := module_that_holds(module, modules)) not in (None, name)
        }
        for name, path in modules.items()
    }
    reached = {name: reachable(name, imports) for name in imports}
    tied = {name: frozenset(other for other in reached[name] if name in reached[other]) for name in imports}
    return sorted(sorted(group) for group in {group for group in tied.values() if len(group) > 1})


def module_name(path: Path, root: Path) -> str:
    """`moe_ext.moqe` for moe_ext/moqe/__init__.py, `fork_tool.check` for what stands beside the fork's tool."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "peft" and parts[1] not in ("src", "tests", "examples"):
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(name: str, path: Path) -> str:
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def module_that_holds(module: str, modules: dict[str, Path]) -> str | None:
    """The file that an import of `module` runs: itself, or the one that defines the name."""
    return next((name for name in (module, module.rpartition(".")[0]) if name in modules), None)


def reachable(name: str, imports: dict[str, set[str]]) -> set[str]:
    found, ahead = set(), [name]
    while ahead:
        for other in imports[ahead.pop()] - found:
            found.add(other)
            ahead.append(other)
    return found


def commands(root: Path) -> set[str]:
    """Modules that are run: those in a folder `commands`, a `command.py`, and each `__main__`."""
    return {
        module_name(path, root)
        for path in source_files(root)
        if path.relative_to(root).parts[0] in PACKAGES
        and (path.parent.name == "commands" or path.name in ("command.py", "__main__.py"))
        and path.name != "__init__.py"
    }


def imported_commands(root: Path) -> list[str]:
    """One line for each import of a command by anything but a `__main__`, a script at the top, or a test."""
    front_doors = commands(root)
    found = []
    for path in source_files(root):
        parts = path.relative_to(root).parts
        if "tests" in parts or path.name == "__main__.py" or len(parts) == 1:
            continue
        name = module_name(path, root)
        for line, module in imported_modules(path.read_text(encoding="utf-8"), package_of(name, path)):
            for held in {module, module.rpartition(".")[0]} & front_doors:
                found.append(f"{path.relative_to(root)}:{line} imports the command {held}; move what both need below")
    return found


def source_files(root: Path) -> list[Path]:
    """Our Python files, and the built tree of the fork where there is one."""
    folders = (*PACKAGES, "peft", "tests", *SCRIPT_FOLDERS)
    return sorted([*root.glob("*.py"), *(path for folder in folders for path in (root / folder).rglob("*.py"))])


def test_every_import_points_downwards():
    assert faults(ROOT) == []


def test_there_is_no_circle():
    assert circles(ROOT) == []


def test_nothing_imports_a_command():
    assert imported_commands(ROOT) == []


@pytest.mark.parametrize(
    "lines",
    [
        {"dylo_moe/a.py": "import dylo_moe.b", "dylo_moe/b.py": "from dylo_moe import a"},
        {"dylo_moe/a.py": "from .b import x", "dylo_moe/b.py": "def late():\n    from dylo_moe.a import y"},
        {
            "moe_common/a.py": "from . import b",
            "moe_common/b.py": "from . import c",
            "moe_common/c.py": "from .a import x",
        },
    ],
)
def test_a_circle_is_found(tmp_path, lines):
    make_house(tmp_path)
    for path, line in lines.items():
        write(tmp_path / path, line)
    assert circles(tmp_path) == [[path.removesuffix(".py").replace("/", ".") for path in lines]]


def test_an_import_of_a_command_is_found(tmp_path):
    make_house(tmp_path)
    write(tmp_path / "moe_ext/moqe/commands/run.py", "import torch")
    write(tmp_path / "moe_ext/moqe/__main__.py", "from moe_ext.moqe.commands.run import run")
    assert imported_commands(tmp_path) == []
    write(tmp_path / "moe_ext/moqe/blend.py", "from .commands import run")
    (found,) = imported_commands(tmp_path)
    assert found.startswith("moe_ext/moqe/blend.py:1 ") and "moe_ext.moqe.commands.run" in found


def test_the_files_that_are_checked_are_there():
    checked = {path.relative_to(ROOT).as_posix() for path in source_files(ROOT)}
    assert checked >= {
        "moe_common/text/documents.py",
        "dylo_moe/model.py",
        "moe_ext/__init__.py",
        "peft/fork.py",
        "train.py",
    }
    assert any(path.startswith("peft/src/peft/tuners/lora/moe_") for path in checked)


def test_the_packages_import_what_they_declare_and_declare_what_they_import():
    extras = project()["optional-dependencies"]
    declared = names_of([*project()["dependencies"], *(x for k, v in extras.items() if k not in TOOLS for x in v)])
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert imported_distributions(files) - declared == set(), "imported, but not declared"
    assert declared - imported_distributions(files) == NOT_IMPORTED.keys(), "declared, but not imported"


@pytest.mark.parametrize("extra", ["dev", "docs"])
def test_what_an_extra_of_tools_declares_is_used(extra):
    folders = ("docs", "peft/tests", "tests", *SCRIPT_FOLDERS)
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    unused = names_of(project()["optional-dependencies"][extra]) - imported_distributions(files)
    assert unused - USED_BY_NAME.keys() == set()


def test_a_dependency_that_is_declared_without_being_imported_is_found(tmp_path):
    (tmp_path / "a.py").write_text("import yaml, json\nfrom llama_cpp.llama import Llama\nfrom dylo_moe import x\n")
    assert imported_distributions([tmp_path / "a.py"]) == {"pyyaml", "llama-cpp-python"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imported_distributions(files: list[Path]) -> set[str]:
    """Canonical names of the distributions of other projects that these files import, wherever in the file."""
    modules = {
        module.split(".")[0]
        for path in files
        for _, module in imported_modules(path.read_text(encoding="utf-8"), path.parent.name)
    }
    others = modules - sys.stdlib_module_names - {*PACKAGES, *SCRIPT_FOLDERS}
    return {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in others}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("peft/src/peft/tuners/lora/moe_layer.py", "from dylo_moe.router import Router"),
        ("peft/src/peft/tuners/lora/moe_layer.py", "import moe_ext"),
        ("peft/src/peft/tuners/lora/moe_layer.py", "import moe_common"),
        ("peft/fork.py", "import peft"),
        ("moe_common/text/documents.py", "from dylo_moe.model import DyLoRA_MoE"),
        ("moe_common/text/documents.py", "import moe_ext"),
        ("dylo_moe/router.py", "from moe_ext.routers import find_routers"),
        ("dylo_moe/router.py", "import train"),
        ("dylo_moe/deep/router.py", "from benchmarks import test_speed"),
        ("moe_ext/moqe/blend.py", "from dylo_moe import router"),
        ("moe_ext/moqe/blend.py", "import moe_ext.router_ft.plan"),
        ("moe_ext/moqe/blend.py", "from moe_ext import router_ft"),
        ("moe_ext/moqe/blend.py", "from ..router_ft import plan"),
        ("moe_ext/moqe/blend.py", "from .. import router_ft"),
        ("moe_ext/moqe/blend.py", "def late():\n    from moe_ext.router_ft.plan import Plan"),
        ("moe_ext/moqe/blend.py", "import importlib\nimportlib.import_module('moe_ext.router_ft')"),
        ("moe_ext/routers.py", "from moe_ext.moqe import blend"),
        ("moe_ext/routers.py", "from .moqe.blend import blend"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_found(tmp_path, path, line):
    make_house(tmp_path)
    write(tmp_path / path, line)
    found = faults(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("dylo_moe/router.py", "import peft\nfrom peft.tuners.lora.moe_router import RouterConfig"),
        ("dylo_moe/router.py", "from . import experts\nfrom moe_common.text.documents import load_documents"),
        ("moe_ext/moqe/blend.py", "from . import __init__\nfrom moe_ext.moqe.formats import Int4"),
        ("moe_ext/moqe/blend.py", "from moe_ext import routers\nfrom ..routers import find_routers"),
        (
            "moe_ext/router_ft/plan.py",
            "from peft import LoraConfig\nfrom moe_common.text.documents import load_documents",
        ),
        ("moe_common/text/documents.py", "from moe_common.text.domains import DOMAINS"),
        ("scripts/train_base.py", "import moe_common.text.documents\nfrom moe_ext.moqe import blend"),
        ("peft/src/peft/tuners/lora/moe_layer.py", "from .layer import LoraLayer\nfrom peft.utils import other"),
    ],
)
def test_an_import_that_points_downwards_is_let_through(tmp_path, path, line):
    make_house(tmp_path)
    write(tmp_path / path, line)
    assert faults(tmp_path) == []


def make_house(root: Path) -> None:
    for path in (
        "train.py",
        "dylo_moe/experts.py",
        "moe_common/text/documents.py",
        "moe_ext/routers.py",
        "moe_ext/moqe/blend.py",
        "moe_ext/router_ft/b.py",
    ):
        write(root / path, "import torch")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
