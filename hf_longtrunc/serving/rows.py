"""Truncation of a batch with different samplers in each row, shared by all engines.

A request names its samplers by plain numbers, as they come over HTTP:

    {"eta": 2e-3}    {"epsilon": 9e-4}    {"top_n_sigma": 1.0}    {"p_less": true}    {"p_less_norm": true}
    {"top_h": 0.4}    {"min_k": 3.0}    {"xtc_threshold": 0.1, "xtc_probability": 0.5}
    {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2}, dry_window, dry_sequence_breakers (ids)

Several samplers run in this order, but DRY first, each on the distribution that the one before left.
`xtc_probability` or `dry_multiplier` asks for XTC or DRY; other keys of theirs have the defaults above (no window, no
breakers). 1 and 0 stand for true and false, as vLLM's server turns them into numbers. Unknown keys are ignored, unless
they are nearly one of these names.
"""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_longtrunc.arguments import check_float
from hf_longtrunc.sampling.cutoffs import CUTOFFS, below, column, softmax_rows, threshold_of, xtc_cut
from hf_longtrunc.sampling.dry import Dry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_XTC = {"xtc_threshold": ({"gt": 0, "lt": 1}, 0.1), "xtc_probability": ({"minimum": 0, "maximum": 1}, 0.0)}
_DRY = {
    "dry_multiplier": "multiplier",
    "dry_base": "base",
    "dry_allowed_length": "allowed_length",
    "dry_window": "window",
    "dry_sequence_breakers": "sequence_breakers",
}
NAMES = (*CUTOFFS, *_XTC, *_DRY)
# Names of more letters than this may be misspelt; shorter ones only by the order of their letters.
_LONG = 5
# The beginning of a name counts as a misspelling from this many letters on.
_BEGINNING = 3


def parse_request(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a request's checked sampler parameters: numbers by name, and a `Dry` by the name "dry".

    Examples:
        >>> parse_request({"eta": 2e-3, "stop": "."})
        {'eta': 0.002}

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range, or a key that is nearly a known name.
    """
    asked = {name: value for name, value in (parameters or {}).items() if value is not None and value is not False}
    for name in asked:
        _check_spelling(name)
    found: dict[str, Any] = {}
    for name, cutoff in CUTOFFS.items():
        value = asked.get(name)
        if value is not None and cutoff.bounds is None:
            if value not in (0, 1):
                raise TypeError(f"{name} must be true or false, got {value!r}")
            if value:
                found[name] = 1.0
        elif value is not None:
            found[name] = check_float(name, value, **(cutoff.bounds or {}))
    xtc = {name: check_float(name, asked.get(name, default), **bounds) for name, (bounds, default) in _XTC.items()}
    if xtc["xtc_probability"]:
        found |= xtc
    dry = {ours: asked[name] for name, ours in _DRY.items() if name in asked}
    if dry:
        try:
            found["dry"] = Dry(**{"multiplier": 0.0, **dry})
        except (TypeError, ValueError) as error:
            raise type(error)(f"dry_{error}") from None
    return found


def truncate(
    logits: Tensor, requests: Sequence[Mapping[str, Any]], texts: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Return a copy of `logits` [rows, V], with -inf for the tokens that each row's request cuts.

    Examples:
        >>> truncate(torch.tensor([[4.0, 3.0, 0.0], [4.0, 3.0, 0.0]]), [{"epsilon": 0.1}, {}])
        tensor([[4., 3., -inf],
                [4., 3., 0.]])

    Each row equals, bit for bit, the result of the processor of that name on the row alone; XTC draws from torch's
    generator.

    Args:
        logits: any floating dtype.
        requests: results of `parse_request`, one a row.
        texts: the token ids before each row's token, for rows that ask for DRY.
    """
    result = logits.clone()
    for row, request in enumerate(requests):
        if "dry" in request and texts is not None:
            result[row] = request["dry"].penalised(result[row], texts[row])
    for name in (*CUTOFFS, "xtc_probability"):
        places = [row for row, request in enumerate(requests) if name in request]
        if not places:
            continue
        part = result[places]
        rows = softmax_rows(part)
        values = [requests[row][name] for row in places]
        if name == "xtc_probability":
            thresholds = column([math.log(requests[row]["xtc_threshold"]) for row in places], rows)
            cut = xtc_cut(rows, thresholds, torch.rand(len(places), 1, device=part.device) < column(values, rows))
        else:
            cut = below(part, rows, threshold_of(name, rows, torch.tensor(values, dtype=torch.float64)))
        result[places] = part.masked_fill(cut, -torch.inf)
    return result


def _check_spelling(name: str) -> None:
    """Raise ValueError if a key begins a known name, has the same letters, or resembles a long one."""
    if name in NAMES:
        return
    letters = sorted(_letters(name))
    likely = [each for each in NAMES if sorted(_letters(each)) == letters]
    likely += [each for each in NAMES if len(letters) >= _BEGINNING and _letters(each).startswith(_letters(name))]
    near = likely or difflib.get_close_matches(name, [each for each in NAMES if len(each) > _LONG], n=1, cutoff=0.85)
    if near:
        raise ValueError(f"{name} is no sampler's name; did you mean {near[0]}? The names are {', '.join(NAMES)}")


def _letters(name: str) -> str:
    return "".join(each for each in str(name).lower() if each.isalnum())
