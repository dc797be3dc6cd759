"""One call of a patched decoder: its arguments by name, its lengths and its padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_longtrunc.attention.context import ForwardContext, padding_of
from hf_longtrunc.attention.padding import check_positions, checked_mask, from_first_token, text_order
from hf_longtrunc.models import CACHE, bound

if TYPE_CHECKING:
    from collections.abc import Sequence

_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "per_layer_inputs")
_DRAFTS = 64  # tokens that may follow a question in its own forward: as many as a ring can take back


@dataclass(frozen=True, eq=False)
class DecoderCall:
    """One call of a decoder.

    Attributes:
        decoder: the patched model without its head.
        inputs: its arguments by the names of its forward.
        new: how many tokens it brings.
        past: how many columns its cache holds.
        real: where there are tokens [batch, past + new]; None: everywhere.
        like: an empty tensor of the decoder's dtype on the tokens' device.
    """

    decoder: Any
    inputs: dict[str, Any]
    new: int
    past: int
    real: Tensor | None
    like: Tensor

    @classmethod
    def bind(cls, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DecoderCall:
        """Read a call's arguments, positional, renamed and deprecated ones too.

        Raises:
            ValueError: mask or positions are none that a patched model takes; the message says what to do.
        """
        inputs = bound(decoder, args, kwargs)
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        cache = inputs.get(CACHE)
        new, past = int(tokens.shape[1]), 0 if cache is None else int(cache.get_seq_length())
        positions = inputs.get("position_ids")
        if isinstance(positions, Tensor) and not positions.shape[-1]:  # of generate(inputs_embeds, prefill_chunk_size)
            inputs["position_ids"] = None
        if not new:
            raise ValueError(
                "this forward brings no token: transformers' generate() does so for inputs_embeds with an "
                "assistant. Pass input_ids, or leave the assistant out"
            )
        real = checked_mask(padding_of(inputs.get("attention_mask")), past + new)
        check_positions(inputs.get("position_ids"), real, past, new)
        return cls(decoder, inputs, new, past, real, tokens.new_empty(0, dtype=decoder.dtype))

    @property
    def cache(self) -> Any:
        """The cache; None without one."""
        return self.inputs.get(CACHE)

    @property
    def cache_layers(self) -> Sequence[Any]:
        """The cache's layers; none without a cache."""
        return () if self.cache is None else self.cache.layers

    @property
    def batch(self) -> int:
        """How many rows it has."""
        tokens = self.inputs.get("input_ids")
        return len(self.inputs["inputs_embeds"] if tokens is None else tokens)

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.like.device

    def tokens_after(self, ids: Sequence[int]) -> Tensor | None:
        """Return how many tokens follow each row's last occurrence of `ids` [batch], up to 64; -1 where there is none.

        None where no ids are named. In a call that brings embeddings, those of `ids` are looked for.
        """
        if not ids:
            return None
        if self.new < len(ids):  # a decoded token, for which no device is waited
            return torch.full((self.batch,), -1)
        tokens, wanted = self.inputs.get("input_ids"), torch.tensor(list(ids), device=self.device)
        if tokens is None:
            tokens, wanted = self.inputs["inputs_embeds"], self.decoder.get_input_embeddings()(wanted)
        windows = tokens[:, -len(ids) - _DRAFTS :].unfold(1, len(ids), 1)  # [batch, places, (dim,) ids]
        is_there = (windows == wanted.movedim(0, -1)).flatten(2).all(-1).flip(1)
        return torch.where(is_there.any(1), is_there.int().argmax(1), -1)

    def part(self, start: int, stop: int) -> DecoderCall:
        """Return the call of tokens start..stop alone, beside the cache as it is now."""
        inputs = dict(self.inputs)
        for name in _BY_TOKEN:
            value = inputs.get(name)
            if isinstance(value, Tensor):
                by_row = name in ("inputs_embeds", "per_layer_inputs")
                inputs[name] = value[:, start:stop] if by_row else value[..., start:stop]
        if stop < self.new:
            mask = inputs.get("attention_mask")
            if mask is not None and not isinstance(mask, Tensor):
                raise ValueError(
                    "TopBlocks(ending_ids=...) cannot separate drafts from the question in a multimodal model: "
                    "generate without prompt_lookup_num_tokens and assistant_model"
                )
            inputs["attention_mask"] = None if mask is None else mask[:, : mask.shape[1] - (self.new - stop)]
        return DecoderCall.bind(self.decoder, (), inputs)

    def refuse_hidden_states(self) -> None:
        """Refuse a call that wants hidden states of all layers, of rows that run twice."""
        if self.inputs.get("output_hidden_states") or self.decoder.config.output_hidden_states:
            raise ValueError("output_hidden_states cannot be had with TopBlocks, which runs the last rows twice")


def full_context(call: DecoderCall) -> tuple[ForwardContext, Tensor]:
    """Return the context of a call with a cache that returns all keys in text order, and its queries' positions.

    The positions [rows, new] come in the order of the columns.
    """
    columns = torch.arange(call.past, call.past + call.new, device=call.device)
    padding, order = text_order(call.real)
    positions = queries = from_first_token(columns, padding)
    query_order = None
    if call.real is not None and order is not None:
        positions, query_order = positions_in_call_order(columns, padding, call.real[:, call.past :])
    last = from_first_token(columns[-1:], padding)
    is_padded = padding is not None
    context = ForwardContext(
        queries, last, call.past + call.new, is_padded=is_padded, query_order=query_order, key_order=order
    )
    return context, positions


def positions_in_call_order(columns: Tensor, padding: Tensor | None, now: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of new columns [batch, n], -1 where `now` says there is no token, and their order."""
    assert padding is not None
    before = columns[-1] + 1 - padding - now.sum(-1)
    positions = torch.where(now, before[:, None] + now.cumsum(-1) - 1, -1)
    return positions, now.int().argsort(dim=-1, stable=True)
