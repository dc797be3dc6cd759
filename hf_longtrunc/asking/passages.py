"""A text cut into units that a finder scores, and the best units made into passages that a model reads.

A unit is a sentence or several short ones, never longer than `LONGEST` characters. A passage is a unit, often with the
one before or after it; passages that touch are one. Everything is a span of characters of the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SHORTEST, LONGEST = 40, 600
CONTEXT = 300  # characters of a neighbour that may be read too
UNITS = 6  # of 140 facts told in other words in two novels, the right unit was always among the best six
GUIDANCE = 1.5  # on two novels 1.25 answered less, and 2 much less
_BREAK = re.compile(
    "(?<=[.!?\u2026])[\"'\u201d\u2019)\\]]*\\s+|\\n\\s*\\n|(?<=[\u3002\uff01\uff1f])"
)  # quotes close; CJK has no space
_REFERS = re.compile(r"\W*(?:It|Its|They|Their)\b")
_TAG = re.compile('[,.!?\u2014-]["\'\u201d\u2019]\\s+[^"\u201c\u201d\u2018]{1,80}\\.$')  # as "said Ann."
_OPENS = ('"', "'", "\u201c", "\u2018")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Messrs|Prof|Rev|Hon|Capt|Col|Gen|Sgt|Lt|No|vs|etc)|\b[A-Za-z])\.$")


@dataclass(frozen=True)
class Passage:
    """A stretch of a text that was read for a question.

    Attributes:
        start: its first character in the text.
        end: the character after its last.
        text: from start to end.
        score: of its best unit, as the finder gives it; higher is better, and scales differ between finders.
        source: the name of the document; empty where the text is a single string.
        match: the text of its best unit.

    Examples:
        >>> Passage(0, 10, "It rained.", 0.7).text
        'It rained.'
    """

    start: int
    end: int
    text: str
    score: float
    source: str = ""
    match: str = ""


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each sentence.

    Paragraphs end sentences. Common abbreviations, initials, and a mark before a small letter do not, nor do the words
    that interrupt a quotation: "Come," said Ann. "It rains."
    """
    start = 0
    for found in _BREAK.finditer(text):
        following = text[found.end() : found.end() + 1]
        goes_on = following.islower() or (
            following in _OPENS and _TAG.search(text, max(start, found.start() - 90), found.start())
        )
        if goes_on and found[0].count("\n") < 2:
            continue
        if _ABBREVIATION.search(text, max(start, found.start() - 10), found.start()):
            continue
        yield from _stripped(text, start, found.end())
        start = found.end()
    yield from _stripped(text, start, len(text))


def unit_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of the units of a text, in order: nothing but white space lies between them.

    A sentence under `SHORTEST` characters goes with the next one, and one over `LONGEST` is cut at white space, or
    anywhere where there is none. Time and memory are linear in the text.

    Examples:
        >>> text = "He rose. It was the Tuesday before the great fair, and it rained."
        >>> [text[start:end] for start, end in unit_spans(text)]
        ['He rose. It was the Tuesday before the great fair, and it rained.']
    """
    units: list[tuple[int, int]] = []
    for start, end in sentence_spans(text):
        begin = units.pop()[0] if units and units[-1][1] - units[-1][0] < SHORTEST else start
        while end - begin > LONGEST:
            cut = text.rfind(" ", begin + 1, begin + LONGEST)
            cut = begin + LONGEST if cut < 0 else cut
            units += _stripped(text, begin, cut)
            begin = cut
        units += _stripped(text, begin, end)
    return units


def refers_back(sentence: str) -> bool:
    """Whether a sentence begins with an English pronoun for a thing that the sentence before it may name.

    Examples:
        >>> refers_back("Its number was 4711."), refers_back("He knew it.")
        (True, False)
    """
    return _REFERS.match(sentence) is not None


def _stripped(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    part = text[start:end]
    if kept := part.strip():
        begin = start + part.index(kept[0])
        yield begin, begin + len(kept)
