"""Every Python block of the READMEs and the guide runs, page by page, on a toy in the model's place.

A page is one program. Where a page does not load the model, what it prints is compared with the block
that follows.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from int8fx import SCHEMES
from int8fx.testing import toy_llama

ROOT = Path(__file__).parents[1]
FOLDERS = ("passes", "kernels", "tests")
PAGES = [
    ROOT / "README.md",
    *(ROOT / name / "README.md" for name in FOLDERS if (ROOT / name / "README.md").exists()),
    *sorted((ROOT / "docs").glob("*.md")),
]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Characters of a column of the site at 1200 pixels and more (docs/site/overrides/main.html).
WIDEST = 105
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A directory that transformers loads a model and a tokenizer from."""
    folder = tmp_path_factory.mktemp("toy")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048}
    toy_llama.tiny(vocab_size=64, **sizes).save_pretrained(folder)
    toy_llama.words().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page, toy, tmp_path):
    blocks = BLOCK.findall(page.read_text())
    code = "\n".join(text for kind, text in blocks if kind == "python")
    if not code:
        pytest.skip("no Python in it")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace(MODEL, str(toy))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    follows = itertools.pairwise(blocks)
    shown = [text for (before, _), (kind, text) in follows if (before, kind) == ("python", "")]
    if MODEL not in code:
        assert run.stdout == "".join(shown)


WRITTEN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_of_code_is_wider_than_its_column(page):
    code = "\n".join(text for _, text in BLOCK.findall(page.read_text()))
    assert [line for line in code.splitlines() if len(line) > WIDEST] == []


@pytest.mark.parametrize("page", WRITTEN)
def test_links_to_files_that_are_there(page):
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_of_refusals_names_the_schemes_without_a_product_for_experts():
    lines = (ROOT / "docs" / "refused.md").read_text().splitlines()
    (line,) = (line for line in lines if "has no product for experts" in line)
    without = [each.name for each in SCHEMES.values() if not (each.experts or each.each_expert)]
    assert re.findall(r"`([\w.-]+)`", line.rpartition(" | ")[2]) == without
