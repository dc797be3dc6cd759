"""The page of what samplers cut: its numbers, and every interaction in a real browser."""

from __future__ import annotations

import csv
import io
from statistics import median

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, TopPLogitsWarper

from hf_longtrunc import BasisAwareLogitsProcessor, EtaLogitsProcessor, SoftmaxBasis, SupportChecker, TruncationTrace
from hf_longtrunc.evaluation import read_traces
from hf_longtrunc.pieces import piece_by_token, pieces
from tests.browser import COLOR, browser, check_readable, check_step_is_below, contrast, data_of  # noqa: F401
from tests.command_line import letter_tokenizer
from tests.conftest import tiny_config

PROMPT = torch.tensor([[5, 9, 13, 5, 9]])
EPSILON = 0.05
LETTERS = "".join(map(chr, range(0x400, 0x400 + 93)))  # with the special tokens, a vocabulary of 97


TOKENIZER = letter_tokenizer(["<pad>", "<s>", "</s>", "<unk>"], LETTERS)


@pytest.fixture
def tokenizer():
    return TOKENIZER


def drawn(model, processors=(), tokens=12, rows=1, **options):
    trace = TruncationTrace(list(processors), **options)
    torch.manual_seed(1)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens}
    sequences = model.generate(PROMPT.repeat(rows, 1), logits_processor=[trace], **settings)
    return trace.finish(sequences), sequences


def bat(model):
    return BasisAwareLogitsProcessor(SoftmaxBasis.from_model(model, 3), EPSILON, mode="mask")


def test_candidates_are_the_most_probable_tokens_and_both_sides_of_the_cut(tiny_model):
    processor = EtaLogitsProcessor(0.002)
    trace, sequences = drawn(tiny_model, [processor], candidates=6)
    logits = tiny_model(sequences).logits.detach()
    for record in trace.records:
        scores = logits[0, record.position - 1]
        probs = scores.softmax(-1)
        order = probs.argsort(descending=True).tolist()
        kept = [token for token in order if processor(None, scores[None])[0, token] > -torch.inf]
        cut = [token for token in order if token not in kept]
        expected = set(order[:6]) | (set(kept[-3:]) | set(cut[:3]) if cut else set())
        near = record.candidates
        assert near["token"].tolist() == [token for token in order if token in expected]
        assert near["kept"].tolist() == [token in kept for token in near["token"]]
        assert near["probability"] == pytest.approx(probs[near["token"].tolist()].numpy(), rel=1e-4)
        assert np.isnan(near["margin"]).all()


def test_a_rescued_token_has_the_margin_of_its_proof(tiny_model):
    processor = bat(tiny_model)
    trace, sequences = drawn(tiny_model, [processor])
    logits, rescued = tiny_model(sequences).logits.double(), 0
    for record in trace.records:
        p = logits[0, record.position - 1].softmax(-1)
        for token, probability, kept, margin in record.candidates.tolist():
            if kept and probability < record.threshold * (1 - 1e-5):
                rescued += 1
                assert margin > 0
                # T(l) <= sigma p_i f_i / (1 + margin): the token stays where tau is a little larger, too.
                tau = record.threshold * (1 + min(margin, 0.5) * 1e-3 * (1 - record.threshold))
                checker = SupportChecker(processor.checker.basis)
                assert checker.check(p.log().float()[None], tau, torch.tensor([[token]])).item() == 1
            else:
                assert np.isnan(margin)
    assert rescued > 10


def test_every_row_has_its_own_bar(tiny_model):
    processor = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), [0.01, 0.2], mode="mask")
    trace, _ = drawn(tiny_model, [processor], rows=2)
    for row, most in ((0, 0.01), (1, 0.2)):
        records = [record for record in trace.records if record.row == row]
        assert all(record.threshold <= most * (1 + 1e-5) for record in records)
        for record in records:
            near = record.candidates
            rescued = near["kept"] & (near["probability"] < record.threshold * (1 - 1e-5))
            assert (np.isfinite(near["margin"]) == rescued).all()


def test_the_margin_is_that_of_the_certificate(tiny_model):
    basis = SoftmaxBasis.from_model(tiny_model, 3)
    scores = tiny_model(PROMPT).logits[0, -1:].detach()
    p, tau = scores.double().softmax(-1)[0], 0.2
    proofs = SupportChecker(basis).certify(scores, tau, torch.arange(97)[None])
    kept = [proof for proof in proofs if proof.multipliers is not None]
    assert kept
    for proof in kept:
        f = proof.multipliers[0] + basis.factors.double() @ proof.multipliers[1:]
        s = tau / (1 - tau)
        total = sum(float(p[j]) * (s * max(float(f[j]), 0) + max(-float(f[j]), 0)) for j in range(97))
        assert proof.margin == pytest.approx((1 + s) * float(p[proof.token] * f[proof.token]) / total - 1, rel=1e-6)
    assert all(proof.margin is None for proof in proofs if proof.multipliers is None)


