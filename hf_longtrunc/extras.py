"""What to install where a package of an extra is missing: said in one place."""

from __future__ import annotations


def missing(what: str, module: str | None, extra: str) -> ModuleNotFoundError:
    """Return the error that `what` needs the package of `module`, which the extra named `extra` brings."""
    package = str(module).partition(".")[0]
    return ModuleNotFoundError(
        f'{what} needs {package}: in a checkout of hf_longtrunc, run pip install -e ".[{extra}]"', name=package
    )
