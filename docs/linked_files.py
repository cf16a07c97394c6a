"""A hook of mkdocs: pages may link to any file of the repository, and the site takes those files in.

In docs/ a link is written for the repository's own view, `../examples/train_mixture.py`. On the site that file lies at
`examples/train_mixture.py`: Markdown becomes a page, a picture stays what it is, other text is shown as code. Files
that those pages link to follow, until all are there.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = "docs/"  # what the site has at its top
LINK = re.compile(r"(?P<before>\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.M | re.S)
PICTURES = {".svg", ".png"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to."""
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    named = [path for entry in _leaves(config.nav) if not (path := ROOT / PAGES / entry).is_file()]
    waiting += [added for path in named if (added := _add(path.relative_to(ROOT / PAGES).as_posix(), files, config))]
    while waiting:
        page = waiting.pop()
        for link in LINK.finditer(FENCE.sub("", page.content_string)):
            target = _in_repository(page.src_uri, link["path"])
            if target.startswith(PAGES) or (added := _add(target, files, config)) is None:
                continue
            if added.src_uri.endswith(".md"):
                waiting.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write each link as the site needs it."""

    def on_site(link: re.Match) -> str:
        target = _on_site(_in_repository(page.file.src_uri, link["path"]))
        if files.get_file_from_path(target) is None:
            return link[0]  # mkdocs says what is wrong with it
        relative = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{link['before']}{relative}{link['anchor'] or ''})"

    parts, end = [], 0
    for fence in [*FENCE.finditer(markdown), None]:
        start = fence.start() if fence else len(markdown)
        parts.append(LINK.sub(on_site, markdown[end:start]))
        if fence:
            parts.append(fence[0])
            end = fence.end()
    return "".join(parts)


def _add(target: str, files: Files, config: MkDocsConfig) -> File | None:
    """Take a file of the repository into the site, unless it is there or cannot be."""
    path, place = ROOT / target, _on_site(target)
    if not path.is_file() or files.get_file_from_path(place) is not None:
        return None
    if path.suffix in (".md", *PICTURES):
        file = File.generated(config, place, abs_src_path=str(path))
    else:
        language = {".py": "python", ".toml": "toml", ".yaml": "yaml"}.get(path.suffix, "text")
        text = path.read_text(encoding="utf-8")
        file = File.generated(config, place, content=f"# {path.name}\n\n`````{language}\n{text}`````\n")
    files.append(file)
    return file


def _in_repository(page: str, link: str) -> str:
    """Path from the repository's top of what a page links to."""
    outside = (ROOT / page).is_file() and not (ROOT / PAGES / page).is_file()
    folder = posixpath.dirname(page if outside else PAGES + page)
    return posixpath.normpath(posixpath.join(folder, link))


def _on_site(target: str) -> str:
    target = target.removeprefix(PAGES)
    return target if Path(target).suffix in (".md", *PICTURES) else f"{target}.md"


def _leaves(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav or []
    return [leaf for entry in entries for leaf in _leaves(entry)]