def test_without_candidates_the_page_still_shows_the_text(tiny_model, tokenizer, tmp_path):
    trace, sequences = drawn(tiny_model, [EtaLogitsProcessor(EPSILON)], candidates=0)
    assert trace.records[0].candidates is None
    (text,) = data_of(trace.to_html(tokenizer, tmp_path / "page.html"))["texts"]
    assert "".join(step["text"] for step in text["steps"]).strip() == tokenizer.decode(sequences[0, 5:])


def test_the_page_holds_what_the_records_hold(tiny_model, tokenizer, tmp_path):
    trace, _ = drawn(tiny_model, [EtaLogitsProcessor(EPSILON)], rows=2)
    plain, _ = drawn(tiny_model)
    path = trace.to_html(
        tokenizer, tmp_path / "page.html", name="eta", beside={"plain": plain}, prompt="<b>&", epsilon=EPSILON
    )
    data = data_of(path)
    assert [text["name"] for text in data["texts"]] == ["eta, run 0, row 0", "eta, run 0, row 1", "plain"]
    steps = [step for text in data["texts"] for step in text["steps"]]
    for step, record in zip(steps, [*trace.records, *plain.records], strict=True):
        assert step["token"] == record.token
        assert step["kept_mass"] == pytest.approx(record.kept_mass, rel=1e-3)
        threshold = min(EPSILON, EPSILON**0.5 * np.exp(-record.entropy))
        assert step["refused"] == (record.probability < threshold and record.rank > 1)
        assert data["words"][str(record.token)] == " " + tokenizer.decode([record.token])
    assert any(step["refused"] for step in steps)
    assert "&lt;b&gt;&amp;" in path.read_text("utf-8")


def test_no_text_ends_the_script(tiny_model, tmp_path):
    class Hostile:
        def __call__(self, text, **options):
            return {"input_ids": [1]}

        def decode(self, ids, **options):
            return "</script><b>" * len(ids)

    trace, _ = drawn(tiny_model)
    page = trace.to_html(Hostile(), tmp_path / "page.html", prompt="</script>").read_text("utf-8")
    assert page.count("</script>") == 3


def test_bad_calls_are_named(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match="nothing recorded"):
        TruncationTrace().to_html(tokenizer, path)
    trace, _ = drawn(tiny_model)
    with pytest.raises(ValueError, match="beside must not hold 'sampled'"):
        trace.to_html(tokenizer, path, beside={"sampled": TruncationTrace()})
    with pytest.raises(ValueError, match="epsilon must be"):
        trace.to_html(tokenizer, path, epsilon=1)
    with pytest.raises(ValueError, match="candidates must be"):
        TruncationTrace(candidates=-1)
    assert not path.exists()


def test_pieces_join_to_the_text(tokenizer):
    class Bytes:
        """A token a byte of UTF-8; a token before 256 stands alone without its leading space, as in SentencePiece."""

        def decode(self, ids, **options):
            return bytes(ids).decode("utf-8", errors="replace").lstrip(" ")

        def __call__(self, text, **options):
            return {"input_ids": list(text.encode())}

    text = "a b\N{GRINNING FACE}  \N{EURO SIGN}c"
    shown = list(pieces(Bytes(), text.encode()))
    assert "".join(shown) == text
    assert shown[2:8] == ["b", "", "", "", "\N{GRINNING FACE}", " "]
    assert len(list(pieces(Bytes(), b"\xf0" * 30))) == 30
    assert piece_by_token(Bytes(), [32, 98]) == {32: " ", 98: "b"}


# In the browser


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    trace, _ = drawn(model, [bat(model)], tokens=30)
    plain, _ = drawn(model, tokens=30)
    return trace.to_html(
        TOKENIZER,
        tmp_path_factory.mktemp("page") / "page.html",
        name="BAT",
        beside={"plain": plain},
        epsilon=EPSILON,
        prompt="abc",
    )


def chosen(browser):  # noqa: F811
    """Return place and label of the current token, and what the panel says of it."""
    return (
        browser.ask("document.querySelector('.token[aria-current]').place"),
        browser.ask("document.getElementById('step').innerText"),
    )


def token(column, row):
    return f"section:nth-of-type({column + 1}) .token:nth-child({row + 1})"


