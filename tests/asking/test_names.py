"""Names in questions, and passages about the right person and another matter."""

from __future__ import annotations

import pytest
import torch

from hf_longtrunc import BM25, TextIndex
from hf_longtrunc.asking.finders import Scorer, content_words
from hf_longtrunc.asking.names import Capitals, has_a_name, without_names

TEXT = "There Ezra Quill rose. Where was it, she asked, and which way did NASA look? What a road! Ann fell."


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Which hat did Ezra Quill's aunt wear?", ["Ezra", "Quill"]),
        ("Ezra had a hat. What was it?", ["Ezra"]),  # the text has the first word as a name
        ("Which way did the road go? Where?", []),
        ("“Did old Mr Élan fall?”", ["Élan"]),
        ("Tobias wore a hat.", []),  # opens a sentence, and the text does not have it
        ("What did NASA see in I?", ["NASA"]),
        ("", []),
    ],
)
def test_a_name_is_a_word_with_a_capital_inside_a_sentence(question, names):
    rest = "the long and short of it was that they all went away again"
    assert Capitals([TEXT, rest * 3]).names(question) == names


def test_in_a_text_that_capitalises_nouns_no_word_is_a_name():
    german = ["Der Pfarrer hatte einen Pfau, und die Frau des Müllers sah den Dieb im Garten."]
    assert Capitals(german).names("Wer hat den Pfau von Ezra Quill gestohlen?") == []


def test_a_name_is_a_whole_word():
    assert has_a_name(["Ezra"], "to Ezra's")
    assert not has_a_name(["Ezra"], "Ezran")
    assert has_a_name([], "")


FILLER = " ".join(f"Nobody in the whole village ever spoke of anything but barley number {n}." for n in range(40))
FACTS = "Ezra Quill was born at Whitby in the year of frost. For the fair Ann Lee had bought a new coat, a green one. "


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Where was Ezra Quill born?", "Ezra"),
        ("What coat had Ann Lee bought?", "For the fair"),
        ("What coat had Ezra Quill bought?", ""),  # Ann's coat is the best unit, and Ezra's birth is near
        ("What coat had Tobias Pym bought?", ""),  # whom the text does not name
        ("Which horse was Ann Lee fond of?", ""),  # what the text does not say
    ],
)
def test_a_passage_is_about_whom_and_what_a_question_names(question, found):
    pytest.importorskip("bm25s")
    text = f"{FACTS.split('. ')[0]}. {FILLER} {FACTS.split('. ')[1]} {FILLER}"
    passages = TextIndex(text, BM25()).find(question)
    assert [each.text[: len(found)] for each in passages] == [found] * bool(found)


class Counts:
    """Finds the units with "born" in them; a passage is as relevant as it has words of the question."""

    identity, threshold, least_relevance = "counts", 0.0, 0.5

    def read(self, units, saved=None, *, progress=False):
        return Scorer(lambda question: torch.tensor([float(unit.count("born")) for unit in units]), {})

    def relevance(self, question, names, passage):
        words = content_words(question, names)
        return sum(question[start:end] in passage for start, end in words) / max(len(words), 1)


def test_a_follow_up_has_the_names_of_the_question_before_it():
    pytest.importorskip("bm25s")
    index = TextIndex(FACTS + FILLER, Counts())
    assert index.find("Where was this born?", before="What number had Ezra Quill's cart?")
    assert not index.find("Where was this born?", before="What number had Tobias Pym's cart?")
    assert not index.find("Where was this person born?", before="What number had Ezra Quill's cart?")  # half of them


def test_a_passage_stands_out_if_it_is_more_relevant_than_the_least(monkeypatch):
    pytest.importorskip("bm25s")
    index = TextIndex(FACTS + FILLER, Counts())
    assert index.find("Was Ezra born in the frost of the summer?")  # two of three
    assert not index.find("Was Ezra born in the heat of the summer?")  # one of three
    text = f"Ezra was born, and born again, in the village. {FILLER} Ezra was born in the heat of a summer, they say."
    assert not TextIndex(text, Counts()).find("Was Ezra born in heat?")
    assert len(TextIndex(text, Counts()).find("Was Ezra born in heat?", count=2)) == 2  # the second has it
    assert not index.find("And the summer?")
    nothing = TextIndex(FILLER, Counts())
    monkeypatch.setattr(Counts, "relevance", None)  # not asked where nothing is found
    assert not nothing.find("Was Ezra born?")
    monkeypatch.undo()
    text = (
        f"Ezra was born, and born again, in the village. {FILLER} The old mill was born of water and of summer's heat."
    )
    halves = TextIndex(text, Counts())
    assert not halves.find("Was Ezra born in water?")  # one of two
    assert [each.text[:6] for each in halves.find("Was Ezra born in water?", hops=2)] == ["Ezra w", "The ol"]


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        ([], "Ann Lee sat.", "Ann Lee sat."),
        (["Ann", "Lee"], "Lee and Ann\nLee sat by Annie's", "he and he sat by Annie's"),
        (["An", "Ann"], "Ann's hat, An", "he's hat, he"),
        (["Ann"], "of anN", "of anN"),
    ],
)
def test_runs_of_names_become_he(names, text, expected):
    assert without_names(names, text) == expected
