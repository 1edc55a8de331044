"""The documentation site: it builds without a warning, its links lead somewhere, it has every name."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import typer.main

import int8fx
from int8fx.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STEPS = re.compile(r"<ol>.*?</ol>", re.DOTALL)


class Links(HTMLParser):
    """What a page links to, and what may be linked to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.outside: list[str] = []
        self.source = page.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {given["id"]} if given.get("id") else set()
        target = given.get("href") if tag in ("a", "link") else given.get("src")
        if target and not target.startswith(("http:", "https:", "mailto:", "data:")):
            self.links.append(target)
        elif target and tag != "a" and target.startswith("http") and given.get("rel") != "canonical":
            self.outside.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason=f"the site needs {name}: pip install 'int8fx[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.relative_to(folder): Links(path) for path in folder.rglob("*.html")}


def test_every_link_leads_to_a_page_and_a_place_in_it(site):
    missing = []
    for page, found in site.items():
        for link in found.links:
            target, anchor = urldefrag(link)
            path = os.path.normpath(page.parent / unquote(target)) if target else str(page)
            there = Path(path) / "index.html" if target.endswith(("/", ".", "..")) else Path(path)
            if there.suffix in ("", ".html") and not _is_there(site.get(there), anchor):
                missing.append(f"{page}: {link}")
    # Its links begin at the root of a server.
    assert [each for each in missing if not each.startswith("404.html")] == []


def _is_there(page: Links | None, anchor: str) -> bool:
    return page is not None and (not anchor or anchor in page.anchors)


def test_a_page_fetches_nothing_from_elsewhere(site):
    assert {page: found.outside for page, found in site.items() if found.outside} == {}


def test_steps_are_numbered_through(site):
    """What stands between two steps without its four spaces begins the numbers anew."""
    lists = [found for each in site.values() for found in STEPS.findall(each.source)]
    assert len(lists) >= 3
    assert [steps for steps in lists if steps.count("<li>") == 1] == []


def test_every_page_says_at_the_top_that_no_gpu_has_run_it(site):
    override = (DOCS / "site" / "overrides" / "main.html").read_text()
    assert "No GPU has run int8fx yet" in override and "announce" in override


def test_the_reference_has_every_public_name(site):
    written = (DOCS / "api.md").read_text()
    named = set(re.findall(r"^::: int8fx\.(\w+)$", written, re.MULTILINE))
    # The table has a section in words, and a second name of a class a sentence.
    assert named | {"SCHEMES", "Int8Weight"} == set(int8fx.__all__)
    assert {f"int8fx.{name}" for name in named} <= site[Path("api/index.html")].anchors


def test_the_command_line_has_every_command(site):
    anchors = site[Path("cli/index.html")].anchors
    assert {f"int8fx-{name}" for name in typer.main.get_command(app).commands} <= anchors


def test_every_page_of_the_guide_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}\n" not in listed] == []
