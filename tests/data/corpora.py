"""Small corpora that several tests pack."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hf_longtrunc.data.documents import IGNORE


def token_lists(lengths, vocabulary=97, seed=0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, length).tolist() for length in lengths]


def raw_examples(lengths, **options) -> list[dict[str, list[int]]]:
    return [{"input_ids": tokens} for tokens in token_lists(lengths, **options)]


def segments(row) -> list[list[int]]:
    """Token ids of every learnable segment in one collated row: the padding has no labels and is left out."""
    starts = [i for i, position in enumerate(row["position_ids"].tolist()) if position == 0]
    bounds = [*starts, len(row["input_ids"])]
    spans = [slice(a, b) for a, b in pairwise(bounds)]
    return [row["input_ids"][span].tolist() for span in spans if (row["labels"][span] != IGNORE).any()]
