"""Stretches of novels with facts in them, and questions about the facts: the texts of the battery of `ask`."""

from __future__ import annotations

import random
import re
import zlib
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from instruments import facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_longtrunc import Passage

DEPTHS = (0.05, 0.35, 0.65, 0.95)
BLOCK = 64  # tokens: every second fact lies across an edge of such blocks
SHARED = ("number", "attribute", "similar", "paraphrase", "place", "person", "birth")
NOTHING = ("off-topic", "unknown name", "unsaid")
KINDS = (*SHARED, "unshared", "two hops", "follow-up", *NOTHING)
_UNSHARED = 7  # facts of a text whose question shares no word with them


class Question(NamedTuple):
    """A question about a text.

    Attributes:
        kind: one of `KINDS`.
        depth: where its fact stands, from 0 to 1.
        text: the question.
        stated: the sentences that answer it; none where nothing does.
        expected: the word that a right answer holds; empty where nothing answers.
        wrong: the values of the other facts of this kind, which a right answer does not hold.
    """

    kind: str
    depth: float
    text: str
    stated: tuple[str, ...] = ()
    expected: str = ""
    wrong: tuple[str, ...] = ()

    def scores(self, answer: str) -> tuple[float, float]:
        """Return (lenient, strict): the value is in the answer; and no value of another fact is."""
        lenient = bool(self.expected) and _holds(answer, self.expected)
        return float(lenient), float(lenient and not any(_holds(answer, value) for value in self.wrong))

    def is_read_in(self, passages: Sequence[Passage]) -> bool:
        """Whether all sentences that answer are in the passages; False where nothing answers."""
        read = [" ".join(each.text.split()) for each in passages]
        return bool(self.stated) and all(any(" ".join(s.split()) in part for part in read) for s in self.stated)


