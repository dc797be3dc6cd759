"""The pages as a reader sees them: built, and measured in a real browser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import PROGRAM, browser  # noqa: F401

ROOT = Path(__file__).parent.parent
MEASURED = ["", "all-of-hf-longtrunc", "contributing", "eta", "evidence", "lm_infinite", "notebooks/sampling", "pema"]
# What is wider than the box that shows it, code and tables scrolled in a box of their own among them.
TOO_WIDE = """[...document.querySelectorAll(".md-content :is(pre, code, table, .md-typeset__scrollwrap, math, img)")]
    .filter(each => each.clientWidth && each.scrollWidth > each.clientWidth + 1
        || each.getBoundingClientRect().right > document.querySelector(".md-content").getBoundingClientRect().right)
    .map(each => `${each.tagName} ${each.scrollWidth} of ${each.clientWidth}: ${each.textContent.slice(0, 60)}`)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine: install the package chromium to look at the pages in it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return folder


@pytest.mark.parametrize("name", MEASURED)
def test_no_code_and_no_table_is_cut_off(browser, site, name):  # noqa: F811
    browser.resize(1280)
    browser.open(site / name / "index.html")
    assert browser.ask(TOO_WIDE) == []
    assert browser.ask("document.documentElement.scrollWidth") <= 1280
    assert all(asked.startswith(("file:", "data:")) for asked in browser.requests())


@pytest.mark.parametrize("name", MEASURED)
def test_no_page_is_wider_than_a_phone(browser, site, name):  # noqa: F811
    """Tables, formulas and what commands printed are scrolled in boxes of their own."""
    browser.resize(390)
    browser.open(site / name / "index.html")
    assert browser.ask("document.documentElement.scrollWidth") <= 390


def test_formulas_are_drawn_as_formulas(browser, site):  # noqa: F811
    browser.open(site / "eta" / "index.html")
    root = "document.querySelector('math msqrt').getBoundingClientRect()"
    assert browser.ask(f"{root}.width > 8 && {root}.height > 8")


def test_the_first_page_can_be_read_on_a_phone(browser, site):  # noqa: F811
    browser.resize(390)
    browser.open(site / "index.html")
    assert browser.ask("document.querySelector('picture img').currentSrc").endswith("sampling-phone.png")


def test_search_finds(site):
    pages = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    found_on = {"LMInfinite": "lm_infinite/", "install": "install/", "vLLM": "install/", "Quantisation": "install/"}
    for word, page in found_on.items():
        assert any(page in each["location"] and word in each["title"] + each["text"] for each in pages), word
