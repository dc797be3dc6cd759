"""Documents of several sources, mixed to given shares of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from hf_longtrunc.arguments import check_choice, check_float, check_int
from hf_longtrunc.data.documents import read_document
from hf_longtrunc.data.sources import private_copy

if TYPE_CHECKING:
    from collections.abc import Iterator


class TokenMixture(Iterable[Mapping[str, Any]]):
    """Documents of several sources, in an order that keeps each source's share of the tokens.

    The next document comes from the source with the smallest tokens / share (the first of several). The order is not
    random: each reading gives the same one. A source exceeds its share by at most its longest document.
    `datasets.interleave_datasets` mixes by number of documents instead.

    Pass it to `pack()`, as a stream. To repeat a small source, use `stream.repeat(None)` of datasets. Resuming reads
    the sources again up to the saved place. With several DataLoader workers pass `sharding="source"` if all sources are
    streams of datasets, and `sharding="documents"` otherwise.

    Args:
        sources: name -> an iterable of tokenized documents, with the columns of `pack()`, that can be read again.
        shares: name -> its share of the tokens, a number above 0; they need not add up to 1.
        until: "first" ends when a source is exhausted, so the shares hold to the end; "all" reads every document.

    Attributes:
        counts: name -> {"documents": n, "tokens": n} of the last iterator, in this process.

    Raises:
        TypeError, ValueError: no sources, shares of other names, a share that is no number above 0; while iterating, a
            bad document (the message names its source and number).

    Examples:
        >>> sources = {"code": [{"input_ids": [1] * 4}] * 9, "prose": [{"input_ids": [2] * 3}] * 9}
        >>> mixture = TokenMixture(sources, {"code": 0.25, "prose": 0.75})
        >>> [example["input_ids"][0] for example in mixture]
        [1, 2, 2, 2, 2, 1, 2, 2, 2, 2, 1, 2]
        >>> mixture.counts
        {'code': {'documents': 3, 'tokens': 12}, 'prose': {'documents': 9, 'tokens': 27}}
    """

    def __init__(
        self,
        sources: Mapping[str, Iterable[Mapping[str, Any]]],
        shares: Mapping[str, float],
        *,
        until: Literal["first", "all"] = "first",
    ) -> None:
        if not isinstance(sources, Mapping) or not isinstance(shares, Mapping) or not sources:
            raise TypeError("sources and shares must be mappings from names, with at least one source")
        if set(sources) != set(shares):
            raise ValueError(f"shares must name the sources {sorted(sources)}, got {sorted(shares)}")
        for name, source in sources.items():
            if not isinstance(source, Iterable) or isinstance(source, (str, bytes, Mapping)) or iter(source) is source:
                raise TypeError(
                    f"sources[{name!r}] must be an iterable of tokenized documents that can be read again, got "
                    f"{type(source).__name__}"
                )
        self.sources = dict(sources)
        self.shares = {name: check_float(f"shares[{name!r}]", shares[name], gt=0) for name in sources}
        self.until = check_choice("until", until, ("first", "all"))
        self.epoch = 0
        self.counts = self._no_counts()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        self.counts = counts = self._no_counts()
        open_sources = {name: self._read(name) for name in self.sources}
        while open_sources:
            name = min(open_sources, key=lambda each: counts[each]["tokens"] / self.shares[each])
            example = next(open_sources[name], None)
            if example is None and self.until == "first":
                return
            if example is None:
                del open_sources[name]
                continue
            where = f"document {counts[name]['documents']} of {name!r}"
            counts[name]["tokens"] += len(read_document(example, where).input_ids)
            counts[name]["documents"] += 1
            yield example

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sources that shuffle by it."""
        self.epoch = check_int("epoch", epoch, minimum=0)

    @property
    def _distributed(self) -> Any:
        """The share of one process, if a source has one (datasets' name for it, read by `PackedStream`)."""
        return next(filter(None, (getattr(source, "_distributed", None) for source in self.sources.values())), None)

    def _read(self, name: str) -> Iterator[Mapping[str, Any]]:
        source = private_copy(self.sources[name])
        if callable(getattr(source, "set_epoch", None)):
            source.set_epoch(self.epoch)
        return iter(source)

    def _no_counts(self) -> dict[str, dict[str, int]]:
        return {name: {"documents": 0, "tokens": 0} for name in self.sources}