def test_every_interaction_in_a_browser(browser, page):  # noqa: F811
    browser.resize(1280)
    browser.open(page)
    data = data_of(page)
    assert browser.ask("document.querySelectorAll('.token').length") == 60
    rescued = [step["rescued"] for step in data["texts"][0]["steps"]]
    marked = browser.ask("[...document.querySelector('.text').children].map(token => token.matches('.rescued'))")
    assert marked == rescued
    assert True in rescued
    place, told = chosen(browser)
    assert place == [0, rescued.index(True)]
    assert "below the threshold, rescued" in told
    assert "+" in browser.ask("document.querySelector('#step tr.drawn.rescued .what').textContent")

    browser.point(token(1, 4))
    assert chosen(browser)[0] == [1, 4]
    browser.point(token(1, 5), click=True)
    browser.point(token(0, 2))
    assert chosen(browser)[0] == [1, 5]  # held by the click
    browser.press("Escape")
    browser.point(token(0, 3))
    assert chosen(browser)[0] == [0, 3]

    for number, key in enumerate(("Enter", " ")):  # they keep what the arrow keys chose, as a click does
        browser.press("ArrowRight")
        here = chosen(browser)[0]
        assert here == [1, 6 + number]
        browser.press(key)
        browser.point(token(0, 4 + number))
        assert chosen(browser)[0] == here
        browser.press("Escape")
        browser.point(token(0, 6 + number))
        assert chosen(browser)[0] == [0, 6 + number]
    browser.point(token(1, 5), click=True)

    browser.press("ArrowRight")  # the focus is where the click put it
    assert chosen(browser)[0] == [1, 6]
    for key, place in (("ArrowLeft", [1, 5]), ("ArrowUp", [0, 5]), ("End", [0, 29]), ("ArrowRight", [0, 29])):
        browser.press(key)
        assert chosen(browser)[0] == place
    browser.press("ArrowDown")
    browser.press("Home")
    assert chosen(browser)[0] == [1, 0]
    assert browser.ask("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 2  # one stop of Tab a text

    step, told = data["texts"][1]["steps"][0], chosen(browser)[1]
    assert f"rank {step['rank']}" in told
    assert f"{step['kept']} tokens" in told
    assert browser.requests() == [page.resolve().as_uri()]
    assert not browser.complaints()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_can_be_read(browser, page, width, dark):  # noqa: F811
    ground = check_readable(browser, page, width, dark)
    for marked in (".refused", ".rescued"):
        line = browser.ask(COLOR % (f".token{marked}", "textDecorationColor"))
        assert contrast(line, ground) >= 3
    if width == 390:
        browser.tap(token(0, 7))
        assert chosen(browser)[0] == [0, 7]
        check_step_is_below(browser, "[aria-current]")


# One text, several samplers


SAMPLERS = {"eta": EtaLogitsProcessor(0.1), "top-p": TopPLogitsWarper(0.6), "BAT": None}


@pytest.fixture(scope="module")
def read(model):
    """The traces of three samplers on one text of 30 tokens, and their processors."""
    samplers = {name: processor or bat(model) for name, processor in SAMPLERS.items()}
    ids = torch.randint(4, 97, (31,), generator=torch.Generator().manual_seed(0))
    return read_traces(model, ids, {name: [each] for name, each in samplers.items()}), samplers, ids


def one_text(traces, tokenizer, folder):
    first, *others = traces
    beside = {name: traces[name] for name in others}
    return traces[first].to_html(tokenizer, folder / "one.html", name=first, beside=beside, epsilon=EPSILON)


def test_every_sampler_reads_the_same_text(model, read):
    traces, samplers, ids = read
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    for name, trace in traces.items():
        kept = samplers[name](ids[None].expand(30, -1), logits.clone()) > -torch.inf
        probs = logits.softmax(-1)
        records = trace.records
        assert [record.token for record in records] == ids[1:].tolist()
        assert [record.kept for record in records] == kept.sum(1).tolist()
        assert [record.is_kept for record in records] == kept.gather(1, ids[1:, None])[:, 0].tolist()
        assert [record.kept_mass for record in records] == pytest.approx((probs * kept).sum(1).tolist(), rel=1e-4)
    assert {record.is_kept for record in traces["eta"].records} == {True, False}
    drawing = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(model, 3), EPSILON, mode="sample")
    with pytest.raises(ValueError, match="'BAT' draws tokens by itself"):
        read_traces(model, ids, {"BAT": [drawing]})


