"""Check the numbers, words and names that a user passes.

Each `check_` function of numbers returns the value as a plain Python number, so that `np.int64(8)` or a torch scalar
is stored, compared and printed like 8. `True` is no number.
"""

from __future__ import annotations

import difflib
import math
import operator
from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class NamedSettings:
    """Base of a dataclass of keyword-only settings: it refuses what `__init__` would, and names the right call.

    Attributes:
        usage: the right call; {name} stands for the class.
    """

    usage: ClassVar[str]

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse settings without a name, or with one that the class does not have."""
        name = cls.__name__
        if args:
            raise TypeError(
                f"{name} takes its settings by name, got {type(args[0]).__name__}: {cls.usage.format(name=name)}"
            )
        known = [each.name for each in fields(cls)]  # type: ignore[arg-type]
        for unknown in settings.keys() - set(known):
            near = _nearest(unknown, known)
            advice = f" Did you mean {near}?" if near else ""
            raise TypeError(f"{name} has no setting {unknown!r}.{advice} It takes {', '.join(known)}")
        return super().__new__(cls)


def check_int(name: str, value: object, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return a whole number between `minimum` and `maximum`, both included.

    Args:
        name: of the argument, as the message is to call it.
        value: an int, a NumPy integer, or a torch or NumPy integer scalar without dimensions.
        minimum: None sets no lower bound.
        maximum: None sets no upper bound.

    Raises:
        TypeError: it is no whole number; bools and floats are not.
        ValueError: it lies outside the bounds.
    """
    expected = f"a whole number{_range(minimum, maximum)}"
    try:
        if _is_bool(value) or _dimensions(value):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}") from None
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {expected}, got {number}")
    return number


def check_float(
    name: str,
    value: object,
    *,
    gt: float | None = None,
    minimum: float | None = None,
    lt: float | None = None,
    maximum: float | None = None,
) -> float:
    """Return a finite real number; `gt` and `lt` exclude their bound, `minimum` and `maximum` include it.

    Raises:
        TypeError: it is no real number; bools and strings are not.
        ValueError: it is NaN, infinite or outside the bounds.
    """
    expected = f"a number{_bounds(gt, minimum, lt, maximum)}"
    if _is_bool(value) or _dimensions(value) or not (isinstance(value, Real) or hasattr(value, "item")):
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}")
    real = float(value)  # type: ignore[arg-type]
    is_inside = (
        math.isfinite(real)
        and (gt is None or real > gt)
        and (minimum is None or real >= minimum)
        and (lt is None or real < lt)
        and (maximum is None or real <= maximum)
    )
    if not is_inside:
        raise ValueError(f"{name} must be {expected}, got {real}")
    return real


def check_fraction(name: str, value: object) -> float:
    """Return a number between 0 and 1, both included; errors as for `check_float`."""
    return check_float(name, value, minimum=0, maximum=1)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return one of a few words.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_kind(name: str, value: object, kind: type, way_out: str) -> None:
    """Raise TypeError for an object that is none of a class; `way_out` says how to come by one."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {_shown(value)}; {way_out}")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError for what is no tensor."""
    check_kind(name, value, Tensor, "torch.tensor(...) makes one")


def _nearest(unknown: str, known: list[str]) -> str | None:
    """Return the name that contains `unknown`, has a word of it or is spelt most like it; None if none does."""
    words = set(unknown.split("_"))

    def likeness(name: str) -> tuple[bool, float]:
        is_related = unknown in name or bool(words & set(name.split("_")))
        return is_related, difflib.SequenceMatcher(None, unknown, name).ratio()

    best = max(known, key=likeness)
    return best if likeness(best) > (False, 0.3) else None


def _shown(value: object) -> str:
    """Return a value with its type; of a model, whose repr fills a page, the type alone."""
    shown, kind = repr(value), type(value).__name__
    return f"a {kind}" if "\n" in shown or len(shown) > 80 else f"{shown} of type {kind}"


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _range(minimum: int | None, maximum: int | None) -> str:
    if minimum is not None and maximum is not None:
        return f" from {minimum} to {maximum}"
    return f" of at least {minimum}" if minimum is not None else f" of at most {maximum}" if maximum is not None else ""


def _bounds(gt: float | None, minimum: float | None, lt: float | None, maximum: float | None) -> str:
    lower = f"above {gt}" if gt is not None else f"of at least {minimum}" if minimum is not None else ""
    upper = f"below {lt}" if lt is not None else f"of at most {maximum}" if maximum is not None else ""
    return "".join(f" {part}" for part in (lower, "and" if lower and upper else "", upper) if part)


def _dimensions(value: Any) -> int:
    return int(getattr(value, "ndim", 0))
