"""Streams of datasets: private copies of their state, and a test for exact resuming."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_INNER = ("_ex_iterable", "ex_iterable", "_interleaved", "ex_iterables")
# Parts of streams (`...ExamplesIterable` or `...Iterable`) that resumed exactly at random places in
# recipes/resumed_streams.py. Concatenations did not: with workers or epochs, their state may belong to another order.
_EXACT = (
    "Arrow", "CyclingMultiSources", "Filtered", "Formatted", "Mapped", "RandomlyCyclingMultiSources", "RebatchedArrow",
    "Repeat", "SelectColumns", "Skip", "Step", "Take", "",
)  # fmt: skip


def private_copy(source: Any) -> Any:
    """Return a copy of a `datasets.IterableDataset` that shares its data, but not its state and its epoch.

    datasets shares the state between all views of a stream, and the epoch between all DataLoader workers. Other sources
    are returned unchanged.
    """
    if not _is_datasets_stream(source):
        return source
    copied = _copied(source)
    copied._epoch = int(source.epoch)
    return copied


def has_exact_state(source: Any) -> bool:
    """Tell whether a source is a stream of datasets that resumes exactly from its `state_dict()`.

    A shuffle buffer, a concatenation, Arrow tables (a batched `map` may skip one) and untested operations do not.
    """
    return _is_datasets_stream(source) and all(_is_exact(part) for part in _parts(source))


def _is_datasets_stream(source: Any) -> bool:
    library = sys.modules.get("datasets")  # none of its streams can exist without it
    return library is not None and isinstance(source, library.IterableDataset) and hasattr(source, "_ex_iterable")


def _is_exact(part: Any) -> bool:
    formatting = getattr(part, "formatting", None) or getattr(part, "_formatting", None)
    name = type(part).__name__.removesuffix("Iterable").removesuffix("Examples")
    return not getattr(formatting, "is_table", False) and (name in _EXACT or hasattr(part, "_ex_iterable"))


def _parts(part: Any) -> Iterator[Any]:
    yield part
    for name in _INNER:
        inner = vars(part).get(name)
        for one in inner if isinstance(inner, list) else [inner]:
            if one is not None:
                yield from _parts(one)


def _copied(part: Any) -> Any:
    if isinstance(part, list):
        return [_copied(one) for one in part]
    copied = object.__new__(type(part))
    inner = {name: value for name, value in vars(part).items() if name in _INNER and value is not None}
    vars(copied).update(vars(part), **{name: _copied(value) for name, value in inner.items()})
    return copied
