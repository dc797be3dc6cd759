"""Finders: each gives every unit of a text a score for a question.

A finder has two methods: `index(units)` reads the units of a text once and returns tensors, which can be saved, and
`score(index, question)` returns a score a unit [units], higher is better. Words and meaning are found by different
ones: `BM25` counts words that question and unit share, `SentenceEncoder` compares sentence vectors, and `Fused` adds
their scores.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from hf_longtrunc.arguments import check_float
from hf_longtrunc.asking.names import without_names
from hf_longtrunc.extras import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

_TOGETHER = 2048  # tokens a forward, padding included: a batch of long units needs no more memory than one of short
_SCORED = 512  # units that are tokenised, or compared with a question, together
_MULTIPLE = 16  # a batch's length is a multiple of it
_WORD = re.compile(r"[^\W\d_]+")
_PRIOR = 16  # units' worth of a zero vector in the mean of a text's vectors, so that a short text keeps its own


class Scorer(NamedTuple):
    """A text that a finder has read.

    Attributes:
        score: gives every unit a score for a question [units]; higher is better.
        tensors: results that took time, to be saved and handed to `read` again.
    """

    score: Callable[[str], Tensor]
    tensors: dict[str, Tensor]


class Finder(Protocol):
    """Scores the units of a text for a question.

    Attributes:
        identity: names its method and weights, the same in every process; tensors saved under another are refused.
        threshold: a unit stands out if its score lies above it.

    It may have a method `relevance(question, names, passage)` and a number `least_relevance`: then passages stand out
    only if together they are more relevant than that to what the question asks of those whom it names.
    """

    threshold: float

    @property
    def identity(self) -> str: ...  # noqa: D102

    def read(
        self, units: Sequence[str], saved: Mapping[str, Tensor] | None = None, *, progress: bool = False
    ) -> Scorer:
        """Read the units of a text, or take their saved `Scorer.tensors`."""
        ...


def check_finder(finder: Finder) -> Finder:
    """Return a finder; raise TypeError for anything else, such as its name or its class."""
    if isinstance(finder, type) or not hasattr(finder, "read") or not hasattr(finder, "threshold"):
        raise TypeError(f"finder must be a finder, such as BM25() or SentenceEncoder(*load_encoder()), got {finder!r}")
    return finder


class BM25:
    """Words that question and unit share, rare ones counting more (Robertson & Zaragoza 2009), by the package bm25s.

    A score is BM25 over the sum of the inverse document frequencies of the question's words, those that the text does
    not have included: 0 to 1, comparable between texts.

    Args:
        threshold: a unit stands out if its score lies above it.

    Reads a million tokens in seconds, so nothing is saved. Without bm25s: ModuleNotFoundError.

    Examples:
        >>> BM25().read(["A red hat lay there.", "It rained."]).score("Whose hat?").argmax()
        tensor(0)
    """

    identity = "bm25"
    least_relevance = 0.0  # one of the words

    def __init__(self, *, threshold: float = 0.2):
        self.threshold = check_float("threshold", threshold)

    def read(
        self, units: Sequence[str], saved: Mapping[str, Tensor] | None = None, *, progress: bool = False
    ) -> Scorer:
        """Count the words of the units."""
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise missing("BM25", "bm25s", "ask") from error

        corpus: Any = bm25s.tokenize(list(units), stopwords="en", show_progress=False)
        if not any(corpus.ids):  # bm25s divides by the mean length
            return Scorer(lambda question: torch.zeros(len(units)), {})
        held, counts = bm25s.BM25(), Counter[int]()
        for ids in corpus.ids:
            counts.update(set(ids))
        held.index(corpus, show_progress=False)

        def score(question: str) -> Tensor:
            (asked,) = bm25s.tokenize([question], stopwords="en", return_ids=False, show_progress=False)
            known = [corpus.vocab.get(word, -1) for word in asked]
            rarity = sum(math.log(1 + (len(units) - counts[n] + 0.5) / (counts[n] + 0.5)) for n in known)
            known = [n for n in known if counts[n]]
            return torch.from_numpy(held.get_scores(known)).float() / rarity if known else torch.zeros(len(units))

        return Scorer(score, {})

    def relevance(self, question: str, names: Collection[str], passage: str) -> float:
        """Return the share of a question's content words that a passage has; 1 for a question without any.

        Examples:
            >>> BM25().relevance("What colour was Ann's hat?", ["Ann"], "An old hat hung there.")
            0.5
        """
        held = set(_WORD.findall(passage.lower()))
        shared = [question[start:end].lower() in held for start, end in content_words(question, names)]
        return sum(shared) / len(shared) if shared else 1.0


class SentenceEncoder:
    """The cosine between the sentence vectors of question and unit, both less the mean vector of the text's units.

    A sentence vector is the mean of an encoder's states. What all units share says nothing about one of them; without
    it the best unit of all-MiniLM-L6-v2 was right more often (Mu & Viswanath 2018 remove it from word vectors).

    Args:
        model: an encoder as `transformers.AutoModel` loads it, such as sentence-transformers/all-MiniLM-L6-v2.
        tokenizer: of it.
        threshold: a unit stands out if its cosine lies above it.
        least_relevance: see `Finder`. Both defaults were chosen for all-MiniLM-L6-v2 on two novels.

    Units are cut to 256 tokens, as all-MiniLM-L6-v2 was trained. Time is linear in the text, memory is a vector a unit.

    Examples:
        >>> finder = SentenceEncoder(*load_encoder())  # doctest: +SKIP
        >>> finder.read(["He could not hear.", "It rained."]).score("Who was deaf?").argmax()  # doctest: +SKIP
        tensor(0)
    """

    def __init__(self, model: Any, tokenizer: Any, *, threshold: float = 0.35, least_relevance: float = 0.6):
        if not hasattr(model, "eval") or not callable(tokenizer) or not hasattr(tokenizer, "decode"):
            raise TypeError(
                f"model and tokenizer must be an encoder and its tokenizer, got {type(model).__name__} and "
                f"{type(tokenizer).__name__}; load_encoder(name) returns both"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.threshold = check_float("threshold", threshold)
        self.least_relevance = check_float("least_relevance", least_relevance)
        config = {name: value for name, value in model.config.to_diff_dict().items() if name != "dtype"}
        digest = hashlib.sha256(str(config).encode())
        for name, weight in model.state_dict().items():
            digest.update(name.encode())
            # The same for float32 and bfloat16, whose vectors differ by less than finding notices.
            digest.update(weight.detach().bfloat16().float().cpu().contiguous().numpy().data)
        self.identity = f"encoder {digest.hexdigest()[:16]}"

    def read(
        self, units: Sequence[str], saved: Mapping[str, Tensor] | None = None, *, progress: bool = False
    ) -> Scorer:
        """Compute a vector a unit [units, width], in half precision."""
        vectors = self.encode(units, dtype=torch.float16, progress=progress) if saved is None else saved["vectors"]
        mean = vectors.sum(0, dtype=torch.float32) / (len(vectors) + _PRIOR)

        def score(question: str) -> Tensor:
            asked = normalize(self.encode([question])[0] - mean, dim=0)
            return torch.cat([normalize(part.float() - mean, dim=1) @ asked for part in torch.split(vectors, _SCORED)])

        return Scorer(score, {"vectors": vectors})

    @torch.no_grad()
    def relevance(self, question: str, names: Collection[str], passage: str) -> float:
        """Return the coverage of a question by a passage, plus the cosine of both with "he" for the names.

        The coverage is the mean, over the question's content words, of the best cosine between a word's states and a
        state of the passage; 1 for a question without any. A word of several tokens counts with the mean of theirs.
        Source: Khattab & Zaharia 2020, section 3.3, whose sum over all tokens of a query is a mean over its content
        words here.

        Examples:
            >>> finder = SentenceEncoder(*load_encoder())  # doctest: +SKIP
            >>> finder.relevance("Who was deaf?", [], "He could not hear.")  # doctest: +SKIP
        """
        asked, places = self._states(question)
        read, _ = self._states(passage)
        best = (asked @ read.T).amax(1).tolist()  # [question tokens]
        of_words = [
            [cosine for cosine, (a, b) in zip(best, places, strict=True) if a < b and a < end and start < b]
            for start, end in content_words(question, names)
        ]
        known = [sum(each) / len(each) for each in of_words if each]  # a word past 256 tokens has none
        coverage = sum(known) / len(known) if known else 1.0
        one, other = self.encode([without_names(names, text) for text in (question, passage)])
        return coverage + float(one @ other)

    def _states(self, text: str) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return the states of a text's tokens [tokens, width], of length 1, and the tokens' places in it."""
        batch = self.tokenizer(
            text, truncation=True, max_length=256, return_offsets_mapping=True, return_tensors="pt"
        ).to(self.model.device)
        places = batch.pop("offset_mapping")[0].tolist()
        return normalize(self.model(**batch).last_hidden_state[0].float(), dim=-1), places

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, dtype: torch.dtype = torch.float32, progress: bool = False) -> Tensor:
        """Return each text's vector [texts, width], of length 1, on the CPU.

        Texts of like lengths are read together, the longest first, in a few shapes of batch: a CPU's library keeps a
        kernel a shape, and with many of them memory grew with the text.
        """
        vectors = torch.empty(len(texts), self.model.config.hidden_size, dtype=dtype)
        parts = [texts[first : first + _SCORED] for first in range(0, len(texts), _SCORED)]
        lengths = [len(ids) for part in parts for ids in self._ids(part)]
        order = sorted(range(len(texts)), key=lambda n: -lengths[n])
        with tqdm(total=sum(lengths), desc="indexing", unit=" tokens", unit_scale=True, disable=not progress) as bar:
            while order:
                longest = math.ceil(max(lengths[order[0]], 1) / _MULTIPLE) * _MULTIPLE
                size = max(_TOGETHER // longest, 1)
                chosen, order = order[:size], order[size:]
                batch = self.tokenizer.pad(
                    {"input_ids": self._ids([texts[n] for n in chosen])},
                    padding="max_length",
                    max_length=longest,
                    return_tensors="pt",
                )
                batch = batch.to(self.model.device)
                states = self.model(**batch).last_hidden_state.float()
                mean = (states * batch["attention_mask"][:, :, None]).sum(1)
                vectors[chosen] = normalize(mean, dim=1).to("cpu", dtype)
                bar.update(sum(lengths[n] for n in chosen))
        return vectors

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=256).input_ids
        return ids


