"""A trace as one page for a browser: the data that `trace.html` shows."""

from __future__ import annotations

import math
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hf_longtrunc.arguments import check_float
from hf_longtrunc.page import write
from hf_longtrunc.pieces import piece_by_token, pieces

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from hf_longtrunc.sampling.trace import TruncationTrace
    from hf_longtrunc.sampling.trace_records import TruncationRecord

# Fields of a record that the page shows as they are.
_FIELDS = (
    "token", "probability", "rank", "is_kept", "entropy", "threshold", "lowest_kept", "kept", "kept_mass", "kept_below",
    "cut_above",
)  # fmt: skip
_DIGITS = 4


def write_page(
    path: Path, traces: Mapping[str, TruncationTrace], tokenizer: Any, *, epsilon: float, prompt: str
) -> Path:
    """Write the page of several traces by name; see `TruncationTrace.to_html`."""
    epsilon = check_float("epsilon", epsilon, gt=0, lt=1)
    texts: list[dict[str, Any]] = [
        {"name": title, "most": trace.candidates, "steps": _steps(drawn, tokenizer, epsilon)}
        for name, trace in traces.items()
        for title, drawn in _by_text(name, trace.records)
    ]
    if not texts:
        raise ValueError("nothing recorded: generate with this trace and call trace.finish(sequences) first")
    steps = [step for text in texts for step in text["steps"]]
    shown = {step["token"] for step in steps} | {near[0] for step in steps for near in step["candidates"]}
    tokens = [[step["token"] for step in text["steps"]] for text in texts]
    is_one_text = len(texts) > 1 and all(each == tokens[0] for each in tokens)
    data = {
        "epsilon": epsilon,
        "isOneText": is_one_text,
        "prompt": prompt,
        "words": piece_by_token(tokenizer, sorted(shown)),
        "texts": texts,
    }
    content = resources.files("hf_longtrunc.sampling").joinpath("trace.html").read_text(encoding="utf-8")
    return write(path, content, data, title="What the samplers cut", prompt=prompt)


def _by_text(name: str, records: Sequence[TruncationRecord]) -> list[tuple[str, list[TruncationRecord]]]:
    """Return the records of each run and row, under a name of its own."""
    drawn = [record for record in records if record.token is not None]
    found = [(key, list(each)) for key, each in groupby(drawn, key=lambda record: (record.run, record.row))]
    if len(found) == 1:
        return [(name, found[0][1])]
    return [(f"{name}, run {run}, row {row}", each) for (run, row), each in found]


def _steps(records: Sequence[TruncationRecord], tokenizer: Any, epsilon: float) -> list[dict[str, Any]]:
    texts = pieces(tokenizer, [record.token for record in records if record.token is not None])
    return [
        {"text": text}
        | {name: _rounded(getattr(record, name)) for name in _FIELDS}
        | {"eta": _rounded(record.eta_threshold(epsilon)), "refused": record.is_refused_by_eta(epsilon)}
        | {"rescued": record.is_rescued, "candidates": _near(record)}
        for record, text in zip(records, texts, strict=True)
    ]


def _near(record: TruncationRecord) -> list[list[Any]]:
    """Return token, probability, whether it was kept and the margin of its proof, for each candidate."""
    if record.candidates is None:
        return []
    return [[token, _rounded(p), int(kept), _rounded(margin)] for token, p, kept, margin in record.candidates.tolist()]


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