def test_one_text_in_a_browser(browser, read, tokenizer, tmp_path):  # noqa: F811
    traces, _, _ = read
    page = one_text(traces, tokenizer, tmp_path)
    data = data_of(page)
    assert data["isOneText"]
    browser.resize(1280)
    browser.open(page)
    assert browser.ask("document.querySelectorAll('.text').length") == 1
    assert browser.ask("document.querySelectorAll('.token').length") == 30
    assert browser.ask("document.querySelectorAll('.strip .mass').length") == 3
    rows = browser.ask("[...document.querySelectorAll('main .samplers tr')].slice(1).map(row => row.innerText)")
    for row, (name, trace) in zip(rows, traces.items(), strict=True):
        records = trace.records
        assert name in row
        assert f"{median(record.kept for record in records):g}" in row.split()
        assert row.split()[-1] == str(sum(not record.is_kept for record in records))
    is_dropped = [any(not trace.records[n].is_kept for trace in traces.values()) for n in range(30)]
    assert browser.ask("[...document.querySelectorAll('.token')].map(each => each.matches('.dropped'))") == is_dropped

    browser.point(".token:nth-child(8)", click=True)
    told = browser.ask("[...document.querySelectorAll('#step .samplers')][0].innerText")
    for trace in traces.values():
        record = trace.records[7]
        assert f"{record.kept:,}" in told
    for n, (name, trace) in enumerate(traces.items()):
        kept = {token: is_kept for token, _, is_kept, _ in trace.records[7].candidates.tolist()}
        marks = f"document.querySelectorAll('#step .samplers')[1].querySelectorAll(`[title='{name}']`)"
        shown = browser.ask(f"{marks}.length")
        assert shown >= min(sum(kept.values()), 10), n
    browser.press("ArrowRight")
    assert browser.ask("document.querySelector('.token[aria-current]').place") == [0, 8]
    browser.press("Escape")
    browser.point(".strip")
    place = browser.ask("document.querySelector('.token[aria-current]').place[1]")
    assert place == 15
    assert browser.ask("document.querySelector('.here').getAttribute('x1')") == "15.5"
    assert not browser.complaints()


def test_the_numbers_come_out_as_csv_and_json(browser, read, tokenizer, tmp_path):  # noqa: F811
    traces, _, _ = read
    page = one_text(traces, tokenizer, tmp_path)
    browser.open(page)
    rows = list(csv.DictReader(io.StringIO(browser.ask("csv()"))))
    records = [(name, record) for name, trace in traces.items() for record in trace.records]
    texts = [step["text"] for text in data_of(page)["texts"] for step in text["steps"]]
    for row, (name, record), text in zip(rows, records, texts, strict=True):
        assert (row["sampler"], row["text"]) == (name, text)
        assert (int(row["token"]), int(row["kept"])) == (record.token, record.kept)
        assert row["is_kept"] == str(record.is_kept).lower()
        assert float(row["kept_mass"]) == pytest.approx(record.kept_mass, rel=1e-3)
        assert row["threshold"] == "" or float(row["threshold"]) == pytest.approx(record.threshold, rel=1e-3)
    assert browser.ask("JSON.parse(JSON.stringify(tableOf())).length") == 90
    saved = "(() => { const seen = []; save = (...each) => seen.push(each); %s; return seen[0].slice(0, 2); })()"
    for kind, mime in (("csv", "text/csv"), ("json", "application/json")):
        browser.open(page)
        click = f"document.querySelector('[data-as={kind}]').click()"
        assert browser.ask(saved % click) == [f"samplers.{kind}", mime]
        browser.ask(click)
    assert not browser.complaints()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_one_text_fits_and_can_be_read(browser, read, tokenizer, tmp_path, width, dark):  # noqa: F811
    ground = check_readable(browser, one_text(read[0], tokenizer, tmp_path), width, dark)
    for n in range(3):
        assert contrast(browser.ask(COLOR % (f".mass:nth-of-type({n + 2})", "stroke")), ground) >= 3
    height = "document.getElementById('step').getBoundingClientRect().height"
    if width == 390:
        assert browser.ask(height) <= 0.26 * 844  # not half of the screen
        browser.tap("#step h2")
        assert browser.ask("document.getElementById('step').matches('.open')")


def test_the_median_of_an_even_number_is_between_the_middle_two(browser, tiny_model, tokenizer, tmp_path):  # noqa: F811
    for seed in range(20):
        trace, _ = drawn(tiny_model, [EtaLogitsProcessor(0.002 * (seed + 1))], tokens=12)
        if (middle := median(record.kept for record in trace.records)) % 1:
            break
    browser.open(trace.to_html(tokenizer, tmp_path / "page.html"))
    assert middle % 1 == 0.5
    assert f"median of {middle} kept" in browser.ask("document.querySelector('main').innerText")
