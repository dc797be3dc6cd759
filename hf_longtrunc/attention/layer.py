"""One attention module under LM-Infinite: its rotation, what the user chose, and its attention in a given step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.attention.lambda_attention import lambda_attention, single_query_attention
from hf_longtrunc.attention.middle import Middle
from hf_longtrunc.attention.retrieval import View
from hf_longtrunc.attention.row_positions import first_real, taken
from hf_longtrunc.attention.step import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hf_longtrunc.attention.lambda_attention import Retrieved, Scoring
    from hf_longtrunc.attention.retrieval import Retrieval
    from hf_longtrunc.attention.rotary import Rotation
    from hf_longtrunc.attention.step import Step


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user chose, with every default resolved for one model.

    Attributes:
        num_sink_tokens: S.
        window_length: L.
        max_distance: D.
        path: of a prompt's attention, as for `lambda_attention`.
        retrieval: how the middle is read; None: not at all.
    """

    num_sink_tokens: int
    window_length: int
    max_distance: int
    path: str
    retrieval: Retrieval | None


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention module.

    Attributes:
        index: its place among the decoder's layers; -1 where the module does not know it.
        rotation: of its queries and keys; None where nothing turns.
        caches_keys: False where the cache holds what keys are made from (multi-head latent attention).
        settings: of the patch.
    """

    index: int
    rotation: Rotation | None
    caches_keys: bool
    settings: Settings

    @property
    def retrieval(self) -> Retrieval | None:
        """How the middle is read."""
        return self.settings.retrieval

    @property
    def first_in_block(self) -> int:
        """The position of the first key of the first block that can be chosen."""
        return self.settings.num_sink_tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step, scoring: Scoring) -> Tensor:
        """Return the Λ-attention [batch, heads, n, value_dim] of one forward's queries over what its cache hands out.

        Args:
            query: [batch, heads, n, dim], rotated at its own positions.
            key: [batch, kv_heads, m, dim], laid out as `step.layout` says.
            value: [batch, kv_heads, m, value_dim].
            step: the forward that the queries belong to.
            scoring: of this module.
        """
        if key.shape[2] != step.keys:
            raise ValueError(
                f"the cache hands out {key.shape[2]} keys where {step.keys} were announced: this kind of "
                "cache cannot be used on a model patched by LMInfinite; take DynamicCache or leave it to generate()"
            )
        if step.layout is Layout.RING:  # keys stand in their slots where the query is to see them
            assert step.slots is not None
            seen = None if step.slots[0] is None else step.slots[0].to(query.device)
            distances = step.slots[1].to(query.device)
            sinks = slice(self.settings.num_sink_tokens)
            if not self.caches_keys and self.rotation is not None and sinks.stop:
                cos, sin = (weights.to(key.device) for weights in step.turns[id(self.rotation)])
                key[:, :, sinks] = self.rotation.apply(key[:, :, sinks], cos, sin)
            read = self._reader(key, value, None, step, scoring)
            reads = None if read is None else partial(read, query, step.queries.to(query.device))
            return single_query_attention(query, key, value, distances, seen, scoring, reads)
        if step.query_order is None:
            return self._attend_text(query, key, value, step, scoring)
        # Masked columns between tokens: each row's tokens move behind them, and its outputs back.
        if step.key_order is not None:
            key, value = taken(key, step.key_order), taken(value, step.key_order)
        output = self._attend_text(taken(query, step.query_order), key, value, step, scoring)
        return taken(output, step.query_order.argsort(dim=-1))

    def _attend_text(self, query: Tensor, key: Tensor, value: Tensor, step: Step, scoring: Scoring) -> Tensor:
        """Attend over keys in the order of the text, or over the sinks and behind them the end of the text."""
        settings, sinks = self.settings, self.settings.num_sink_tokens
        leading = sinks if step.layout is Layout.SINKS_FIRST else 0
        i = step.queries.to(query.device)
        j = step.last.to(query.device) - torch.arange(key.shape[2] - leading - 1, -1, -1, device=query.device)
        read = self._reader(key, value, j, step, scoring)
        if leading:
            far = key[:, :, :sinks], value[:, :, :sinks]
            key, value = key[:, :, sinks:], value[:, :, sinks:]
        else:
            far = first_real(key, j, sinks, step.is_padded), first_real(value, j, sinks, step.is_padded)
        retrieval, new = settings.retrieval, query.shape[2]
        return lambda_attention(
            query,
            key,
            value,
            i,
            j,
            sinks=far if sinks and (leading or key.shape[2] > settings.window_length) else None,
            window=settings.window_length,
            max_distance=settings.max_distance,
            scoring=scoring,
            rotation=self.rotation,
            path=settings.path,
            read=read,
            reading_rows=0 if retrieval is None else retrieval.reading_rows(new, step.ballot is not None),
            is_padded=step.is_padded,
        )

    def _reader(
        self, key: Tensor, value: Tensor, j: Tensor | None, step: Step, scoring: Scoring
    ) -> Callable[[Tensor, Tensor, Tensor], Retrieved | None] | None:
        """Return what queries [batch, heads, n, dim] at i [rows, n] of this layer read with; None if nothing.

        Where there is no archive they read the layer's own keys, at j [rows, m] in the order of the text.
        """
        settings, retrieval = self.settings, self.settings.retrieval
        if retrieval is None or not retrieval.reads(self.index, step.ballot is not None):
            return None
        sinks, window, archive = settings.num_sink_tokens, settings.window_length, step.archives.get(self.index)
        if (key.shape[2] if archive is None else archive.held) <= window + sinks:
            return None
        rotate: Any = None if self.rotation is None else self.rotation.rotate
        if archive is not None:
            middle = archive.middle()
        else:
            assert j is not None
            middle = Middle(key if rotate is None else rotate(key, -j), value, j)
        chosen = None if archive is None else archive.chosen
        return partial(retrieval.read, View(middle, rotate, scoring, sinks, window, self.index, chosen, step.ballot))
