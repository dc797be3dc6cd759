"""A text, or several, cut into units and read by a finder: made once, asked often, saved and loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.arguments import check_int
from hf_longtrunc.asking.finders import check_finder
from hf_longtrunc.asking.names import Capitals, has_a_name
from hf_longtrunc.asking.passages import Passage, refers_back, unit_spans
from hf_longtrunc.asking.rerank import NEIGHBOUR
from hf_longtrunc.saving import load_folder, save_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

    from hf_longtrunc.asking.finders import Finder
    from hf_longtrunc.asking.rerank import Reranker

_KIND = "text_index"
_FOLLOWS = 0.8  # chosen on 12 follow-ups, which it all finds, of two novels
_NEAR = 8  # units around one that may have the name of whom it tells


class TextIndex:
    """A text that a finder has read: the best passages for a question are looked up in it.

    Args:
        text: one text, or a mapping from the name of each document to its text.
        finder: `BM25()`, a `SentenceEncoder`, or a `Fused` of both.
        saved: tensors that the same finder computed of the same text, see `load`.
        progress: show a bar while the finder reads.

    Raises:
        TypeError: text is neither a string nor a mapping from strings to strings, or finder is none.
        ValueError: there is nothing in it.

    Examples:
        >>> text = "It rained for a week, and the moor was a lake. The code of the gate was 4711, as all of us knew."
        >>> TextIndex(text, BM25()).find("The code of the gate?")[0].text
        'The code of the gate was 4711, as all of us knew.'
    """

    def __init__(
        self,
        text: str | Mapping[str, str],
        finder: Finder,
        *,
        saved: Mapping[str, Tensor] | None = None,
        progress: bool = False,
    ):
        self.documents = documents_of(text)
        self.finder = check_finder(finder)
        self._spans = {name: unit_spans(document) for name, document in self.documents.items()}
        self._units = [(name, n) for name, spans in self._spans.items() for n in range(len(spans))]
        self._capitals = Capitals(self.documents.values())
        self._scorer = finder.read([self._text(name, n) for name, n in self._units], saved, progress=progress)

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self._units)

    def find(
        self,
        question: str,
        *,
        before: str | None = None,
        count: int = 1,
        context: int = 0,
        hops: int = 1,
        reranker: Reranker | None = None,
    ) -> list[Passage]:
        """Return the passages that stand out for a question, the best first; none if no unit does.

        Args:
            question: of the user.
            before: the subject of an earlier question, if this is a follow-up, see `subject`. Names in it are put
                before the question; without names a unit's score is the smaller of both, over .8.
            count: how many units at most; passages that touch become one.
            context: a unit is read with the one before and the one after, each of at most so many characters: a fact
                may begin in one sentence and end in the next.
            hops: 2 looks again with the words of the first unit, for passages elsewhere.
            reranker: takes one of the best units for the first, if the finder's best stands out, and reads a neighbour
                only where the question becomes likelier with it. If the unit after it begins with "it" or "they", that
                one is read.

        Raises:
            TypeError: question is no text.
            ValueError: a number is out of range.
        """
        if not isinstance(question, str):
            raise TypeError(f"question must be a text, got {question!r}")
        check_int("count", count, minimum=1)
        check_int("context", context, minimum=0)
        check_int("hops", hops, minimum=1, maximum=2)
        names, said = (self._capitals.names(each or "") for each in (question, before))
        if said:
            question, before, names = f"{' '.join(said)}: {question}", None, [*said, *names]
        how: dict[str, Any] = {"count": count, "context": context, "reranker": reranker}
        found = self._best(question, before, names, (), **how)
        if not found:
            return []
        if hops == 2:
            found += self._best(f"{question} {found[0].match}", None, (), found, **how)
        return found if self._is_relevant(found, question, names) else []

    def _best(
        self,
        question: str,
        before: str | None,
        names: Sequence[str],
        besides: Sequence[Passage],
        *,
        count: int,
        context: int,
        reranker: Reranker | None,
    ) -> list[Passage]:
        """Return the passages above the threshold, near a name and outside of others, the best first."""
        scores, threshold = self._scorer.score(question), self.finder.threshold
        if before is not None:
            scores = torch.minimum(scores, self._scorer.score(before)) / _FOLLOWS
        for n, (name, own) in enumerate(self._units if besides else ()):
            start, end = self._spans[name][own]
            if any(each.source == name and each.start < end and start < each.end for each in besides):
                scores[n] = -torch.inf
        among = max(count, 1 if reranker is None else reranker.units)
        best = scores.topk(min(among, len(scores))).indices.tolist()

        first, both = best[0], f"{before or ''} {question}".strip()
        if scores[first] <= threshold or not self._is_near(first, names):
            return []
        if reranker is not None:
            reach = scores[first] - reranker.reach
            near = [first, *(n for n in best[1 : reranker.units] if scores[n] >= reach and self._is_near(n, names))]
            first = self._likeliest(near, scores, both, reranker)
        others = (n for n in best if n != first and scores[n] > threshold and self._is_near(n, names))
        found: list[Passage] = []
        for n in [first, *islice(others, count - 1)]:
            span = self._around(n, context, both, reranker)
            self._add(found, n, span, scores[n].item())
        return found

    def _likeliest(self, units: list[int], scores: Tensor, question: str, reranker: Reranker) -> int:
        """Return the unit of the highest score with the re-ranker's gain."""
        if len(units) == 1:
            return units[0]
        gains = reranker(question, [self._text(*self._units[n]) for n in units])
        return units[int((scores[units] + gains).argmax())]

    def _is_near(self, unit: int, names: Sequence[str]) -> bool:
        """Whether one of the names is in a unit or near it; True if there are none."""
        name, n = self._units[unit]
        spans = self._spans[name]
        start, end = spans[max(n - _NEAR, 0)][0], spans[min(n + _NEAR, len(spans) - 1)][1]
        return has_a_name(names, self.documents[name][start:end])

    def _is_relevant(self, passages: Sequence[Passage], question: str, names: Sequence[str]) -> bool:
        """Whether passages are about the matter of a question too, and not about those alone whom it names."""
        least = getattr(self.finder, "least_relevance", None)
        if least is None:
            return True
        read = " ".join(" ".join(each.text for each in passages).split())
        return bool(self.finder.relevance(question, names, read) > least)  # type: ignore[attr-defined]

    def subject(self, question: str, earlier: Sequence[str]) -> str | None:
        """Return what a follow-up may be about: the names in the last of the earlier questions that has any.

        If none has, the last of them. None for a question with a name of its own, or the first one.
        """
        if not earlier or self._capitals.names(question):
            return None
        named = (names for said in reversed(earlier) if (names := self._capitals.names(said)))
        return " ".join(next(named, [earlier[-1]]))

    def spread(self, count: int) -> list[Passage]:
        """Return units at even distances through all documents, in their order: for a question about the whole."""
        places = torch.linspace(0, len(self) - 1, min(check_int("count", count, minimum=1), len(self)))
        found: list[Passage] = []
        for n in places.round().long().tolist():
            self._add(found, n, self._span(n), 0.0)
        return found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the finder's tensors, with the identities of finder and text, see `hf_longtrunc.saving`."""
        settings = {"finder": self.finder.identity, "text": _digest(self.documents), "units": len(self)}
        save_folder(folder, _KIND, self._scorer.tensors, settings)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], text: str | Mapping[str, str], finder: Finder) -> TextIndex:
        """Return the index that was saved of this text and this finder; nothing is computed again.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or was made of another text or by another finder.
        """
        tensors, settings = load_folder(folder, _KIND, {}, ("finder", "text", "units"))
        expected = {"finder": finder.identity, "text": _digest(documents_of(text))}
        for name, value in expected.items():
            if settings[name] != value:
                raise ValueError(
                    f"{folder} is the index of another {name}: expected {value}, got {settings[name]}; make a new one"
                )
        index = cls(text, finder, saved=tensors)
        if len(index) != settings["units"]:
            raise ValueError(
                f"{folder} is the index of a text in {settings['units']} units, and this version of hf_longtrunc cuts "
                f"it into {len(index)}; make a new one"
            )
        return index

    def _span(self, unit: int) -> tuple[int, int]:
        name, n = self._units[unit]
        return self._spans[name][n]

    def _text(self, name: str, n: int) -> str:
        start, end = self._spans[name][n]
        return self.documents[name][start:end]

    def _around(self, unit: int, context: int, question: str, reranker: Reranker | None) -> tuple[int, int]:
        """Return the span of a unit with its neighbours of at most `context` characters, see `find`."""
        name, n = self._units[unit]
        spans = self._spans[name]
        start, end = spans[n]
        before, after = (
            spans[at] if 0 <= at < len(spans) and spans[at][1] - spans[at][0] <= context else spans[n]
            for at in (n - 1, n + 1)
        )
        wider = list(dict.fromkeys([(start, end), (before[0], end), (start, after[1]), (before[0], after[1])]))
        if reranker is None or len(wider) == 1:
            return wider[-1]
        if after != spans[n] and refers_back(self.documents[name][slice(*after)]):
            return start, after[1]
        gains = reranker.log_probs(question, [self.documents[name][slice(*span)] for span in wider])
        gains[1:] -= NEIGHBOUR
        return wider[int(gains.argmax())]

    def _add(self, found: list[Passage], unit: int, span: tuple[int, int], score: float) -> None:
        """Append a passage, or widen one that it touches."""
        name, (start, end) = self._units[unit][0], span
        document = self.documents[name]
        for at, other in enumerate(found):
            between = document[min(end, other.end) : max(start, other.start)]
            if other.source == name and not between.strip():
                start, end = min(start, other.start), max(end, other.end)
                found[at] = Passage(start, end, document[start:end], max(score, other.score), name, other.match)
                return
        found.append(Passage(start, end, document[start:end], score, name, self._text(*self._units[unit])))


def documents_of(text: str | Mapping[str, str]) -> dict[str, str]:
    """Return a mapping of documents; a single text has the empty name."""
    if not isinstance(text, (str, Mapping)):
        raise TypeError(
            f"text must be a string or map names to strings, got {type(text).__name__}; of a file, its read_text()"
        )
    documents = {"": text} if isinstance(text, str) else dict(text)
    for name, document in documents.items():
        if not isinstance(name, str) or not isinstance(document, str):
            raise TypeError(f"text must be a string or map names to strings, got {name!r}: {type(document).__name__}")
    if not any(document.strip() for document in documents.values()):
        raise ValueError("text must hold something, got nothing but white space")
    return documents


def _digest(documents: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name, document in documents.items():
        for part in (name, document):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()
