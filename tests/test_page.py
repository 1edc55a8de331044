"""The page of ``explain --html`` in a browser: it sorts, fits a phone, and is read in the dark."""

import dataclasses
import html
import itertools
import json
import re
import shutil
import subprocess
from importlib.metadata import version

import pytest
import torch
from torch import nn

from int8fx.analysis.explain import explained

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytest.importorskip("matplotlib")
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")

# What a page answers is read from an attribute of its body.
ASK = "<script>document.body.dataset.answer = JSON.stringify((() => {{ {} }})());</script></body>"
ROWS = """
  const table = document.querySelectorAll("table")[1];
  const click = name => [...table.querySelectorAll("th")].find(th => th.textContent == name).click();
  const column = name => {
    const at = [...table.querySelectorAll("th")].findIndex(th => th.textContent == name);
    return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
  };
"""


@pytest.fixture(scope="module")
def shown():
    torch.manual_seed(0)
    sizes = [64, 128, 32, 256, 16]
    layers = [nn.Linear(K, N) for K, N in itertools.pairwise(sizes)]
    model = nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU())))
    options = {"skip": ["4"], "only": ["*"]}
    return explained(model, (torch.randn(8, 64),), {}, options, name="a <model>")


@pytest.fixture(scope="module")
def page(shown, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    shown.to_html(path)
    return path


def ask(page, script: str, *arguments: str):
    """What a script in the page returns."""
    asked = page.with_name("asked.html")
    asked.write_text(page.read_text().replace("</body>", ASK.format(script)))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *arguments, "--dump-dom"]
    done = subprocess.run(
        [*command, asked.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    return json.loads(html.unescape(re.search(r'data-answer="([^"]*)"', done.stdout)[1]))


def test_it_names_model_date_versions_and_options(shown, page):
    text = page.read_text()
    assert "<title>What int8fx does to a &lt;model&gt;</title>" in text
    for fact in (shown.date, f"torch {version('torch')}", html.escape(shown.options)):
        assert f"<dd>{fact}</dd>" in text or fact in text
    assert shown.options == "{'skip': ['4'], 'only': ['*']}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", shown.date)


def test_it_has_the_columns_of_the_terminal(shown, page):
    legend, heading = next(
        (before, line)
        for before, line in itertools.pairwise(str(shown).splitlines())
        if line.startswith("module ")
    )
    on_page = page.read_text()
    for column in heading.replace("N x K", "NxK").split():
        assert f"<th>{column.replace('NxK', 'N x K')}" in on_page, column
    assert legend.split("; ")[-1].strip() in on_page


@needs_browser
def test_a_click_sorts_and_another_turns_it_round(page):
    script = ROWS + 'click("N x K"); const down = column("module"); click("N x K");'
    script += 'const up = column("module"); click("scheme");'
    script += 'return [down, up, column("scheme"), table.querySelectorAll("[aria-sort]").length];'
    down, up, schemes, marked = ask(page, script)
    assert down == ["4", "0", "2", "6"]  # by N: 256, 128, 32, 16
    assert up == ["6", "2", "0", "4"]
    assert schemes == ["float", "llm.int8", "llm.int8", "llm.int8"] and marked == 1


@needs_browser
def test_a_row_is_read(shown, page):
    script = ROWS + 'return [column("module"), column("reason"), column("SQNR dB")];'
    modules, reasons, sqnr = ask(page, script)
    assert modules == [row.path for row in shown.rows]
    assert reasons[2] == "skip: matches '4'" and sqnr[2] == ""
    assert float(sqnr[0]) == pytest.approx(shown.rows[0].sqnr_db, abs=0.05)


@needs_browser
def test_it_fits_400_pixels(page):
    script = """
      document.body.style.cssText = "width: 368px; margin: 16px";
      const wide = element => element.getBoundingClientRect().right > 400;
      return [...document.body.querySelectorAll("*")]
        .filter(element => wide(element) && !element.closest(".scroll *, .scroll > table"))
        .map(element => element.tagName);
    """
    assert ask(page, script) == []


@needs_browser
def test_on_a_narrow_screen_a_path_leaves_room_and_the_picture_is_read(tmp_path):
    path = tmp_path / "page.html"
    shown = explained(nn.Linear(64, 64), (torch.randn(8, 64),), {}, {}, name="a model")
    row = dataclasses.replace(shown.rows[0], path="model.layers.11.self_attention.output_projection")
    dataclasses.replace(shown, rows=(row,)).to_html(path)
    script = (
        ROWS
        + """
      const cell = table.tBodies[0].rows[0].cells[0], picture = document.querySelector("img");
      return [innerWidth, cell.textContent, cell.getBoundingClientRect().width,
        picture.getBoundingClientRect().width, getComputedStyle(picture.parentNode).overflowX];
    """
    )
    wide = ask(path, script, "--window-size=1200,800")
    narrow = ask(path, script, "--window-size=400,800")
    assert narrow[0] <= 500 and narrow[1] == wide[1] == row.path  # to be copied whole
    assert narrow[2] < 0.5 * narrow[0] < wide[2]
    assert narrow[3] > 600 and narrow[4] == "auto"


@needs_browser
@pytest.mark.parametrize(("scheme", "light"), [(0, True), (1, False)], ids=["dark", "light"])
def test_its_words_are_light_in_the_dark(page, scheme, light):
    script = 'return getComputedStyle(document.querySelector("td")).color.match(/\\d+/g).map(Number);'
    colour = ask(page, script, f"--blink-settings=preferredColorScheme={scheme}")
    assert (min(colour[:3]) > 200) == light and (max(colour[:3]) < 60) != light
