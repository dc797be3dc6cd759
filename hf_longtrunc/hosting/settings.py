"""What an exported folder asks for, as JSON and as objects of this package."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import hf_longtrunc as ours
from hf_longtrunc.arguments import check_choice, check_int
from hf_longtrunc.hosting.find_and_read import FINDERS

if TYPE_CHECKING:
    from transformers import LogitsProcessor

FORMAT = 1
TECHNIQUES = {"lm-infinite": "LMInfinite", "streaming-llm": "StreamingLLM", "dual-chunk": "DualChunkAttention"}
_DATACLASSES = {**TECHNIQUES, "top-blocks": "TopBlocks", "top-k": "TopK"}  # all that "name" can stand for


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """How an exported folder generates.

    Args:
        technique: `LMInfinite(...)` or `StreamingLLM(...)`, with a `window_length`, or `DualChunkAttention(...)`.
        sampler: "eta=0.002", "p-less" or another name of `sampler_by_name`, joined to everything that is sampled; None
            adds nothing.
        cache_bytes: of the caches that are kept between requests; 0 keeps none.
        finder: "encoder" or "bm25": of a chat that is longer than the window, the passage that its last question points
            at is read, and nothing else. With a technique that forgets; None lets the technique read the whole chat.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or outside its range.

    Examples:
        >>> settings = HostSettings(technique=LMInfinite(window_length=64), sampler="eta=0.002")
        >>> HostSettings.from_json(settings.to_json()) == settings
        True
    """

    technique: Any
    sampler: str | None = None
    cache_bytes: int = 2**30
    finder: str | None = None

    def __post_init__(self) -> None:
        if type(self.technique) not in {getattr(ours, name) for name in TECHNIQUES.values()}:
            raise TypeError(
                f"technique must be one of {', '.join(f'{name}(...)' for name in TECHNIQUES.values())}, got "
                f"{self.technique!r}"
            )
        if getattr(self.technique, "window_length", 1) is None:
            raise ValueError("technique must have a window_length here, got None: export() takes the model's own")
        self.processors()  # a wrong sampler is told here
        object.__setattr__(self, "cache_bytes", check_int("cache_bytes", self.cache_bytes, minimum=0))
        if self.finder is not None:
            check_choice("finder", self.finder, FINDERS)
            if getattr(self.technique, "window_length", None) is None or getattr(self.technique, "retrieval", None):
                raise ValueError(
                    "finder goes with LMInfinite(...) or StreamingLLM(...) without retrieval, got "
                    f"{self.technique!r}, which forgets nothing"
                )

    def processors(self) -> list[LogitsProcessor]:
        """Return the sampler's processor, or nothing."""
        if self.sampler is None:
            return []
        name, _, value = str(self.sampler).partition("=")
        try:
            return [ours.sampler_by_name(name, float(value) if value else None)]
        except ValueError as error:
            raise ValueError(f"sampler must be a name or NAME=NUMBER, got {self.sampler!r}: {error}") from None

    def to_json(self) -> str:
        """Return the settings as JSON: what differs from a technique's defaults, with a format number."""
        described: dict[str, Any] = {
            "format": FORMAT,
            "technique": _encoded(self.technique),
            "sampler": self.sampler,
            "cache_bytes": self.cache_bytes,
        }
        if self.finder is not None:
            described["finder"] = self.finder
        return json.dumps(described, indent=2)

    @classmethod
    @cache
    def from_json(cls, text: str) -> HostSettings:
        """Read what `to_json` wrote; nothing in it is executed.

        Raises:
            ValueError: it is no such JSON, of another format, or has names unknown to this version.
        """
        try:
            described = json.loads(text)
            found = described["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"the settings of an exported folder must be JSON with a format number ({error!r}): export it again"
            ) from error
        if found != FORMAT:
            raise ValueError(
                f"the settings of this exported folder have format {found!r}, this version of hf_longtrunc reads "
                f"{FORMAT}: upgrade hf_longtrunc, or export it again"
            )
        try:
            rest = {name: value for name, value in described.items() if name != "format"}
            return cls(**{**rest, "technique": _decoded(rest["technique"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"this version of hf_longtrunc cannot read the settings of this exported folder ({error}): upgrade "
                "hf_longtrunc, or export it again"
            ) from error


def _encoded(value: Any) -> Any:
    """Return a technique or a retrieval strategy as a dict with its name and what differs from the defaults."""
    named = {kind: name for name, kind in _DATACLASSES.items()}
    if type(value).__name__ not in named:
        return list(value) if isinstance(value, tuple) else value
    changed = {
        field.name: _encoded(getattr(value, field.name))
        for field in fields(value)
        if getattr(value, field.name) != field.default
    }
    return {"name": named[type(value).__name__], **changed}


def _decoded(value: Any) -> Any:
    """Return the object that `_encoded` described."""
    if isinstance(value, dict):
        options = {key: _decoded(item) for key, item in value.items() if key != "name"}
        return getattr(ours, _DATACLASSES[value["name"]])(**options)
    return tuple(value) if isinstance(value, list) else value
