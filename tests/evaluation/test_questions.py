"""Several questions on one reading, on a tiny model."""

from __future__ import annotations

import io
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console

from hf_longtrunc import DualChunkAttention, LMInfinite, load_pretrained
from hf_longtrunc.evaluation import Haystack, LongText, plot_questions, questions_table, run_questions
from hf_longtrunc.evaluation.greedy import greedy_answer

RECIPES = Path(__file__).parents[2] / "recipes"
LENGTH = 1600
LENGTHS = [1600, 1900]
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"


@pytest.fixture
def chat(tiny_folder, prose):
    model, tokenizer = load_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    return model, Haystack(tokenizer, prose * 30)


def test_a_text_holds_each_fact_once_before_its_first_length(chat):
    haystack = chat[1]
    text = LongText(haystack, LENGTHS, 0, 7)
    assert len(text.ids) == LENGTHS[-1] + 256
    said = haystack.tokenizer.decode(text.ids[: LENGTHS[0]])
    assert said.startswith("[")
    *inside, magic, own, second = text.questions
    assert [q.battery for q in inside] == ["magic number", "own words", "two values", "ship"]
    for question in inside:
        for depth, fact in question.facts:
            assert said.count(fact) == 1
            assert abs(said.index(fact) / len(said) - depth) < 0.17
        assert all(number in fact for (_, fact), number in zip(question.facts, question.expected, strict=True))
        assert all(haystack.tokenizer.decode(text.ids).count(number) == 1 for number in question.expected)
        assert haystack.tokenizer.decode(text.ending(question)).endswith(f"\n\n{question.text}]>")
    assert sum(said.count(f"The ship {ship} carries") for ship in ("Aurora", "Calypso", "Fearless", "Hesperus")) == 4
    for question in (magic, own):
        fact = question.facts[0][1]
        assert question.depth == 1
        assert fact not in said
        assert haystack.tokenizer.decode(text.ending(question)).endswith(f"\n\n{fact} {question.text}]>")
    assert second == inside[0]._replace(battery="second turn")
    assert haystack.tokenizer.decode(text.turn(second)) == f"][{second.text}]>"
    others = LongText(haystack, LENGTHS, 1, 7).questions
    assert not {q.expected[0] for q in others} & {q.expected[0] for q in text.questions}


def test_an_answer_is_that_of_its_prompt_and_a_run_goes_on(chat, tmp_path):
    model, haystack = chat
    arms = {"dual": DualChunkAttention(), "window": LMInfinite(window_length=32)}
    path = tmp_path / "questions.jsonl"
    records = run_questions(model, haystack, LENGTHS, arms, seed=3, path=path)
    assert len(records) == 2 * len(LENGTHS) * 8
    text = LongText(haystack, LENGTHS, 0, 3)
    for at, length, number in ((0, 0, 0), (12, 1, 4), (16, 0, 0)):  # of either arm and either length
        record, question = records[at], text.questions[number]
        ids = text.ids[: LENGTHS[length]] + text.ending(question)
        with arms[record.arm](model):
            said = greedy_answer(model, ids, 28)
        assert record.answer == haystack.tokenizer.decode(said, skip_special_tokens=True)
        assert (record.expected, record.tokens) == (question.expected, len(ids))
    with arms["dual"](model), torch.no_grad():
        logits = model(torch.tensor([text.ids]), use_cache=False).logits[0, LENGTHS[1] - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text.ids[LENGTHS[1] :]))
    assert records[15].battery == "continuation"
    assert records[15].score == pytest.approx(float(expected), abs=1e-4)
    written = path.read_text()
    assert run_questions(model, haystack, LENGTHS, arms, seed=3, path=path) == records
    assert path.read_text() == written


def test_a_second_turn_goes_on_from_the_first_answer(chat):
    model, haystack = chat
    arms = {"dual": DualChunkAttention()}
    (record,) = run_questions(model, haystack, [LENGTH], arms, seed=3, batteries=["second turn"])
    text = LongText(haystack, [LENGTH], 0, 3)
    first = text.ids[:LENGTH] + text.ending(text.questions[1])
    with arms["dual"](model):
        said = greedy_answer(model, first, 28).tolist()
        ids = first + said + text.turn(text.questions[-1])
        answer = greedy_answer(model, ids, 28)
    assert record.answer == haystack.tokenizer.decode(answer, skip_special_tokens=True)
    assert record.tokens == len(ids)
    haystack.tokenizer.eos_token = haystack.tokenizer.convert_ids_to_tokens(said[-1])
    (record,) = run_questions(model, haystack, [LENGTH], arms, seed=3, batteries=["second turn"])
    assert record.tokens == len(ids) - 1  # the template ends the answer itself
    with pytest.raises(ValueError, match=r"batteries are magic number, .*continuation; got ships"):
        run_questions(model, haystack, [LENGTH], arms, batteries=["ships"])


def test_the_table_shows_shares_intervals_and_perplexity(chat):
    model, haystack = chat
    records = run_questions(model, haystack, [LENGTH], {"window": LMInfinite(window_length=32)})
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(questions_table(records))
    printed = console.export_text()
    assert re.search(r"0\.00 \(0\.00-0\.79, 1\)", printed)
    assert f"{math.exp(records[-1].score):.2f} (1)" in printed
    lines = [line for line in printed.splitlines() if "continuation" in line or "magic number" in line]
    assert [line.split("│")[1].strip() for line in lines] == ["magic number", "recent magic number", "continuation"]
    narrow = Console(width=60, record=True, file=io.StringIO())
    narrow.print(questions_table([replace(record, arm=arm) for arm in ("one", "two", "three") for record in records]))
    assert "recent magic number" in narrow.export_text()
    (axes,) = plot_questions(records)
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown[:2] == ["magic number", "own words"]
    assert "continuation" not in shown
    assert {text.get_text() for text in axes.texts} <= {"0.00\nn = 1", "0.50\nn = 1", "1.00\nn = 1"}
    assert len(axes.texts) == 7


def test_recipe_reading(tiny_folder, prose, tmp_path, capsys, monkeypatch):
    main = runpy.run_path(str(RECIPES / "reading.py"))["main"]
    (tmp_path / "text.txt").write_text(prose * 30, encoding="utf-8")
    settings = {"texts": str(tmp_path / "text.txt"), "each": 1, "batteries": None, "model": tiny_folder}
    settings |= {"seed": 0, "out": tmp_path}
    with pytest.raises(typer.BadParameter, match="--arms takes dual-chunk, both, blocks, chat, window; got all"):
        main(lengths="1600", arms="window,all", **settings)
    with pytest.raises(ValueError, match="chat template"):
        main(lengths="1600", arms="window", **settings)
