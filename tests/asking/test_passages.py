"""Units and passages: spans of a text, against a naive reading of it."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from hf_longtrunc.asking.passages import LONGEST, SHORTEST, sentence_spans, unit_spans


def test_sentences_end_where_a_reader_ends_them():
    text = 'Mr. Smith, of St. Ives, "was there." J. R. came!\n\nCHAPTER II\n\nHe left… '
    text += "“Why?” said she. “No!”\n\nand so 他走了。她来了。"
    assert [text[start:end] for start, end in sentence_spans(text)] == [
        *(
            'Mr. Smith, of St. Ives, "was there."',
            "J. R. came!",
            "CHAPTER II",
            "He left…",
            "“Why?” said she. “No!”",
            "and so 他走了。",
            "她来了。",
        ),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "“Come,” said Ann.| He went.",
        "“Come,” said Ann. “It rains.”| “No.”",
        '"Come!" cried the old man, and rose. "It rains."| He went.',
        "“Come,” said Ann.|\n\n“It rains.”",  # a new paragraph is another speaker's
        "He wrote “rain” twice.| “Come,” said Ann.",  # no speech
        f"“Come,” said Ann{' again' * 13}.| “It rains.”",  # 86 characters: too long for words between two halves
    ],
)
def test_words_that_interrupt_a_speech_end_no_sentence(text):
    parts = text.split("|")
    whole = "".join(parts)
    assert [whole[start:end] for start, end in sentence_spans(whole)] == [part.strip() for part in parts]


def test_units_hold_all_of_a_text_once_and_in_order():
    draw = random.Random(0)
    for _ in range(200):
        words = ["".join(draw.choices("abé.!?”", k=draw.randint(1, 90))) for _ in range(draw.randint(1, 60))]
        text = "".join(word + draw.choice([" ", "\n", "\n\n", ". "]) for word in words)
        units = unit_spans(text)
        assert re.sub(r"\s", "", "".join(text[start:end] for start, end in units)) == re.sub(r"\s", "", text)
        assert all(first[1] <= second[0] for first, second in pairwise(units))
        assert all(0 < end - start <= LONGEST and text[start:end].strip() == text[start:end] for start, end in units)
    assert unit_spans(" \n ") == []


def test_short_sentences_go_together_and_long_ones_are_cut():
    short = unit_spans("Yes. " * 30)
    assert all(end - start >= SHORTEST for start, end in short[:-1])
    assert [end - start for start, end in unit_spans("x" * 1500)] == [600, 600, 300]
    assert all(end - start <= LONGEST for start, end in unit_spans("word " * 400))
