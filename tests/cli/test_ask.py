"""`hf-longtrunc ask` on a tiny model and a tiny sentence encoder."""

from __future__ import annotations

import json

import pytest

from hf_longtrunc import TextIndex, ask, load_pretrained
from tests.asking.conftest import encoder_folder  # noqa: F401
from tests.asking.test_index import SENTENCES, TEXT, ByWord
from tests.command_line import invoke


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def by_word(monkeypatch):
    monkeypatch.setattr("hf_longtrunc.cli.ask.finder_of", lambda name, encoder: ByWord())


def test_it_says_what_ask_says(file, model_folder, by_word):
    questions = ["Where is four ", "elephants"]
    model, tokenizer = load_pretrained(model_folder)
    expected = ask(model, tokenizer, TextIndex(TEXT, ByWord()), questions, context=0, max_new_tokens=9)
    options = ("--model", model_folder, "--max-new-tokens", 9, "--context", 0)
    result = invoke("ask", file, *questions, *options, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [answer["text"] for answer in said["answers"]] == [answer.text for answer in expected]
    assert [answer["found"] for answer in said["answers"]] == [True, False]
    assert said["answers"][0]["passages"][0]["text"] == SENTENCES[3]
    assert said["units"] == 6
    streamed = invoke("ask", "-", *questions, *options, input=TEXT, columns=None)
    assert streamed.exit_code == 0, streamed.output
    assert streamed.stdout.split() == " ".join(answer.text for answer in expected).split()
    assert f"-, characters {TEXT.index(SENTENCES[3])} to " in streamed.stderr
    assert SENTENCES[3] in streamed.stderr
    assert streamed.stderr.count("no passage stands out; answered without the text") == 1


def test_options_reach_the_answer(file, model_folder, by_word, tmp_path):
    (tmp_path / "prompt").write_text("{question} {passages}\n", encoding="utf-8")
    (tmp_path / "other").write_text("An elephant is mentioned here and only here, of all places.", encoding="utf-8")
    model, tokenizer = load_pretrained(model_folder)
    text = {str(file): TEXT, str(tmp_path / "other"): (tmp_path / "other").read_text(encoding="utf-8")}
    given = {"count": 2, "context": 60, "hops": 2, "prompt": "{question} {passages}", "follow_up": True}
    expected = ask(model, tokenizer, text, ["elephant three", "three"], finder=ByWord(), max_new_tokens=5, **given)
    options = ["--also", tmp_path / "other", "--prompt", tmp_path / "prompt", "--count", 2, "--context", 60]
    options += ["--hops", 2, "--follow-up", "--model", model_folder, "--max-new-tokens", 5]
    result = invoke("ask", file, "elephant three", "three", *options, "--json")
    assert result.exit_code == 0, result.output
    for said, answer in zip(json.loads(result.stdout)["answers"], expected, strict=True):
        assert (said["text"], said["tokens_read"]) == (answer.text, answer.tokens_read)
        assert [each["source"] for each in said["passages"]] == [each.source for each in answer.passages]


def test_an_index_is_kept_and_used_again(file, model_folder, encoder_folder, tmp_path):  # noqa: F811
    options = (
        "--model",
        model_folder,
        "--encoder",
        encoder_folder,
        "--max-new-tokens",
        3,
        "--index",
        tmp_path / "kept",
    )
    first = invoke("ask", file, "Where is four?", *options)
    again = invoke("ask", file, "Where is four?", *options)
    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    assert first.stdout == again.stdout
    assert "index of 6 units kept" in first.stderr
    assert "index of 6 units: " in again.stderr
    file.write_text(TEXT + " More.", encoding="utf-8")
    refused = invoke("ask", file, "Where is four?", *options)
    assert refused.exit_code == 2
    assert "is the index of another text" in refused.stderr


@pytest.mark.parametrize("finder", ["encoder", "bm25", "fused"])
def test_every_finder_has_a_name(file, model_folder, encoder_folder, finder):  # noqa: F811
    if finder != "encoder":
        pytest.importorskip("bm25s", reason="the extra `ask` brings it")
    encoder = () if finder == "bm25" else ("--encoder", encoder_folder)
    result = invoke(
        "ask", file, "four", "--finder", finder, *encoder, "--model", model_folder, "--max-new-tokens", 3, "--json"
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["finder"], said["answers"][0]["found"]) == (finder, True)


def test_a_question_about_the_whole_and_an_empty_answer_are_told(file, model_folder, by_word, monkeypatch):
    monkeypatch.setattr("hf_longtrunc.asking.answers._greedy", lambda *_: [])
    result = invoke("ask", file, "Summarise the text.", "--model", model_folder)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "about the whole text" in result.stderr
    assert "the model ended its answer at once" in result.stderr


def test_an_empty_question_and_an_encoder_without_use_are_refused(file, model_folder):
    result = invoke("ask", file, "a question", " ", "--model", model_folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "a question is empty" in result.stderr
    result = invoke("ask", file, "why", "--finder", "bm25", "--encoder", "x", "--model", model_folder)
    assert result.exit_code == 2
    assert "goes with --finder encoder or fused" in result.stderr