class FactText:
    """A stretch of a novel with facts in it, and questions about them.

    Args:
        novel: the text that facts are hidden in, at least ten times as long in characters as `length` in tokens.
        tokenizer: a fast one; the length is counted in its tokens.
        length: of the text, in tokens, to within a few.
        trial: which draw; another one in every novel. The stretch begins at the same place for every length.
        part: of the phrasings: "choose" or "report".
        seed: of the draws.

    Attributes:
        text: the stretch with its facts.
        questions: one of each kind, seven of "unshared", two each of those that nothing answers. The last of a
            conversation, "follow-up", is about the person of the first, "number", and does not name them.

    Raises:
        ValueError: the novel is too short.
    """

    def __init__(self, novel: str, tokenizer: Any, length: int, trial: int, *, part: str = "report", seed: int = 0):
        draw = random.Random(f"{seed}/{part}/{trial}/{zlib.crc32(novel.encode())}")
        self.length, self.trial, self.part = length, trial, part
        self.questions, stated = _drawn(draw, trial, part)
        start = _sentence_end(novel, int(draw.uniform(0.02, 0.3) * len(novel)))
        sizes = tokenizer([f" {sentence}" for _, sentence in stated], add_special_tokens=False).input_ids
        room = length - sum(map(len, sizes))
        ends = _token_ends(tokenizer, novel[start : start + 8 * length])
        if room < 1 or len(ends) < room:
            raise ValueError(f"a text of {length} tokens needs a longer novel, or more tokens: {len(ends)} are there")
        stretch = novel[start : start + ends[room - 1]]
        parts, last = [], 0
        for n, (depth, sentence) in enumerate(sorted(stated)):
            place = min(int(depth * room), room - 1)
            if n % 2:  # so that it begins shortly before an edge
                place = max(place // BLOCK * BLOCK - 6, 0)
            at = max(last, _sentence_end(stretch, ends[place]))
            parts += [stretch[last:at].rstrip(), f"{sentence} "]
            last = at
        self.text = " ".join([*parts, stretch[last:]]).strip()


def _holds(answer: str, value: str) -> bool:
    return re.search(rf"\b{re.escape(value.removesuffix('s'))}", answer, re.IGNORECASE) is not None


def _token_ends(tokenizer: Any, text: str) -> Sequence[int]:
    """Return where each token of a text ends, 2**16 characters at a time: a token's offsets take some kilobyte."""
    ends = array("q")
    for first in range(0, len(text), 2**16):
        part = text[first : first + 2**16]
        found = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends.extend(first + end for _, end in found.offset_mapping)
    return ends


def _sentence_end(text: str, place: int) -> int:
    """Return where the first sentence that ends in or after `place` has ended."""
    found = re.compile('[a-z][.!?]["\u201d\u2019]*\\s+(?=[A-Z"\u201c\u2018])').search(text, place)
    return found.end() if found else len(text)


def _drawn(draw: random.Random, trial: int, part: str) -> tuple[list[Question], list[tuple[float, str]]]:
    """Draw a text's questions, and (depth, sentence) of all facts in it."""
    people = zip(draw.sample(facts.GIVEN, 20), draw.sample(facts.SURNAMES, 20), strict=True)
    names = iter([" ".join(each) for each in people])
    questions: list[Question] = []
    stated: list[tuple[float, str]] = []

    def state(depth: float, sentence: str) -> str:
        stated.append((min(max(depth + draw.uniform(-0.04, 0.04), 0.0), 0.999), sentence))
        return sentence

    def depth_of(number: int) -> float:
        return DEPTHS[(number + trial) % 4]

    first = next(names)
    for number, (kind, of) in enumerate(facts.KINDS.items()):
        about = first if kind in ("number", "birth") else next(names)
        statement, thing = draw.choice(facts.half(of.statements, part)), draw.choice(of.things)
        others = 3 if kind == "similar" else 1
        values = (
            draw.sample(of.values, 1 + others) if kind != "person" else [about, *(next(names) for _ in range(others))]
        )
        depth = depth_of(number)
        fact = state(depth, statement.format(name=about, thing=thing, value=values[0]))
        for value in values[1:]:  # the same thing of somebody else, or something else that somebody did
            line = statement if kind == "similar" else draw.choice(facts.half(of.statements, part))
            deed = draw.choice([each for each in of.things if each != thing]) if kind == "person" else thing
            state(draw.random(), line.format(name=next(names) if kind != "person" else "", thing=deed, value=value))
        asks = draw.choice(facts.half(of.questions, part)).format(name=about, thing=thing)
        expected, *wrong = [value.split()[-1] for value in values]
        questions.append(Question(kind, depth, asks, (fact,), expected, tuple(wrong)))
    birth = questions[-1]
    for n, (statement, asks, values_of) in enumerate(draw.sample(facts.half(facts.UNSHARED, part), _UNSHARED)):
        value, depth = draw.choice(values_of.split(",")), depth_of(n)
        questions.append(Question("unshared", depth, asks, (state(depth, statement.format(value=value)),), value))
    name, landlord = next(names), next(names)
    street, wrong_street = draw.sample(facts.STREETS, 2)
    hop = state(depth_of(9), draw.choice(facts.half(facts.FIRST_HOPS, part)).format(name=name, other=landlord))
    lives = facts.half(facts.SECOND_HOPS, part)
    end = state(draw.random(), draw.choice(lives).format(other=landlord, value=street))
    state(draw.random(), draw.choice(lives).format(other=next(names), value=wrong_street))
    asks = draw.choice(facts.half(facts.TWO_HOPS, part)).format(name=name)
    expected, wrong_one = street.split()[0], wrong_street.split()[0]
    questions.append(Question("two hops", depth_of(9), asks, (hop, end), expected, (wrong_one,)))
    questions.append(birth._replace(kind="follow-up", text=draw.choice(facts.half(facts.FOLLOW_UPS, part))))
    kinds = [kind for kind in facts.KINDS if kind != "person"]
    unsaid = draw.sample([kind for kind in kinds if kind not in ("number", "birth")], 2)  # which is said of the first
    for nothing, about, likes in (("unknown name", next(names), draw.sample(kinds, 2)), ("unsaid", first, unsaid)):
        for asked in (facts.KINDS[like] for like in likes):
            asks = draw.choice(facts.half(asked.questions, part)).format(name=about, thing=draw.choice(asked.things))
            questions.append(Question(nothing, 0.0, asks))
    questions += [Question("off-topic", 0.0, each) for each in draw.sample(facts.half(facts.OFF_TOPIC, part), 2)]
    return questions, stated
