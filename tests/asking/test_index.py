"""An index: passages with their places, follow-ups, and what is kept on disk."""

from __future__ import annotations

import pytest
import torch

from hf_longtrunc import Passage, SentenceEncoder, TextIndex, load_encoder
from hf_longtrunc.asking.finders import Scorer
from hf_longtrunc.asking.passages import unit_spans

SENTENCES = [
    f"This is sentence number {word}, and it goes on for a while."
    for word in ["one", "two", "three", "four", "five", "six"]
]
TEXT = " ".join(SENTENCES)


class ByWord:
    """Scores a unit by the words of the question that it holds."""

    identity, threshold = "by word", 0.0

    def read(self, units, saved=None, *, progress=False):
        def score(question):
            return torch.tensor([float(sum(word in unit for word in question.split())) for unit in units])

        return Scorer(score, {})


def test_passages_are_the_best_units_with_their_places():
    index = TextIndex(TEXT, ByWord())
    assert len(index) == 6
    (found,) = index.find("three")
    assert (found.text, found.score, found.source) == (SENTENCES[2], 1.0, "")
    assert TEXT[found.start : found.end] == found.text
    assert index.find("seven") == []
    assert [each.text for each in index.find("six six one", count=3)] == [SENTENCES[5], SENTENCES[0]]
    (wide,) = index.find("three", context=70)
    assert (wide.text, wide.match, wide.score) == (" ".join(SENTENCES[1:4]), SENTENCES[2], 1.0)
    assert index.find("one", context=70)[0].text == " ".join(SENTENCES[:2])
    assert index.find("three", context=20) == [found]
    (joined,) = index.find("three four four", count=2)
    assert (joined.text, joined.match, joined.score) == (" ".join(SENTENCES[2:4]), SENTENCES[3], 2.0)
    first, second = index.find("six", hops=2)  # every sentence has words of the first
    assert first.text == SENTENCES[5]
    assert second.text in SENTENCES[:5]
    assert len(TextIndex(SENTENCES[0], ByWord()).find("one", hops=2)) == 1  # nothing is left


def test_documents_are_searched_together_and_named():
    index = TextIndex({"a": TEXT, "b": "An elephant is mentioned here and only here, of all places."}, ByWord())
    assert [(each.source, each.start) for each in index.find("elephant six six", count=2)] == [
        ("a", TEXT.index(SENTENCES[5])),
        ("b", 0),
    ]
    (first,) = index.find("number one", context=70)
    (last,) = index.find("six", context=70)  # the unit after it is another document's
    assert (first.text, last.text) == (" ".join(SENTENCES[:2]), " ".join(SENTENCES[4:]))
    assert [each.source for each in index.spread(2)] == ["a", "b"]
    assert [each.text for each in TextIndex(TEXT, ByWord()).spread(2)] == [SENTENCES[0], SENTENCES[5]]


def test_a_follow_up_is_about_both_questions():
    text = "Ann was a tall woman with red hair and no hat. Ann was born in the old town of Leeds, they say. "
    index = TextIndex(f"{text}Bob was born in York, and never once left it.", ByWord())
    assert index.subject("What did she wear?", ["Where was Ann born?", "And why?"]) == "Ann"
    assert index.subject("What did Bob wear?", ["Where was Ann born?"]) is None
    assert index.subject("Why?", ["Was it red?", "And when?"]) == "And when?"
    assert index.subject("Why?", ["Was it Bob?", "Was it Ann?", "Was it red?"]) == "Ann"  # the last who is named
    assert index.subject("Why?", []) is None
    finder = ByWord()
    finder.threshold = 1.2
    (both,) = TextIndex(text, finder).find("born", before="old")  # 1 each, over .8
    assert both.score == pytest.approx(1.25)
    (found,) = index.find("was born in", before="Ann Leeds in")
    assert found.text == "Ann was born in the old town of Leeds, they say."
    (alone,) = index.find("was born in York")
    assert alone.text.startswith("Bob")


def test_an_index_is_kept_for_its_text_and_finder(encoder_folder, tmp_path, monkeypatch):
    finder = SentenceEncoder(*load_encoder(encoder_folder, device="cpu"), threshold=-1)
    index = TextIndex(TEXT, finder)
    index.save(tmp_path)
    monkeypatch.setattr(finder, "encode", lambda texts, **_: torch.ones(len(texts), 16) / 4)
    loaded = TextIndex.load(tmp_path, TEXT, finder)
    monkeypatch.undo()
    assert loaded.find("sentence four", count=2, context=60) == index.find("sentence four", count=2, context=60)
    with pytest.raises(ValueError, match="the index of another text: expected"):
        TextIndex.load(tmp_path, TEXT + " More.", finder)
    with pytest.raises(ValueError, match="the index of another text: expected"):
        TextIndex.load(tmp_path, {"a": TEXT}, finder)
    with pytest.raises(ValueError, match="the index of another finder: expected by word, got encoder"):
        TextIndex.load(tmp_path, TEXT, ByWord())
    with monkeypatch.context() as other_version:
        other_version.setattr("hf_longtrunc.asking.index.unit_spans", lambda text: unit_spans(text)[1:])
        with pytest.raises(ValueError, match=r"in \d+ units, and this version .* into \d+; make a new one"):
            TextIndex.load(tmp_path, TEXT, finder)
    data = tmp_path / "text_index.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="is damaged"):
        TextIndex.load(tmp_path, TEXT, finder)


def test_a_question_and_its_numbers_are_checked_whatever_is_found():
    index = TextIndex(TEXT, ByWord())
    with pytest.raises(TypeError, match="question must be a text, got None"):
        index.find(None)
    for name, wrong in (("count", 0), ("context", -1), ("hops", 3)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            index.find("seven", **{name: wrong})


def test_a_text_is_a_string_or_named_strings():
    with pytest.raises(TypeError, match="text must be a string or map names to strings, got 'a': int"):
        TextIndex({"a": 3}, ByWord())
    with pytest.raises(ValueError, match="nothing but white space"):
        TextIndex(" \n", ByWord())
    with pytest.raises(ValueError, match="count must be a whole number of at least 1, got 0"):
        TextIndex(TEXT, ByWord()).find("one", count=0)
    assert isinstance(TextIndex(TEXT, ByWord()).find("one")[0], Passage)
