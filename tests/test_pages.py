"""The pages as a reader sees them: built, crawled, searched, and measured in a real browser."""

from __future__ import annotations

import json
import posixpath
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.browser import browser, contrast  # noqa: F401

pytestmark = pytest.mark.xdist_group("pages")  # one build
ROOT = Path(__file__).parent.parent
# What is wider than the box that shows it, code and tables scrolled in a box of their own among them.
TOO_WIDE = """[...document.querySelectorAll(".md-content :is(pre, code, table, .md-typeset__scrollwrap, math, img)")]
    .filter(each => each.clientWidth && each.scrollWidth > each.clientWidth + 1
        || each.getBoundingClientRect().right > document.querySelector(".md-content").getBoundingClientRect().right)
    .map(each => `${each.tagName} ${each.scrollWidth} of ${each.clientWidth}: ${each.textContent.slice(0, 60)}`)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return folder


def test_no_page_is_too_wide(browser, site):  # noqa: F811
    """Every page at three widths. On a phone tables, formulas and outputs are scrolled in boxes of their own."""
    wide = []
    browser.block("*search_index*", "*/workers/*")  # each page would build the search's index
    for page in sorted(site.rglob("index.html")):
        browser.resize(1280)
        browser.open(page)
        for width in (1280, 768, 390):
            browser.resize(width, dark=width == 768)
            found = browser.ask(TOO_WIDE) if width == 1280 else []
            if browser.ask("document.documentElement.scrollWidth") > width or found:
                wide.append((page.parent.relative_to(site).as_posix(), width, found))
        assert all(asked.startswith(("file:", "data:")) for asked in browser.requests())
    assert wide == []


def test_menus_that_fit_have_no_scroll_bar(browser, site):  # noqa: F811
    browser.resize(1280, 1100)
    browser.open(site / "howto" / "your_model" / "index.html")
    menus = "[...document.querySelectorAll('.md-sidebar__scrollwrap')].map(e => e.scrollHeight - e.clientHeight)"
    assert browser.ask(menus) == [0, 0]


def open_in_theme(browser, page, is_dark):  # noqa: F811
    """Open a page in the light or dark theme, whatever was chosen before."""
    browser.resize(1280, dark=is_dark)
    browser.open(page)
    browser.ask("localStorage.clear()")
    browser.open(page)
    assert browser.ask("document.body.getAttribute('data-md-color-scheme')") == ("slate" if is_dark else "default")


@pytest.mark.parametrize("is_dark", [False, True])
def test_links_can_be_read(browser, site, is_dark):  # noqa: F811
    open_in_theme(browser, site / "index.html", is_dark)
    colour = "getComputedStyle(document.querySelector('.md-content li a')).color"
    assert contrast(browser.ask(colour), browser.ask("getComputedStyle(document.body).backgroundColor")) >= 4.5


def test_pictures_keep_their_colours_in_the_dark(browser, site):  # noqa: F811
    """A heat map whose scale is turned round says the opposite."""
    for name in ("results/long_context", "notebooks/sampling"):
        open_in_theme(browser, site / name / "index.html", is_dark=True)
        filters = "[...document.querySelectorAll('.md-content img')].map(each => getComputedStyle(each).filter)"
        assert set(browser.ask(filters)) == {"none"}


def test_formulas_are_drawn_as_formulas(browser, site):  # noqa: F811
    browser.open(site / "eta" / "index.html")
    root = "document.querySelector('math msqrt').getBoundingClientRect()"
    assert browser.ask(f"{root}.width > 8 && {root}.height > 8")


def test_the_first_page_can_be_read_on_a_phone(browser, site):  # noqa: F811
    browser.resize(390)
    browser.open(site / "index.html")
    assert browser.ask("document.querySelector('picture img').currentSrc").endswith("sampling-phone.png")


# What a reader types, and a page that answers.
FOUND_ON = {
    "LMInfinite": "lm_infinite/",
    "StreamingLLM": "lm_infinite/",
    "sliding window": "lm_infinite/",
    "install": "install/",
    "vLLM": "serving/",
    "Quantisation": "install/",
    "quantized": "install/",
    "RAG": "ask/",
    "YaRN": "cream/",
    "min_p": "eta/",
    "GRPO": "training/",
    "best-fit": "packing/",
}


class Page(HTMLParser):
    """The targets and the anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.targets |= {found[name] for name in ("href", "src", "srcset") if found.get(name)}


@pytest.fixture(scope="module")
def pages(site):
    found = {each.relative_to(site).as_posix(): each for each in site.rglob("*.html") if each.name != "404.html"}
    return {name: Page(path.read_text(encoding="utf-8")) for name, path in found.items()}


def test_every_link_and_anchor_leads_somewhere(site, pages):
    dead = []
    for name, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target.startswith("data:"):
                continue
            path = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            if (site / path).is_dir():
                path = posixpath.join(path, "index.html")
            is_page = path in pages
            if not (site / path).is_file() or (is_page and unquote(parts.fragment) not in pages[path].anchors):
                dead.append(f"{name} -> {target}")
    assert dead == []


@pytest.mark.parametrize("word", FOUND_ON)
def test_search_finds(site, word):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    texts = [each["title"] + each["text"] for each in index if FOUND_ON[word] in each["location"]]
    assert word.lower() in " ".join(texts).lower()
