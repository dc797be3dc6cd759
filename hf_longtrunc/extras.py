"""Errors that name the extra to install where a package is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def missing(what: str, module: str | None, extra: str) -> ModuleNotFoundError:
    """Return the error that `what` needs the package of `module`, which the extra named `extra` brings."""
    package = str(module).partition(".")[0]
    return ModuleNotFoundError(
        f'{what} needs {package}: run pip install "hf_longtrunc[{extra}]" (in a checkout: pip install -e ".[{extra}]")',
        name=package,
    )


def import_extra(module: str, what: str, extra: str) -> Any:
    """Return a module that `what` needs, or raise ModuleNotFoundError with the extra to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing(what, module, extra) from error


def import_pyplot(what: str) -> Any:
    """Return matplotlib's pyplot, which `what` needs."""
    return import_extra("matplotlib.pyplot", what, "eval")
