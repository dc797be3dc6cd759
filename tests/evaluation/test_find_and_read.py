"""The battery of `ask`: what its texts hold, how it scores, and that a run goes on."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from hf_longtrunc import ask, load_pretrained
from instruments import facts
from instruments.fact_text import BLOCK, DEPTHS, KINDS, FactText, Question
from instruments.find_and_read import find_and_read_table, paired_test, run_find_and_read, turns_test
from tests.asking.test_index import ByWord

FUNCTION_WORDS = """
a an and at but did do does for from got had has have he her his how in into is it much of off on
one out some than that the their them these they this to under until up was went what when where
which who whom whose with within would be been by all name
"""
PEOPLE = re.compile("|".join(facts.GIVEN))


@pytest.fixture(scope="module")
def novel():
    lines = [
        f"The road went on past house number {n}, and nobody spoke of the sea or of the weather." for n in range(900)
    ]
    return "\n\n".join(" ".join(lines[n : n + 5]) for n in range(0, 900, 5))


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny_folder):
    model, tokenizer = load_pretrained(tiny_folder, device="cpu")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.bos_token
    return model, tokenizer


def stem(word):
    return re.sub("(ing|ed|es|s|'s)$", "", word)


@pytest.mark.parametrize("pair", facts.UNSHARED, ids=lambda pair: pair[2])
def test_unshared_pairs_share_no_content_word(pair):
    statement, question, values = pair
    words = [
        {stem(w) for w in re.findall("[a-z']+", text.lower()) if w not in FUNCTION_WORDS.split()}
        for text in (statement, question)
    ]
    assert not words[0] & words[1]
    assert len(values.split(",")) >= 5


def test_every_kind_has_eight_phrasings_and_the_halves_share_none():
    for of in facts.KINDS.values():
        assert len(set(of.statements)) >= 8
        assert len(set(of.questions)) >= 8
    for phrasings in (facts.UNSHARED, facts.FIRST_HOPS, facts.SECOND_HOPS, facts.TWO_HOPS, facts.OFF_TOPIC):
        choose, report = facts.half(phrasings, "choose"), facts.half(phrasings, "report")
        assert not set(choose) & set(report)
        assert set(choose) | set(report) == set(phrasings)
    assert len(set(facts.TRAILING)) == 12


def test_a_text_holds_every_fact_once_near_its_depth(novel, model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    seen = set()
    for trial in range(4):
        text = FactText(novel, tokenizer, 6000, trial)
        assert abs(len(tokenizer(text.text, add_special_tokens=False).input_ids) - 6000) < 60
        assert {q.kind for q in text.questions} == set(KINDS)
        for q in text.questions:
            for stated in q.stated:
                assert text.text.count(stated) == 1
            if q.stated and q.kind != "follow-up":
                assert abs(text.text.index(q.stated[0]) / len(text.text) - q.depth) < 0.09
                seen.add((q.kind, q.depth))
            if q.stated:
                assert q.expected in q.stated[-1]
                assert not any(value in " ".join(q.stated) for value in q.wrong)
        for value in {q.expected for q in text.questions} - {""}:
            assert value in text.text
        unknown = next(q for q in text.questions if q.kind == "unknown name")
        assert PEOPLE.search(unknown.text)[0] not in text.text
        first, follow = (next(q for q in text.questions if q.kind == kind) for kind in ("number", "follow-up"))
        assert not PEOPLE.search(follow.text)
        assert PEOPLE.search(first.text)[0] in follow.stated[0]
    assert {kind for kind, _ in seen if {d for k, d in seen if k == kind} == set(DEPTHS)} >= set(facts.KINDS)
    same = [FactText(novel, tokenizer, 6000, 0, part=part).questions for part in ("report", "report", "choose")]
    assert same[0] == same[1] != same[2]
    with pytest.raises(ValueError, match="needs a longer novel"):
        FactText(novel[:3000], tokenizer, 6000, 0)
    assert BLOCK == 64


@pytest.mark.parametrize(
    ("answer", "lenient", "strict"),
    [("It is 471.", 1, 1), ("1471", 0, 0), ("471, or 912", 1, 0), ("the clock", 0, 0), ("", 0, 0)],
)
def test_scores(answer, lenient, strict):
    assert Question("number", 0.05, "?", ("x",), "471", ("912",)).scores(answer) == (lenient, strict)
    assert Question("off-topic", 0.0, "?").scores(answer) == (0, 0)


def test_a_run_answers_as_ask_does_and_goes_on(novel, model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    given = {"novels": {"road": novel}, "lengths": [1500], "arms": {"by word": ByWord()}, "conversations": True}
    records = run_find_and_read(model, tokenizer, **given, path=tmp_path / "records.jsonl")
    text = FactText(novel, tokenizer, 1500, 0)
    mine = [r for r in records if r.arm == "by word" and r.turn == 1]
    how = {"finder": ByWord(), "max_new_tokens": 24, "rerank": 1}
    answers = ask(model, tokenizer, text.text, [r.question for r in mine], **how)
    for record, answer in zip(mine, answers, strict=True):
        assert (record.answer.strip(), record.tokens_read, record.found) == (
            answer.text,
            answer.tokens_read,
            answer.found,
        )
    assert "reranked" not in mine[0].settings
    oracle = [r for r in records if r.arm == "oracle"]
    assert all(r.right == bool(r.expected) for r in oracle)
    assert sorted({r.turn for r in records}) == [1, 2, 3, 4]
    written = (tmp_path / "records.jsonl").read_text()
    assert run_find_and_read(model, tokenizer, **given, path=tmp_path / "records.jsonl") == records
    assert (tmp_path / "records.jsonl").read_text() == written
    (tmp_path / "records.jsonl").write_text("".join(line + "\n" for line in written.splitlines()[:-1]))
    again = run_find_and_read(model, tokenizer, **given, path=tmp_path / "records.jsonl")
    assert again[-1] == records[-1]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(find_and_read_table(records))
    printed = console.export_text()
    assert "words shared" in printed
    assert "turn 4" in printed
    assert "read " in printed
    silent = run_find_and_read(model, tokenizer, **{**given, "conversations": False}, read=False)
    assert {r.answer for r in silent} == {None}


def test_the_paired_test_is_the_sign_test(novel, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    (record, *_) = run_find_and_read(model, tokenizer, {"road": novel}, [1500], {"a": ByWord()}, read=False)
    records = []
    for n in range(12):
        scores = (1.0, 0.0) if n < 9 else (0.0, 1.0) if n == 9 else (1.0, 1.0)
        for arm, score in zip("ab", scores, strict=True):
            records.append(replace(record, arm=arm, question=str(n), expected="x", strict=score))
    better, worse, p = paired_test(records, "a", "b")
    assert (better, worse) == (9, 1)
    from scipy.stats import binomtest

    assert p == pytest.approx(binomtest(9, 10).pvalue)
    assert paired_test(records, "a", "a") == (0, 0, 1.0)
    assert torch.is_inference_mode_enabled() is False


def test_later_turns_are_held_against_the_same_facts_asked_for_alone(novel, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    given = {"novels": {"road": novel}, "lengths": [1500], "arms": {"a": ByWord()}, "conversations": True}
    records = run_find_and_read(model, tokenizer, **given, read=False)
    strict = {"place": (1.0, 0.0), "person": (1.0, 0.0), "birth": (0.0, 1.0), "follow-up": (0.0, 1.0)}
    scored = [replace(r, strict=strict.get(r.kind, (1.0, 1.0))[r.turn > 1]) for r in records]
    better, worse, p = turns_test(scored, "a")
    assert (better, worse, p) == (1, 2, 1.0)  # the follow-up; place and person; the first turn is no pair


def test_each_question_is_asked_with_twelve_instructions_and_some_kinds_alone(novel, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    given = {"novels": {"road": novel}, "lengths": [1500], "arms": {"a": ByWord()}, "read": False}
    records = run_find_and_read(model, tokenizer, **given, trailing=True, kinds=("birth", "two hops"))
    assert len(records) == 2 * 2 * 12
    assert {r.kind for r in records} == {"birth", "two hops"}
    assert {instruction for instruction in facts.TRAILING for r in records if r.question.endswith(instruction)} == set(
        facts.TRAILING
    )
