"""Techniques by their definition, pair by pair in fp64, for `test_pairwise.py`: none of it is the package's code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache

from hf_longtrunc.models import CACHE

from .reference import Naive, NaiveBlocks, Rope, install
from .test_attach_check import Quantised, _fixed
from .tiny_models import tiny_model

S, L = 2, 8
LENGTH, NEW = 33, 5  # of the text, and of what is generated
PARTS = {"short": 6, "long": 21}  # tokens that the first technique reads
ENDING = (5, 6)
VOTERS, READERS, BLOCK, EMPHASIS = 2, 5, 4, 4.0
NO_BLOCK = 16  # the first tokens of a text, which no block of dual chunk attention holds
CHUNKS = {"chunks": (8, 12), "other chunks": (9, 12), "chunks for chat": (8, 12)}  # s and c
RINGS = ("lm-infinite", "lm-infinite for chat", "streaming")


@dataclass
class Pairs(Naive):
    """Every pair of one row at its distance under a technique; those of a selected block count for several."""

    kind: str = "unpatched"
    reads_from: int = 10**9  # the first row that reads
    chosen: int | None = None
    votes: dict[int, float] = field(default_factory=dict)

    def apart(self, i: int, j: int) -> int:
        if self.kind in CHUNKS:
            s, c = CHUNKS[self.kind]
            chunks = i // s - j // s
            return i - j if not chunks else (min(i % s + s, c - 1) if chunks == 1 else c - 1) - j % s
        return min(i - j, S + L - 1 - j if i - j >= L else i - j, L if self.kind != "streaming" else i)

    def sees(self, i: int, j: int) -> bool:
        return j <= i and (self.kind not in RINGS or i - j < L or j < S)

    def __call__(self, query, key, value, scaling, softcap=None, null_logits=None):
        n, group = query.shape[1], query.shape[0] // key.shape[0]
        key, value = (x.double().repeat_interleave(group, dim=0) for x in (key, value))
        pairs = [(i, j) for i in range(n) for j in range(n)]
        away = torch.tensor([self.apart(*pair) if self.sees(*pair) else 0 for pair in pairs]).view(n, n)
        seen = torch.tensor([self.sees(*pair) for pair in pairs]).view(n, n)
        assert self.rope is not None
        turned = self.rope.turn(query.double()[:, :, None].expand(-1, -1, n, -1), away)
        scores = (turned * key[:, None]).sum(-1) * scaling
        scores = scores.masked_fill(~seen, -math.inf)
        if self.chosen is not None:
            scores[:, self.reads_from :, self.chosen : self.chosen + BLOCK] += math.log(EMPHASIS)
        weights = scores.softmax(-1)
        for start in range(NO_BLOCK, n - READERS - BLOCK + 1, BLOCK):
            asked = weights[:, n - VOTERS - len(ENDING) : n - len(ENDING), start : start + BLOCK]
            self.votes[start] = self.votes.get(start, 0.0) + float(asked.sum())
        return weights @ value


@dataclass
class Blocks(NaiveBlocks):
    """LM-Infinite's blocks: rows from `reads_from` on read the chosen ones."""

    reads_from: int | None = None

    def reading(self, query, key, scores, scaling, softcap):
        if self.reads_from is not None:
            self.rows = query.shape[1] - self.reads_from
        return super().reading(query, key, scores, scaling, softcap)


