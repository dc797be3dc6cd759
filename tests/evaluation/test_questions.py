"""Several questions on one reading, on a tiny model."""

from __future__ import annotations

import io
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console

from hf_longtrunc import DualChunkAttention, LMInfinite, load_pretrained
from hf_longtrunc.evaluation import Haystack, LongText, questions_table, run_questions
from hf_longtrunc.evaluation.greedy import greedy_answer

RECIPES = Path(__file__).parents[2] / "recipes"
LENGTH = 1600
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"


@pytest.fixture
def chat(tiny_folder, prose):
    model, tokenizer = load_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    return model, Haystack(tokenizer, prose * 30)


def test_a_text_holds_each_fact_once_where_its_depth_says(chat):
    haystack = chat[1]
    text = LongText(haystack, LENGTH, 0, 7)
    assert (len(text.ids), len(text.more)) == (LENGTH, 256)
    said = haystack.tokenizer.decode(text.ids)
    assert said.startswith("[Here is a text.")
    hidden = [question for question in text.questions if question.depth < 1]
    assert len(hidden) == 16
    for question in hidden:
        assert said.count(question.fact) == 1
        assert abs(said.index(question.fact) / len(said) - question.depth) < 0.17
        assert all(said.count(number) == 1 and number in question.fact for number in question.expected)
        assert haystack.tokenizer.decode(text.ending(question)).endswith(f"\n\n{question.text}]>")
    for question in text.questions[16:]:
        assert question.fact not in said
        assert haystack.tokenizer.decode(text.ending(question)).endswith(f"\n\n{question.fact} {question.text}]>")
    others = LongText(haystack, LENGTH, 1, 7).questions
    assert not {q.expected[0] for q in others} & {q.expected[0] for q in text.questions}


def test_an_answer_is_that_of_its_prompt_and_a_run_goes_on(chat, tmp_path):
    model, haystack = chat
    arms = {"dual": DualChunkAttention(), "window": LMInfinite(window_length=32)}
    path = tmp_path / "questions.jsonl"
    records = run_questions(model, haystack, [LENGTH], arms, seed=3, path=path)
    assert len(records) == 2 * 19
    text = LongText(haystack, LENGTH, 0, 3)
    for at, number in ((0, 0), (17, 17), (19, 0)):  # a question of either arm, and the last one
        record, question = records[at], text.questions[number]
        with arms[record.arm](model):
            said = greedy_answer(model, text.ids + text.ending(question), 28)
        assert record.answer == haystack.tokenizer.decode(said, skip_special_tokens=True)
        assert record.expected == question.expected
    with arms["dual"](model), torch.no_grad():
        logits = model(torch.tensor([text.ids + text.more]), use_cache=False).logits[0, LENGTH - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text.more))
    assert records[18].battery == "continuation"
    assert records[18].score == pytest.approx(float(expected), abs=1e-4)
    written = path.read_text()
    assert run_questions(model, haystack, [LENGTH], arms, seed=3, path=path) == records
    assert path.read_text() == written


def test_the_table_shows_shares_intervals_and_perplexity(chat):
    model, haystack = chat
    records = run_questions(model, haystack, [LENGTH], {"window": LMInfinite(window_length=32)})
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(questions_table(records))
    printed = console.export_text()
    assert re.search(r"0\.00 \(0\.00-0\.49, 4\)", printed)
    assert f"{math.exp(records[-1].score):.2f} (1)" in printed


def test_recipe_reading(tiny_folder, prose, tmp_path, capsys, monkeypatch):
    main = runpy.run_path(str(RECIPES / "reading.py"))["main"]
    (tmp_path / "text.txt").write_text(prose * 30, encoding="utf-8")
    settings = {"text": tmp_path / "text.txt", "texts": 1, "model": tiny_folder, "seed": 0, "out": tmp_path}
    with pytest.raises(typer.BadParameter, match="--arms takes dual-chunk, blocks, chat, window; got all"):
        main(lengths="1600", arms="window,all", **settings)
    with pytest.raises(ValueError, match="chat template"):
        main(lengths="1600", arms="window", **settings)
