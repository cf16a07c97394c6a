"""A hook of mkdocs: a page of the API reference for each module, made from its docstrings."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TITLE = "API reference"
# Heading in the navigation, folder that its modules are imported from, and where they lie in it.
PARTS = {
    "peft: routed LoRA": ("peft/src", ["peft/tuners/moe_lora/*.py", "peft/tuners/lora/moe_*.py"]),
    "dylo_moe": (".", ["dylo_moe/**/*.py"]),
    "moe_common": (".", ["moe_common/**/*.py"]),
    "moe_ext": (".", ["moe_ext/**/*.py"]),
}


def modules_of(part: str) -> list[str]:
    """Dotted names of the modules of a part, packages before what lies in them; commands' `__main__` are left out."""
    folder, patterns = PARTS[part]
    paths = {path.relative_to(ROOT / folder) for pattern in patterns for path in (ROOT / folder).glob(pattern)}
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return sorted(name for name in names if not name.endswith("__main__"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference at the end of the navigation."""
    parts = [{part: [{_short(name): _page(name)} for name in modules_of(part)]} for part in PARTS]
    config.nav = [entry for entry in config.nav if TITLE not in entry] + [{TITLE: parts}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for part in PARTS:
        for name in modules_of(part):
            text = f"---\ntitle: {name}\n---\n\n::: {name}\n"
            files.append(File.generated(config, _page(name), content=text))
    return files


def _page(name: str) -> str:
    return f"reference/{name}.md"


def _short(name: str) -> str:
    return name.removeprefix("peft.tuners.")