class Fused:
    """A weighted sum of the scores of several finders, each on a scale that is the same in every text.

    Reciprocal ranks (Cormack et al. 2009) need no scale, but the best of poor matches then counts like the best of good
    ones. On the texts that settings were chosen on they found less.

    Args:
        finders: two or more.
        weights: one for each. The default was chosen for a `SentenceEncoder` and `BM25`.
        threshold: a unit stands out if its sum lies above it. The default was chosen on two novels, so that fewer than
            a tenth of the questions that they do not answer has a passage.

    Raises:
        ValueError: fewer than two finders, or another number of weights.

    Examples:
        >>> finder = Fused(BM25(), BM25(), weights=(1.0, 0.5))
        >>> finder.identity
        '1 bm25 + 0.5 bm25'
    """

    def __init__(
        self,
        *finders: Finder,
        weights: Sequence[float] = (1.0, 0.1),
        threshold: float = 0.35,
    ):
        if len(finders) < 2:
            raise ValueError(f"Fused takes at least two finders, got {len(finders)}")
        if len(weights) != len(finders):
            raise ValueError(f"weights must be one for each of {len(finders)} finders, got {len(weights)}")
        self.finders = [check_finder(finder) for finder in finders]
        self.weights = [check_float("weights", weight) for weight in weights]
        self.threshold = check_float("threshold", threshold)

    @property
    def least_relevance(self) -> float | None:
        """That of the first finder, which judges; None if it judges nothing."""
        return getattr(self.finders[0], "least_relevance", None)

    @property
    def identity(self) -> str:
        """Those of its finders, with their weights."""
        return " + ".join(f"{w:g} {f.identity}" for w, f in zip(self.weights, self.finders, strict=True))

    def read(
        self, units: Sequence[str], saved: Mapping[str, Tensor] | None = None, *, progress: bool = False
    ) -> Scorer:
        """Let each finder read the units."""
        readings = []
        for n, finder in enumerate(self.finders):
            own = {name.partition(".")[2]: part for name, part in (saved or {}).items() if name.startswith(f"{n}.")}
            readings.append(finder.read(units, own or None, progress=progress))

        def score(question: str) -> Tensor:
            parts = [w * reading.score(question) for w, reading in zip(self.weights, readings, strict=True)]
            return torch.stack(parts).sum(0)

        return Scorer(score, {f"{n}.{name}": part for n, r in enumerate(readings) for name, part in r.tensors.items()})

    def relevance(self, question: str, names: Collection[str], passage: str) -> float:
        """Return that by the first finder."""
        return float(self.finders[0].relevance(question, names, passage))  # type: ignore[attr-defined]


def content_words(question: str, names: Collection[str]) -> list[tuple[int, int]]:
    """Return (start, end) of the words of a question that are neither names nor English function words.

    Examples:
        >>> question = "What colour was Ann's hat?"
        >>> [question[start:end] for start, end in content_words(question, ["Ann"])]
        ['colour', 'hat']
    """
    try:
        from bm25s.stopwords import STOPWORDS_EN_PLUS
    except ModuleNotFoundError as error:
        raise missing("the content words of a question", "bm25s", "ask") from error

    found = _WORD.finditer(question)
    return [m.span() for m in found if m[0] not in names and m[0].lower() not in STOPWORDS_EN_PLUS]
