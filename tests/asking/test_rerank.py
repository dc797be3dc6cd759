"""The re-ranker against the definition, and which unit an index takes with it."""

from __future__ import annotations

import pytest
import torch

from hf_longtrunc import TextIndex, ask, load_pretrained
from hf_longtrunc.asking.rerank import Reranker
from tests.asking.test_index import SENTENCES, TEXT, ByWord


@pytest.fixture(scope="module")
def model_and_tokenizer(model_folder):
    return load_pretrained(model_folder, device="cpu")


class Prefers(Reranker):
    """A re-ranker that gives units with a word in them a gain."""

    reach = 1.0

    def __init__(self, word, gain, reach=1.0, units=3):
        vars(self).update(word=word, gain=gain, units=units, weight=1.0, asked=[])
        vars(self)["reach"] = reach

    def log_probs(self, question, units):
        self.asked.append((question, list(units)))
        return torch.tensor([self.gain * (self.word in unit) for unit in units])


def test_a_gain_is_the_mean_log_probability_of_the_question_after_the_unit(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    units, question = ["A hat, grey\nand old.", "No.", "a b c"], "Where is it"
    gains = Reranker(model, tokenizer, weight=0.5)(question, units)
    for gain, unit in zip(gains.tolist(), ["A hat, grey and old.", "No.", "a b c"], strict=True):
        before = tokenizer(f"Passage: {unit}\nQuestion:").input_ids
        terms = []
        for token in tokenizer(f" {question}", add_special_tokens=False).input_ids:  # one token at a time
            logits = model(torch.tensor([before])).logits[0, -1].double()
            terms.append((logits[token] - logits.exp().sum().log()).item())
            before = [*before, token]
        assert gain == pytest.approx(0.5 * sum(terms) / len(terms), abs=1e-4)
    assert len({round(gain, 4) for gain in gains.tolist()}) == 3


@pytest.mark.parametrize(
    ("word", "gain", "numbers"),
    [("two", 0.3, [2, 3]), ("four", 0.3, [3, 4]), ("two", 0.1, [3]), ("sentence", 9.0, [3]), ("elephant", 9.0, [3])],
)
def test_a_neighbour_is_read_if_the_question_becomes_likelier_with_it(word, gain, numbers):
    index, prefers = TextIndex(TEXT, ByWord()), Prefers(word, gain, units=1)
    (found,) = index.find("three", context=70, reranker=prefers)
    assert found.text == " ".join(SENTENCES[n - 1] for n in numbers)
    assert [len(compared) for _, compared in prefers.asked] == [4]
    assert index.find("three", context=20, reranker=prefers)[0].text == SENTENCES[2]  # both are longer
    assert len(prefers.asked) == 1


@pytest.mark.parametrize(("begins", "is_read"), [("“Its", True), ("It", True), ("Item", False), ("He", False)])
def test_the_unit_after_is_read_if_it_refers_back(begins, is_read):
    town, name = (
        "The child was born in a small town that year.",
        f"{begins} name was Whitby, and the sea was cold there.",
    )
    index, prefers = TextIndex(f"Nobody had heard of any such thing before. {town} {name}", ByWord()), Prefers("x", 0.0)
    (found,) = index.find("born", context=70, reranker=prefers)
    assert (found.text, found.match) == (f"{town} {name}" if is_read else town, town)
    assert index.find("born", context=20, reranker=prefers)[0].text == town  # it is longer
    assert index.find("sea", context=70, reranker=prefers)[0].text == name  # not the other way round
    likelier = Prefers("born", 0.3)
    assert index.find("sea", context=70, reranker=likelier)[0].text == f"{town} {name}"  # unless the question says so


def test_the_best_unit_is_chosen_among_the_best_few_if_the_finders_best_stands_out():
    index = TextIndex(TEXT, ByWord())
    prefers = Prefers("two", 5.0)
    (found,) = index.find("one one two three", reranker=prefers)
    assert (found.text, found.score) == (SENTENCES[1], 1.0)  # the score stays the finder's
    ((asked, compared),) = prefers.asked
    assert (asked, set(compared)) == ("one one two three", set(SENTENCES[:3]))
    assert index.find("one one two three", reranker=Prefers("two", 0.5))[0].text == SENTENCES[0]
    assert index.find("one one two three", reranker=Prefers("six", 5.0))[0].text == SENTENCES[0]  # not among the few
    assert index.find("one one two three", reranker=Prefers("two", 5.0, reach=0.9))[0].text == SENTENCES[0]
    assert index.find("seven", reranker=Prefers("two", 5.0)) == []
    two = index.find("one one two six", count=2, reranker=Prefers("six", 5.0))
    assert [each.text for each in two] == [SENTENCES[5], SENTENCES[0]]


def test_a_unit_below_the_threshold_is_read_only_if_the_model_takes_it_for_the_first():
    finder = ByWord()
    finder.threshold = 1.5
    index = TextIndex(TEXT, finder)
    low, high = index.find("one one four", count=3, reranker=Prefers("four", 5.0))
    assert [(each.text, each.score) for each in (low, high)] == [(SENTENCES[3], 1.0), (SENTENCES[0], 2.0)]
    (alone,) = index.find("one one four", count=3, reranker=Prefers("four", 0.5))
    assert alone.text == SENTENCES[0]


def test_units_about_nobody_that_the_question_names_are_not_compared():
    about = "So said Ann of number two, who came by in the end."
    elsewhere = "This is number two of the sentences, and it goes on."
    text = " ".join([*SENTENCES * 2, about, *SENTENCES * 2, elsewhere, *SENTENCES * 2])
    prefers = Prefers("goes on.", 9.0, reach=9.0)
    assert TextIndex(text, ByWord()).find("What said Ann of two", reranker=prefers)[0].text == about
    assert elsewhere not in [unit for _, units in prefers.asked for unit in units]


def test_no_more_units_are_compared_than_the_re_ranker_takes_whatever_the_count():
    prefers = Prefers("six", 9.0, reach=9.0)
    TextIndex(TEXT, ByWord()).find("one one one three three five six", count=6, reranker=prefers)
    assert [len(units) for _, units in prefers.asked] == [3]


def test_ask_compares_units_and_one_takes_the_finders_best(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(Reranker, "log_probs", lambda self, question, units: Prefers("two", 9.0)(question, units))
    monkeypatch.setattr(Reranker, "reach", 1.0)
    for rerank, best in ((3, SENTENCES[1]), (1, SENTENCES[0])):
        (answer,) = ask(
            model, tokenizer, TEXT, "one one two", finder=ByWord(), context=0, rerank=rerank, max_new_tokens=1
        )
        assert answer.passages[0].text == best
    with pytest.raises(ValueError, match="rerank must be a whole number of at least 1, got 0"):
        ask(model, tokenizer, TEXT, "one", finder=ByWord(), rerank=0)
    with pytest.raises(TypeError, match="questions must be a text or a list of texts, got 5"):
        ask(model, tokenizer, TEXT, 5, finder=ByWord())
