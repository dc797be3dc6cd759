"""Streams of datasets that can be resumed by their own state, each in a copy whose state no other iterator moves."""

from __future__ import annotations

import sys
from typing import Any

_INNER = ("_ex_iterable", "ex_iterable", "_interleaved", "ex_iterables")
# Parts of such streams that were resumed at random places and were exact, `...ExamplesIterable` or `...Iterable`
# (recipes/resumed_streams.py). Concatenations were not: with workers or epochs, their state may be of another order.
_EXACT = (
    "Arrow", "CyclingMultiSources", "Filtered", "Formatted", "Mapped", "RandomlyCyclingMultiSources", "RebatchedArrow",
    "Repeat", "SelectColumns", "Skip", "Step", "Take", "",
)  # fmt: skip


def resumable_copy(source: Any) -> Any:
    """Return a copy of a `datasets.IterableDataset` that shares its data, not its state; None if its state is inexact.

    `state_dict()` of the copy says which example comes next. datasets keeps that in objects which all views of a stream
    share, so that `stream.take(100)`, read in between, would move the state of `stream.skip(100)`.

    None for other sources and for streams with an operation that is not known to be exact: a shuffle buffer, whose
    content the state leaves out, a concatenation, Arrow tables, of which a batched `map` may skip one.
    """
    library = sys.modules.get("datasets")  # none of its streams can exist without it
    if library is None or not isinstance(source, library.IterableDataset) or not hasattr(source, "_ex_iterable"):
        return None
    try:
        return _copied(source)
    except _InexactError:
        return None


class _InexactError(Exception):
    pass


def _copied(part: Any) -> Any:
    if isinstance(part, list):
        return [_copied(one) for one in part]
    formatting = getattr(part, "formatting", None) or getattr(part, "_formatting", None)
    name = type(part).__name__.removesuffix("Iterable").removesuffix("Examples")
    if getattr(formatting, "is_table", False) or (name not in _EXACT and not hasattr(part, "_ex_iterable")):
        raise _InexactError
    copied = object.__new__(type(part))
    inner = {name: value for name, value in vars(part).items() if name in _INNER and value is not None}
    vars(copied).update(vars(part), **{name: _copied(value) for name, value in inner.items()})
    return copied
