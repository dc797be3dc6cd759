"""Names in a question: a passage that answers has one of them near. Its other words tell what it asks of them.

A name is a word with a capital letter inside a sentence. In a text that capitalises its nouns, such as a German one, a
capital says nothing, and no word counts as a name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_MOST = 0.2  # share of words inside sentences with a capital letter; German texts have a third
_WORD = re.compile(r"[^\W\d_]{2,}")
_INSIDE = re.compile(
    r"(?<=[^\W_][ \n]|[,;][ \n])[^\W\d_]{2,}"
)  # after a word or a comma; a title's full stop is no matter
_TITLES = frozenset(("Mr", "Mrs", "Ms", "Miss", "Dr", "Sir", "Lady", "Lord", "St"))


class Capitals:
    """The words that a text writes with a capital letter inside its sentences.

    Args:
        texts: its parts.
    """

    def __init__(self, texts: Iterable[str]):
        self._capital: set[str] = set()
        self._small: set[str] = set()
        count = capitals = 0
        for text in texts:
            for match in _INSIDE.finditer(text):
                is_capital = match[0][0].isupper()
                (self._capital if is_capital else self._small).add(match[0])
                count += 1
                capitals += is_capital
        self.mean_names = capitals <= _MOST * count

    def names(self, question: str) -> list[str]:
        """Return the names in a question; a word that opens a sentence of it is one if the text has it as a name."""
        if not self.mean_names:
            return []
        inside = {match.start() for match in _INSIDE.finditer(question)}
        found: list[str] = []
        for match in _WORD.finditer(question):
            word = match[0]
            is_a_name = word in self._capital and word.lower() not in self._small
            if word[0].isupper() and (match.start() in inside or is_a_name) and word not in _TITLES:
                found.append(word)
        return found


def has_a_name(names: Collection[str], text: str) -> bool:
    """Whether one of the names is in a text; True if there are none."""
    return not names or not set(names).isdisjoint(_WORD.findall(text))


def without_names(names: Collection[str], text: str) -> str:
    """Return a text with "he" for each run of names: what it says of whoever they are.

    Examples:
        >>> without_names(["Ann", "Lee"], "What did Ann Lee mend?")
        'What did he mend?'
    """
    if not names:
        return text
    name = "|".join(map(re.escape, names))
    return re.sub(rf"\b(?:{name})(?:\s+(?:{name}))*\b", "he", text)
