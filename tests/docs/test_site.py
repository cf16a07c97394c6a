"""The site builds strictly and offline, holds every page and every public name, and works in a browser."""

import ast
import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="needs the extra docs: pip install '.[docs]'",
)
needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or not any(map(shutil.which, BROWSERS)),
    reason="needs the extra docs and a browser: pip install '.[docs]', and Debian's package chromium",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site; a broken link or anchor fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # a proxy that is not there: whatever would be fetched fails
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": ""}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def hook(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def nav_pages() -> list[str]:
    """The pages that mkdocs.yml puts into the navigation."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]

    return leaves(config["nav"])


def public_names(module: str, path: Path) -> list[str]:
    """Full names of the classes and functions of a module, and of the classes' methods, that begin without `_`."""
    found = []

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
                found.append(f"{prefix}.{child.name}")
                if isinstance(child, ast.ClassDef):
                    collect(child, found[-1])

    collect(ast.parse(path.read_text(encoding="utf-8")), module)
    return found


def test_every_page_is_in_the_navigation():
    missing = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - set(nav_pages())
    assert missing == set(), "add each to nav in mkdocs.yml"


@needs_mkdocs
@pytest.mark.parametrize(
    ("page", "link", "target"),
    [
        ("performance.md", "../benchmarks/results/x/README.md", "benchmarks/results/x/README.md"),
        ("performance.md", "scaling.md", "docs/scaling.md"),
        ("benchmarks/results/cpu-float32/README.md", "speed.svg", "benchmarks/results/cpu-float32/speed.svg"),
        ("CONTRIBUTING.md", "docs/performance.md", "docs/performance.md"),
        ("peft/README.md", "../CONTRIBUTING.md", "CONTRIBUTING.md"),
    ],
)
def test_a_link_means_on_the_site_what_it_means_in_the_repository(page, link, target):
    assert hook("linked_files")._in_repository(page, link) == target


@needs_mkdocs
def test_every_module_has_a_page_of_the_reference():
    reference = hook("reference_pages")
    covered = {name for part in reference.PARTS for name in reference.modules_of(part)}
    for package in ("dylo_moe", "moe_common", "moe_ext", "peft/src/peft/tuners/moe_lora"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("peft.src.")
            assert module.endswith("__main__") or module.removesuffix(".__init__") in covered
    assert "peft.tuners.lora.moe_router" in covered


@needs_mkdocs
def test_the_reference_shows_no_constant_and_no_link_of_another_generator(site):
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html")}
    assert not [name for name, text in pages.items() if re.search(r'<h2 id="[\w.]*\.[A-Z][A-Z0-9_]+"', text)]
    assert not [name for name, text in pages.items() if re.search(r"\[<code>[^<]*</code>\]", text)]
    assert "<code>RouterConfig</code>" in pages["peft.tuners.lora.moe_router"]


@needs_mkdocs
def test_every_public_name_is_in_the_reference(site):
    _, _, _, _, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    listed = {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode().splitlines()}
    reference = hook("reference_pages")
    expected = []
    for part, (folder, _) in reference.PARTS.items():
        for module in reference.modules_of(part):
            path = ROOT / folder / module.replace(".", "/")
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            expected += public_names(module, path)
    assert len(expected) > 300
    assert sorted(set(expected) - listed) == []


@needs_mkdocs
def test_the_help_of_an_option_is_its_text_in_the_reference(site):
    page = (site / "reference" / "dylo_moe.training.adapters.html").read_text(encoding="utf-8")
    assert "Each expert's update is scaled by lora_alpha / lora_r." in page.replace("&#39;", "'")


@needs_mkdocs
def test_files_that_pages_link_to_are_on_the_site(site):
    performance = (site / "performance.html").read_text(encoding="utf-8")
    for link in ("benchmarks/results/cpu-float32/index.html", "benchmarks/results/cpu-float32/speed.svg"):
        assert f'"{link}"' in performance and (site / link).is_file()
    example = re.sub("<[^>]+>", "", (site / "examples" / "train_mixture.py.html").read_text(encoding="utf-8"))
    assert "peft_config=mixture" in example


@pytest.fixture(scope="module")
def address(site):
    """Where a server of this machine has the site."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def page(address):
    """A page of headless Chromium that notes what went wrong: `faults`, errors and requests to anywhere else."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, BROWSERS)))
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.faults = []
        page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("response", lambda got: page.faults.append(f"{got.status} {got.url}") if got.status >= 400 else None)
        page.on(
            "request", lambda sent: None if sent.url.startswith((address, "data:")) else page.faults.append(sent.url)
        )
        yield page
        browser.close()


def open_all(page, address: str, names: list[str]) -> None:
    for name in names:
        page.goto(f"{address}/{name}", wait_until="load")
        assert page.locator("h1").first.inner_text().strip(), name
        assert page.faults == [], name


@needs_mkdocs
@needs_browser
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_written_page_opens_without_an_error_or_a_request_elsewhere(page, address):
    names = [name.replace("README.md", "index.md") for name in nav_pages()]  # as mkdocs does
    open_all(page, address, [f"{name.removesuffix('.md')}.html" for name in names])


@needs_mkdocs
@needs_browser
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_page_of_the_reference_opens(page, address, site):
    names = sorted(path.relative_to(site).as_posix() for path in (site / "reference").glob("*.html"))
    assert len(names) > 50
    open_all(page, address, names)


@needs_mkdocs
@needs_browser
def test_navigation_and_search_lead_to_pages(page, address):
    page.goto(f"{address}/index.html")
    page.locator("nav.md-nav--primary").get_by_role("link", name="Serving", exact=True).click()
    page.wait_for_url("**/serving.html")
    assert page.locator("h1").first.inner_text().startswith("Serving a mixture")
    page.keyboard.press("/")
    page.keyboard.type("freeze_routing", delay=10)
    found = page.locator(".md-search-result__item a").first
    found.wait_for()
    found.click()
    page.wait_for_load_state("load")
    assert "freeze_routing" in page.inner_text("article")
    assert page.faults == []
