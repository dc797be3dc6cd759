"""The page of where an answer read: its numbers, and every interaction in a real browser."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import AttentionTrace, LMInfinite, TopBlocks
from tests.browser import COLOR, browser, check_readable, check_step_is_below, contrast, data_of  # noqa: F401
from tests.conftest import tiny_config

PROMPT, ANSWER, CELL = 150, 6, 8
BLOCKS = TopBlocks(block_size=8, blocks=3, voting_rows=3, rows=6, first_voting_layer=2, first_layer=1)


class Letters:
    """A token a letter, of which some would end a script."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, **options):
        return "".join("</script>" if number == 7 else chr(97 + number % 26) for number in ids)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=4)).eval()
    ids = torch.randint(4, 97, (1, PROMPT))
    technique = LMInfinite(window_length=32, num_sink_tokens=4, retrieval=BLOCKS)
    with technique(model) as handle, AttentionTrace(handle, stretch=CELL) as trace:
        sequences = model.generate(ids, max_new_tokens=ANSWER, do_sample=False)
    path = tmp_path_factory.mktemp("page") / "read.html"
    return trace, sequences[0], trace.to_html(Letters(), sequences[0], path, prompt_length=PROMPT, prompt="who <b>?")


def test_the_page_holds_what_was_recorded(traced):
    trace, ids, path = traced
    data = data_of(path)
    assert "".join(data["words"]) == Letters().decode(ids.tolist())
    assert "".join(step["text"] for step in data["answer"]) == Letters().decode(ids[PROMPT:].tolist())
    assert (data["length"], data["first"], data["cell"]) == (PROMPT + ANSWER, PROMPT, CELL)
    for step, record in zip(data["answer"], trace.records, strict=True):
        assert len(step["mass"]) == record.mass.shape[1]
        for shown, share in zip(step["mass"], record.mass[0].tolist(), strict=True):
            assert shown == (-1 if share == 0 else round(share * data["parts"]))
        assert step["blocks"] == [span for span in record.blocks[0].tolist() if span[1]]
        assert step["blocks"]
    page = path.read_text("utf-8")
    assert "who &lt;b&gt;?" in page
    assert page.count("</script>") == 3


def test_a_long_text_has_fewer_cells_than_stretches(traced, tmp_path, monkeypatch):
    trace, ids, _ = traced
    monkeypatch.setattr("hf_longtrunc.attention.trace._CELLS", 7)
    data = data_of(trace.to_html(Letters(), ids, tmp_path / "page.html", prompt_length=PROMPT))
    assert data["cell"] == 3 * CELL
    assert len(data["words"]) == 7
    for step, record in zip(data["answer"], trace.records, strict=True):
        sums = [float(part.sum()) for part in record.mass[0].split(3)]
        assert step["mass"] == [-1 if share == 0 else round(share * data["parts"]) for share in sums]


# In the browser


def told(browser):  # noqa: F811
    """Return the number of the chosen token of the answer and of the chosen cell, and what is said of both."""
    return (
        browser.ask("[...document.querySelector('.text').children].indexOf(document.querySelector('.token[aria-current]'))"),
        browser.ask("[...document.querySelector('.strip').children].indexOf(document.querySelector('.cell[aria-current]'))"),
        browser.ask("document.getElementById('step').innerText"),
    )  # fmt: skip


def token(number):
    return f".token:nth-child({number + 1})"


def cell(number):
    return f".cell:nth-child({number + 1})"


def test_every_interaction_in_a_browser(browser, traced):  # noqa: F811
    page = traced[2]
    data = data_of(page)
    browser.resize(1280)
    browser.open(page)
    cells = len(data["words"])
    assert browser.ask("document.querySelectorAll('.cell').length") == cells
    assert browser.ask("document.querySelectorAll('.token').length") == ANSWER + 1
    chosen, _, words = told(browser)
    assert chosen == 0
    assert "The whole answer read" in words

    browser.point(token(3))
    mass, blocks = data["answer"][2]["mass"], data["answer"][2]["blocks"]
    mass += [-1] * (cells - len(mass))
    assert told(browser)[0] == 3
    for kind, expected in (
        ("chosen", [any(a < CELL * (at + 1) and b > CELL * at for a, b in blocks) for at in range(cells)]),
        ("unseen", [share < 0 for share in mass]),
        ("own", [CELL * at >= PROMPT for at in range(cells)]),
    ):
        classes = browser.ask(f"[...document.querySelectorAll('.cell')].map(cell => cell.matches('.{kind}'))")
        assert classes == expected, kind
        assert True in classes
    alphas = browser.ask(
        "[...document.querySelectorAll('.cell')].map(cell => getComputedStyle(cell).backgroundColor)"
        ".map(color => +(color.match(/[\\d.]+/g)[3] ?? 1))"
    )
    seen = [at for at in range(cells) if mass[at] > 20]
    assert sorted(seen, key=lambda at: mass[at])[-1] == max(seen, key=lambda at: alphas[at])

    at = seen[1]
    browser.point(cell(at))
    _, chosen, words = told(browser)
    assert chosen == at
    assert data["words"][at] in browser.ask("document.getElementById('words').textContent")
    assert f"Tokens {CELL * at}-{CELL * at + CELL - 1}" in words
    share = mass[at] / data["parts"]
    assert f"{100 * share:.{1 if share > 0.1 else 2}f} %" in words

    browser.point(token(2), click=True)
    browser.point(token(4))
    assert told(browser)[0] == 2  # held by the click
    browser.press("Escape")
    browser.point(token(5))
    assert told(browser)[0] == 5
    for key, place in (("ArrowRight", 3), ("ArrowDown", 4), ("ArrowUp", 3), ("ArrowLeft", 2), ("End", ANSWER),
                       ("ArrowRight", ANSWER), ("Home", 0)):  # fmt: skip
        browser.press(key)  # the focus is where the click put it
        assert told(browser)[0] == place, key
    for key in ("Enter", " "):
        browser.press(key)
        browser.point(token(5))
        assert told(browser)[0] == 0
        browser.press("Escape")
        browser.point(token(4))
        assert told(browser)[0] == 4
        browser.press("ArrowRight")
        browser.press("Home")

    browser.press("Tab")  # one stop of Tab for the answer, one for the strip
    row = browser.ask(
        "[...document.querySelectorAll('.cell')].filter((c, _, all) => c.offsetTop === all[0].offsetTop).length"
    )
    browser.press("Home")
    places = [("ArrowRight", 1), ("End", cells - 1), ("Home", 0)] + ([("ArrowDown", row)] if row < cells else [])
    for key, place in places:
        browser.press(key)
        assert told(browser)[1] == place, key
    assert browser.requests() == [page.resolve().as_uri()]
    assert not browser.complaints()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_can_be_read(browser, traced, width, dark):  # noqa: F811
    page = traced[2]
    ground = check_readable(browser, page, width, dark)
    assert contrast(browser.ask(COLOR % (".chosen", "borderTopColor")), ground) >= 3
    if width == 390:
        browser.tap(cell(6))
        assert told(browser)[1] == 6
        browser.tap(token(2))
        assert told(browser)[:2] == (2, 6)
        check_step_is_below(browser, ".token[aria-current]")
