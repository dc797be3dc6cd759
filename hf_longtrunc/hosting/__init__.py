"""Techniques inside hosts that load a model by themselves: servers, pipelines, harnesses. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_longtrunc.lazy import lazy_names

if TYPE_CHECKING:
    from hf_longtrunc.hosting.folder import Exported as Exported, export as export, verify_export as verify_export
    from hf_longtrunc.hosting.generate import (
        Reading as Reading,
        hosted_generate as hosted_generate,
        reading_of as reading_of,
    )
    from hf_longtrunc.hosting.server import serve as serve
    from hf_longtrunc.hosting.settings import HostSettings as HostSettings

_HOME = {
    "Exported": "hf_longtrunc.hosting.folder",
    "HostSettings": "hf_longtrunc.hosting.settings",
    "Reading": "hf_longtrunc.hosting.generate",
    "export": "hf_longtrunc.hosting.folder",
    "hosted_generate": "hf_longtrunc.hosting.generate",
    "reading_of": "hf_longtrunc.hosting.generate",
    "serve": "hf_longtrunc.hosting.server",
    "verify_export": "hf_longtrunc.hosting.folder",
}

__all__ = sorted(_HOME)
__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
