"""The snippets of a page run in order, as a reader would paste them; a later one may use what an earlier one made."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
MARKED = re.compile(
    r"<!-- tested-by: tests/docs/test_snippets\.py::test_the_snippets_of_a_page_run_in_order -->\n```python\n(.*?)```",
    re.S,
)
SNIPPETS = {page.stem: MARKED.findall(page.read_text(encoding="utf-8")) for page in sorted(DOCS.glob("*.md"))}
PAGES = [name for name, snippets in SNIPPETS.items() if snippets]


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, snippet in enumerate(SNIPPETS[page], start=1):
        exec(compile(snippet, f"{page}.md, snippet {number}", "exec"), names)


def test_pages_have_snippets():
    assert {"quickstart", "routed_lora", "serving"} <= set(PAGES)
