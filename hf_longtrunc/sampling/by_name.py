"""Samplers by name, for the command line, exported folders and recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_longtrunc.sampling.processors import (
    DRYLogitsProcessor,
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    MinKLogitsProcessor,
    PLessLogitsProcessor,
    TopHLogitsProcessor,
    TopNSigmaLogitsProcessor,
    XTCLogitsProcessor,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LogitsProcessor

# Name -> how to make the processor from a number, and the default number; None: the sampler takes none.
_SAMPLERS: dict[str, tuple[Callable[[float], LogitsProcessor], float | None]] = {
    "eta": (EtaLogitsProcessor, 2e-3),
    "epsilon": (EpsilonLogitsProcessor, 9e-4),
    "top-n-sigma": (TopNSigmaLogitsProcessor, 1.0),
    "p-less": (lambda _: PLessLogitsProcessor(), None),
    "p-less-norm": (lambda _: PLessLogitsProcessor(normalized=True), None),
    "top-h": (TopHLogitsProcessor, 0.4),
    "min-k": (MinKLogitsProcessor, 3.0),
    "xtc": (lambda probability: XTCLogitsProcessor(0.1, probability), 0.5),
    "dry": (DRYLogitsProcessor, 0.8),
}


def sampler_names() -> tuple[str, ...]:
    """Return the names that `sampler_by_name` knows.

    Examples:
        >>> sampler_names()
        ('eta', 'epsilon', 'top-n-sigma', 'p-less', 'p-less-norm', 'top-h', 'min-k', 'xtc', 'dry')
    """
    return tuple(_SAMPLERS)


def sampler_by_name(name: str, value: float | None = None) -> LogitsProcessor:
    """Return the logits processor for a sampler's name and number, as in a configuration file or a request.

    Examples:
        >>> sampler_by_name("top_n_sigma", 1.5)
        TopNSigmaLogitsProcessor(n=1.5)
        >>> sampler_by_name("p-less")
        PLessLogitsProcessor(normalized=False)

    Args:
        name: one of `sampler_names()`; underscores for hyphens are fine.
        value: the sampler's number: the probability for "xtc" (its threshold is 0.1), the multiplier for "dry". None
            takes a common one. "p-less" and "p-less-norm" take none.

    Raises:
        ValueError: no such name; a number outside the sampler's range, or one for a sampler that takes none.
        TypeError: a value that is no number.
    """
    key = str(name).strip().lower().replace("_", "-")
    if key not in _SAMPLERS:
        raise ValueError(f"name must be one of {', '.join(_SAMPLERS)}, got {name!r}")
    make, usual = _SAMPLERS[key]
    if usual is None and value is not None:
        raise ValueError(f"{key} takes no value, got {value!r}: leave it out")
    return make(usual or 0.0) if value is None else make(value)
