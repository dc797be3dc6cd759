"""Numbers that a user passes: checked once, in one voice.

Each function returns the value as a plain Python number, so that `np.int64(8)` or a torch scalar
is stored, compared and printed like 8. `True` is no number.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any


def whole(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number between `least` and `most`, both included.

    Args:
        name: of the argument, as the message is to call it.
        value: an int, a NumPy integer, or a torch or NumPy integer scalar without dimensions.
        least: None sets no lower bound.
        most: None sets no upper bound.

    Raises:
        TypeError: it is no whole number; bools and floats are not.
        ValueError: it lies outside the bounds.
    """
    expected = f"a whole number{_range(least, most)}"
    try:
        if _is_bool(value) or _dimensions(value):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name} must be {expected}, got {number}")
    return number


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Return a finite real number; `above` and `below` exclude their bound, `least` and `most` include it.

    Raises:
        TypeError: it is no real number; bools and strings are not.
        ValueError: it is NaN, infinite or outside the bounds.
    """
    expected = f"a number{_bounds(above, least, below, most)}"
    if _is_bool(value) or _dimensions(value) or not (isinstance(value, Real) or hasattr(value, "item")):
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")
    real = float(value)  # type: ignore[arg-type]
    is_inside = (
        math.isfinite(real)
        and (above is None or real > above)
        and (least is None or real >= least)
        and (below is None or real < below)
        and (most is None or real <= most)
    )
    if not is_inside:
        raise ValueError(f"{name} must be {expected}, got {real}")
    return real


def share(name: str, value: object) -> float:
    """Return a number between 0 and 1, both included; errors as for `number`."""
    return number(name, value, least=0, most=1)


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return one of a few words.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _range(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else f" of at most {most}" if most is not None else ""


def _bounds(above: float | None, least: float | None, below: float | None, most: float | None) -> str:
    lower = f"above {above}" if above is not None else f"of at least {least}" if least is not None else ""
    upper = f"below {below}" if below is not None else f"of at most {most}" if most is not None else ""
    return "".join(f" {part}" for part in (lower, "and" if lower and upper else "", upper) if part)


def _dimensions(value: Any) -> int:
    return int(getattr(value, "ndim", 0))