def yarn_frequencies(dim: int, base: float, factor: float, length: int) -> torch.Tensor:
    """Peng et al. 2023, section 3.2: fast dimensions as they are, slow ones divided, a ramp in between."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = base**-exponents
    edges = [dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1)]
    low, high = max(math.floor(edges[0]), 0), min(math.ceil(edges[1]), dim - 1)
    ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1).double()
    return plain / factor * ramp + plain * (1 - ramp)


def longrope_config(original: int) -> dict[str, Any]:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": original,
        "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
    }  # fmt: skip
    return {"rope_parameters": rope, "max_position_embeddings": 128, "original_max_position_embeddings": original}


PLAIN = 1e4 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
# By rotary law: family, changes of its configuration, and the frequencies of a patched model.
MODELS: dict[str, tuple[str, dict[str, Any], torch.Tensor]] = {
    "default": ("llama", {}, PLAIN),
    "yarn": ("llama", {"rope_parameters": YARN}, yarn_frequencies(8, 1e4, 4.0, 64)),
    "longrope": ("phi3", longrope_config(64), PLAIN / torch.tensor([1.0, 1.5, 2.0, 2.5])),
    "longrope beyond": ("phi3", longrope_config(5), PLAIN / torch.tensor([2.0, 3.0, 4.0, 5.0])),
    "W8A8": ("llama", {}, PLAIN),
}


def new_model(rope: str) -> Any:
    family, changes, _ = MODELS[rope]
    model = tiny_model(family, **changes).requires_grad_(False)
    model.generation_config.num_assistant_tokens = READERS - 1
    if rope == "W8A8":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = EightBits
    return model


class EightBits(Quantised):
    levels = 127


@cache
def patchable(rope: str) -> Any:
    return new_model(rope)


@cache
def assistant(rope: str) -> Any:
    return new_model(rope)


@cache
def pristine(rope: str) -> Any:
    return new_model(rope).double()


@cache
def defined(rope: str) -> tuple[Any, dict[str, Any]]:
    """A model whose attention is the entry `now` of the dictionary."""
    model, now = new_model(rope).double(), {}
    frequencies = MODELS[rope][2]
    rotary = model.model.rotary_emb
    rotary.forward = _fixed(rotary, frequencies, rotary.attention_scaling)

    class Now:
        rope = Rope(8, frequencies=frequencies)

        def __call__(self, *args):
            return now["attention"](*args)

    install(model, Now(), "naive_pairs_" + rope.replace(" ", "_"))
    return model, now


def definition(technique: str, rotary: str, ids: torch.Tensor) -> Any:
    """Return a model that computes attention by the technique's definition, for this text and its continuation."""
    if technique == "unpatched":
        return pristine(rotary)
    model, now = defined(rotary)
    rope = Rope(8, frequencies=MODELS[rotary][2])
    if technique == "lm-infinite for chat":
        now["attention"] = voting = Blocks(
            S, L, L, rope, size=BLOCK, away=L // 4, rows=VOTERS, behind=len(ENDING), emphasis=EMPHASIS
        )
        model(ids, use_cache=False)
        now["attention"] = replace(voting, behind=0, chosen=voting.best(1), reads_from=LENGTH - READERS)
        return model
    now["attention"] = pairs = Pairs(S, L, L, rope, kind=technique)
    if technique == "chunks for chat":
        model(ids, use_cache=False)
        best = max(pairs.votes, key=pairs.votes.__getitem__)
        now["attention"] = replace(pairs, chosen=best, reads_from=LENGTH - READERS)
    return model


@dataclass
class Cached:
    """An unmodified model that reads a text in two parts."""

    model: Any
    read: int

    def __call__(self, ids, use_cache=False):
        cache = DynamicCache(config=self.model.config)
        first = self.model(ids[:, : self.read], **{CACHE: cache})
        rest = self.model(ids[:, self.read :], **{CACHE: cache})
        rest.logits = torch.cat([first.logits, rest.logits], dim=1)
        return rest


def best_of_beams(model: Any, ids: torch.Tensor) -> float:
    """The sum of log-probabilities of a search by two beams, written down."""
    beams = [(0.0, ids)]
    for _ in range(NEW):
        found = []
        for score, text in beams:
            likely = model(text, use_cache=False).logits[0, -1].log_softmax(-1).topk(2)
            found += [
                (score + float(value), torch.cat([text, index.view(1, 1)], dim=1))
                for value, index in zip(*likely, strict=True)
            ]
        beams = sorted(found, key=lambda beam: -beam[0])[:2]
    return beams[0][0]
