"""A summary of a model under a technique, before a long prompt is read: layers, lengths, cache, drafts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import DynamicCache

from hf_longtrunc.attention.generation import prepare_layers
from hf_longtrunc.attention.probe import hidden_states
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.models import few_tokens


@dataclass(frozen=True)
class Explanation:
    """Summary of one model under one technique; `print` shows a line for each field.

    Examples:
        >>> told = DualChunkAttention(chunk_length=48).explain(model)
        >>> told.supported, told.cache_bytes(1000)
        (True, 256000)

    Attributes:
        technique: with its lengths for this model.
        supported: whether the model can be patched.
        layers: how many attention layers are patched, and what happens to the others.
        exact: the longest text that the model reads as without the patch.
        rope: which rotary frequencies hold.
        cache: what `generate` keeps.
        drafts: how many drafted tokens can be taken back.
        compile: whether `handle.compile()` compiles the decoding step.
        reason: why the model cannot be patched; empty where it can.
        constant_bytes: of the patched layers' cache a row, at any length.
        bytes_per_token: that the cache grows by for each token of a row.
    """

    technique: str
    supported: bool
    layers: str = ""
    exact: str = ""
    rope: str = ""
    cache: str = ""
    drafts: str = ""
    compile: str = ""
    reason: str = ""
    constant_bytes: int = 0
    bytes_per_token: int = 0

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of the patched layers' cache for a row of so many tokens."""
        return self.constant_bytes + self.bytes_per_token * tokens

    @classmethod
    def of(cls, patch: Any) -> Explanation:
        """Return the explanation of an `AttentionPatch`."""
        technique, found = patch.resolved, patch.found
        constant, growing = _cache_bytes(patch)
        left = len(found.windowed)
        others = f", {left} with a sliding window of their own as they are" if left else ""
        states = ", recurrent layers as they are" if found.has_states else ""
        return cls(
            technique=repr(technique),
            supported=True,
            layers=f"{len(patch.layers)} patched{others}{states}",
            exact=f"as without the patch up to {patch.law.exact_length:,} tokens"
            if patch.law.exact_length
            else "at no length: rotary frequencies are those of a long text from the first token on",
            rope=f"frequencies of a text of {technique.rope_length:,} tokens, at every length"
            if found.frequencies
            else "the model's own frequencies",
            cache=f"a ring: {_to_text(constant)} a row at any length"
            if not growing
            else f"grows by {_to_text(growing)} a token"
            + (f", and a ring of {_to_text(constant)} a row" if constant else ""),
            drafts="any number of drafted tokens"
            if technique.max_drafts is None
            else f"up to {technique.max_drafts} drafted tokens at a time",
            compile="handle.compile() compiles the step of one token"
            if technique.compiles_decode and technique.retrieval is None and not found.has_states
            else "no handle.compile()",
            constant_bytes=constant,
            bytes_per_token=growing,
        )

    def __str__(self) -> str:
        lines = [(each.name, getattr(self, each.name)) for each in fields(self) if each.type == "str"]
        return "\n".join(f"{name:>9}: {value}" for name, value in lines if value)


def _cache_bytes(patch: Any) -> tuple[int, int]:
    """Return the bytes a row that the patched layers' cache takes at any length, and for each token."""
    ids, cache = few_tokens(patch.decoder, 4), DynamicCache(config=patch.decoder.config)
    hidden_states(patch.decoder, ids, cache)
    layers = DynamicCache(config=patch.decoder.config).layers
    prepare_layers(patch, layers)
    constant = growing = 0
    for index in {layer.index for layer in patch.layers.values() if 0 <= layer.index < len(layers)}:
        ring, ordinary = layers[index], cache.layers[index]
        if not ordinary.is_initialized:
            continue
        keys, values = ordinary.keys.to("meta"), ordinary.values.to("meta")
        if isinstance(ring, RingCacheLayer):
            ring.lazy_initialization(keys, values)
            constant += ring.nbytes
        if not isinstance(ring, RingCacheLayer) or hasattr(ring, "store_keys"):
            growing += (keys.nbytes + values.nbytes) // keys.shape[2]
    return constant, growing


def _to_text(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:,.1f} GiB"
