"""Prompts of an exact token length: a question about sentences that are hidden, at given depths, in filler.

A prompt is put together from the tokens of whole sentences, each tokenised alone, so its length is a sum; the filler's
first sentence loses tokens from its start to make it exact.
"""

from __future__ import annotations

import hashlib
import re
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hf_longtrunc.arguments import check_fraction
from hf_longtrunc.templates import template_parts

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

REPEATED_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Haystack:
    """Filler for prompts: a few sentences again and again, or stretches of a text.

    Args:
        tokenizer: a transformers tokenizer; the special tokens that it opens a text with open the prompt.
        text: the filler; None repeats `REPEATED_FILLER`. A text is cut into sentences, a prompt takes a part
            at a random place, and a text that is too short for the length starts again from its beginning.

    `filler` names it in records: "repeated", or "text" with a digest.

    Raises:
        ValueError: the text holds no sentence.
    """

    def __init__(self, tokenizer: Any, text: str | None = None):
        self.tokenizer = tokenizer
        # Two texts must not pass for one cell of a journal.
        self.filler = "repeated" if text is None else f"text {hashlib.sha256(text.encode()).hexdigest()[:8]}"
        sentences = _sentences(REPEATED_FILLER if text is None else text)
        if not sentences:
            raise ValueError(
                "text holds no sentence to make filler of; give another text, or None for a repeated filler"
            )
        self._sentences = self._tokens_of(sentences)

    def prompt(
        self,
        length: int,
        opening: str,
        needles: Sequence[tuple[float, str]],
        question: str,
        draw: random.Random,
        *,
        turns: Sequence[str] | None = None,
    ) -> list[int]:
        """Return [opening | filler with the needles in it | question], exactly `length` tokens.

        With `turns` it is a conversation in the tokenizer's chat template, up to where the assistant is to speak: the
        first user turn is the prompt above, the turns are what assistant and user say after it, in their order.

        Each needle (depth, sentence) stands between two sentences of filler, at the one of their ends that is nearest
        to depth times the filler's length; needles at one place keep their order.

        Raises:
            ValueError: the length leaves no room for filler, a depth lies outside [0, 1], or there is no chat
                template.
        """
        if turns is None:
            opened: list[int] = self.tokenizer(opening).input_ids
            (asked,) = self._tokens_of([question])
        else:
            opened, asked = self._conversation(opening, question, turns)
        for depth, _ in needles:
            check_fraction("depth", depth)
        hidden = self._tokens_of([sentence for _, sentence in needles])
        around = len(opened) + len(asked) + sum(map(len, hidden))
        if length <= around:
            raise ValueError(f"length must be at least {around + 1} tokens for this prompt, got {length}")
        sentences = self._stretch(length - around, draw.randrange(len(self._sentences)))
        places = [_nearest_boundary(sentences, depth * (length - around)) for depth, _ in needles]
        for index in sorted(range(len(places)), key=lambda index: (places[index], index), reverse=True):
            sentences.insert(places[index], hidden[index])
        return [*opened, *(token for sentence in sentences for token in sentence), *asked]

    def _conversation(self, opening: str, question: str, turns: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the tokens before and after the filler of a conversation in the tokenizer's chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("chat needs a tokenizer with a chat template, this one has none")
        filler = "<<filler>>"
        messages = [{"role": "user", "content": f"{opening}{filler} {question}".rstrip()}]
        messages += [{"role": ("assistant", "user")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        before, behind = template_parts(self.tokenizer, messages, filler)
        return self._ids(before), self._ids(behind)

    def _ids(self, part: str) -> list[int]:
        """Return the tokens of a part of a conversation."""
        ids: list[int] = self.tokenizer(part, add_special_tokens=False).input_ids
        return ids

    def _stretch(self, room: int, last: int) -> list[list[int]]:
        """Return sentences of `room` tokens together, ending with sentence `last`; the first loses its start to fit."""
        backwards: list[list[int]] = []
        while room > 0:
            sentence = self._sentences[(last - len(backwards)) % len(self._sentences)]
            backwards.append(sentence[-room:])
            room -= len(sentence)
        return backwards[::-1]

    def _tokens_of(self, sentences: Sequence[str]) -> list[list[int]]:
        spaced = [" " + sentence for sentence in sentences]
        tokens: list[list[int]] = self.tokenizer(spaced, add_special_tokens=False, verbose=False).input_ids
        return tokens


def _sentences(text: str) -> list[str]:
    sentences = [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
    return [sentence for sentence in sentences if sentence]


def _nearest_boundary(sentences: Sequence[Sequence[int]], position: float) -> int:
    """Return after how many sentences the token count is nearest to `position`."""
    ends = list(accumulate(map(len, sentences), initial=0))
    return min(range(len(ends)), key=lambda index: abs(ends[index] - position))
