"""Where an answer read: for every token of it, how much attention each stretch of the text got."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_longtrunc.arguments import check_int
from hf_longtrunc.attention.full_store import FullStoreCacheLayer
from hf_longtrunc.attention.key_retrieval import TopBlocks
from hf_longtrunc.attention.patch import AttentionPatch
from hf_longtrunc.handles import Handle
from hf_longtrunc.models import bound
from hf_longtrunc.page import write
from hf_longtrunc.pieces import pieces

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from jaxtyping import Float, Int

    from hf_longtrunc.attention.context import AttentionCall, ForwardContext
    from hf_longtrunc.attention.technique import Technique

_CELLS = 600  # of a page's strip: more could not be told apart
_PARTS = 100_000  # unit of the shares on a page
_NOT_SEEN = -1


@dataclass(eq=False)
class AttentionRecord:
    """The attention of one forward's last token, from which the next token was predicted.

    Attributes:
        position: of that token in each row [batch], counted from the row's first real token.
        token: its id [batch]; None where the model was called with embeddings.
        mass: the share of attention that each stretch of the text got [batch, stretches], the mean over layers and
            heads. A row's sum is 1, or what learned sink logits leave of it.
        blocks: what `TopBlocks` chose, in tokens from start to stop [batch, blocks, 2], 0 to 0 where it chose fewer;
            None where nothing was chosen.
    """

    position: Tensor
    token: Tensor | None
    mass: Tensor
    blocks: Tensor | None = None


class AttentionTrace(Handle):
    """Record which tokens a patched model attends to, until `detach()` or the end of a `with` block.

    Examples:
        >>> with LMInfinite(window_length=64)(model) as handle, AttentionTrace(handle) as trace, torch.no_grad():
        ...     answer = model.generate(ids, max_new_tokens=3, do_sample=False)
        >>> trace.records[0].mass.shape  # of the prompt's last token: a share for each 64 tokens of the text
        torch.Size([1, 2])

    `to_html` writes the records as a page. They stay after the trace is detached. Logits do not change, but a text
    within one chunk of dual chunk attention is computed by our attention too, equal up to rounding.

    Each forward is recorded at its last token: that of a prompt, which the answer's first token is predicted from, and
    every decoded one. Cost: for these tokens, each layer's attention and its backward pass with values of one number.
    The shares of a forward are stored on the CPU, a number for each stretch.

    Args:
        handle: returned by `LMInfinite(...).attach(model)` or `DualChunkAttention(...).attach(model)`.
        stretch: tokens of the text that are counted together.

    Attributes:
        records: one for each forward, in their order.

    Raises:
        TypeError: `handle` is no such handle.
        ValueError: it is detached or traced already, its step is compiled, or tensor parallelism splits its heads.
    """

    def __init__(self, handle: AttentionPatch, *, stretch: int = 64):
        if not isinstance(handle, AttentionPatch):
            raise TypeError(
                "handle must be what LMInfinite(...)(model) or DualChunkAttention(...)(model) returns, got "
                f"{type(handle).__name__}"
            )
        self.stretch = check_int("stretch", stretch, minimum=1)
        self.records: list[AttentionRecord] = []
        self._thread = threading.local()
        self._patch = handle
        _refuse_trace(handle)
        model, decoder = handle.model, handle.decoder
        super().__init__("AttentionTrace", model, "its attention layers record their weights")
        with self.or_nothing():
            for module, layer in handle.layers.items():
                handle.set_attention(self, module, layer, self._attend)
            self.set(decoder, "_hf_longtrunc_trace", self)
            self.set(handle, "passthrough", False)  # a short text too is computed by layers that record
            self.set(decoder, "forward", update_wrapper(partial(self._forward), decoder.forward))
            prepare = model._prepare_cache_for_generation
            self.set(model, "_prepare_cache_for_generation", partial(_prepare_cache, prepare))

    def _forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the decoder and record the attention of its last token."""
        inputs = bound(self._patch.decoder, args, inputs)
        if torch.is_inference_mode_enabled():
            raise ValueError("AttentionTrace cannot count under torch.inference_mode(): use torch.no_grad()")
        read: list[tuple[ForwardContext, int, AttentionRecord]] = []  # of each layer, with its number of heads
        self._thread.read = read
        try:
            output = self._patch.forward(**inputs)
        finally:
            self._thread.read = None
        if read:
            context, _, last = read[-1]
            layers = [(n, each.mass) for ran, n, each in read if ran.last_position is context.last_position]
            mass = torch.stack([mass for _, mass in layers]).sum(0) / sum(heads for heads, _ in layers)
            token, order = inputs.get("input_ids"), context.query_order
            if token is not None:
                token = (token if order is None else token.gather(1, order.to(token.device)))[:, -1].cpu()
            self.records.append(replace(last, token=token, mass=mass))
        return output

    def _attend(self, call: AttentionCall) -> Tensor:
        """Attend as the technique does, and record the last query's attention, except in a scoring pass."""
        technique = self._patch.resolved
        read = getattr(self._thread, "read", None)  # None where a layer is run again for its gradients
        if read is not None and call.context.block_scores is None:
            read.append((call.context, call.query.shape[1], _layer_record(technique, call, self.stretch)))
        return technique.attend(call)

    def to_html(
        self,
        tokenizer: Any,
        ids: Tensor | Sequence[int],
        path: str | os.PathLike[str],
        *,
        prompt_length: int,
        row: int = 0,
        prompt: str = "",
    ) -> Path:
        """Write one page that shows where each token of an answer read in its text; return the page's path.

        The page holds everything that it needs and asks nothing of a network. The text is a strip of stretches in
        their order, as dark as the attention that each got; chosen blocks are marked. Pointing at a token of the
        answer, tapping it or reaching it with the arrow keys shows where it read; pointing at a stretch shows its
        words.

        Args:
            tokenizer: of the model.
            ids: of one row's prompt and answer, without padding.
            path: a file, overwritten if it exists.
            prompt_length: how many of the ids are the prompt.
            row: of the batch.
            prompt: shown above the strip: the question, say.

        Raises:
            ValueError: a token of the answer was not recorded, or other ones were than `ids` holds.
            OSError: the file cannot be written.
        """
        ids = [int(token) for token in ids]
        first = check_int("prompt_length", prompt_length, minimum=1, maximum=len(ids) - 1)
        records = self._of_row(ids, first, check_int("row", row, minimum=0))
        content = resources.files("hf_longtrunc.attention").joinpath("trace.html").read_text(encoding="utf-8")
        data = _html_fields(tokenizer, ids, prompt, self.stretch, records)
        return write(Path(path), content, data, title="Where the answer read", prompt=prompt)

    def _of_row(self, ids: list[int], first: int, row: int) -> list[tuple[Tensor, Tensor | None]]:
        """Return the mass and the selected blocks from which each token from `first` on was predicted."""
        by_position = {int(each.position[row]): each for each in self.records if row < len(each.position)}
        found = []
        for before in range(first - 1, len(ids) - 1):
            record = by_position.get(before)
            if record is None or (record.token is not None and int(record.token[row]) != ids[before]):
                told = "nothing" if record is None else f"token {int(record.token[row])}"  # type: ignore[index]
                raise ValueError(
                    f"{told} was recorded at position {before} of row {row}, where ids hold {ids[before]}: pass the "
                    "ids of that row's prompt and answer without padding, as this trace saw them last. Of drafts "
                    "(assisted decoding, prompt lookup) only each forward's last token is recorded"
                )
            found.append((record.mass[row], None if record.blocks is None else record.blocks[row]))
        return found

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}; {len(self.records):,} forwards recorded>"


def _refuse_trace(handle: AttentionPatch) -> None:
    if not handle.is_attached:
        raise ValueError(f"{handle!r} reads nothing any more: attach the technique again, and trace that")
    if getattr(handle.model, "_device_mesh", None) is not None:
        raise ValueError("tensor parallelism gives this process some of the heads alone: trace without it")
    if handle.compiled is not None:
        raise ValueError("a compiled step cannot be listened to: attach again, and leave compile() out")
    if "_hf_longtrunc_trace" in handle.decoder.__dict__:
        raise ValueError("this model has an AttentionTrace already: detach that first")


def _layer_record(technique: Technique, call: AttentionCall, stretch: int) -> AttentionRecord:
    """Return the record of one layer's last query; its mass is summed over the heads."""
    context, cached = call.context, call.context.cache_layers.get(call.layer.index)
    last = context.last_position[:, 0].expand(len(call.value)).cpu()
    mass = torch.zeros(len(last), int(last.max()) // stretch + 1, dtype=torch.float64)
    for of_keys, positions in _weights_of_cache(technique, call, cached):
        mass += weights_of_positions(of_keys, positions, stretch, mass.shape[1]).cpu()
    blocks = None
    if cached is not None and cached.selection is not None and isinstance(technique.retrieval, TopBlocks):
        retrieval, chosen = technique.retrieval, cached.selection.indices.cpu()[..., None]
        start = technique.num_sink_tokens + chosen * retrieval.block_size
        spans = torch.cat([start - retrieval.margin, start + retrieval.block_size + retrieval.margin], dim=-1)
        blocks = spans.clamp_min(0).masked_fill(chosen < 0, 0)
    return AttentionRecord(last, None, mass, blocks)


def _weights_of_cache(technique: Technique, call: AttentionCall, cached: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the attention that the last query pays to keys [batch, m], and their positions [rows, m].

    If `cached`, the layer's cache, has a full store, the keys of the store are read too.
    """
    text = cached.text() if isinstance(cached, FullStoreCacheLayer) else None
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    call = call.in_text_order()
    context = call.context
    context = replace(context, query_positions=context.query_positions[:, -1:], query_order=None, key_order=None)
    query, scoring = call.query[:, :, -1:].to(dtype, copy=True), call.scoring._replace(dropout=0.0)

    def attend(values: Tensor, of_text: Tensor | None = None) -> Tensor:
        with_values = context
        if of_text is not None:
            view = copy.copy(cached)
            view.store_values = of_text
            with_values = replace(context, cache_layers={call.layer.index: view})
        key = call.key.to(dtype, copy=True)
        return technique.attend(call._replace(query=query, key=key, value=values, context=with_values, scoring=scoring))

    values = [call.value] if text is None else [call.value, text.value]
    mass, *of_text = weights_of_keys(attend, *values, dtype=dtype)
    return [
        (mass, _positions(context, call.key.shape[2])),
        *((each, text.positions) for each in of_text if text is not None),
    ]


def weights_of_keys(
    attend: Callable[..., Tensor], *values: Float[Tensor, "batch kv_heads _ _"], dtype: torch.dtype
) -> list[Float[Tensor, "batch _"]]:
    """Return the attention weight of each key [batch, keys], summed over heads and queries.

    An output is linear in the values, o = sum_j w_j v_j. If each value is one number, the gradient of o by v_j is w_j,
    summed over the heads that share the key. So the weights come from the code that attends, not from a copy of it:
    `attend` takes a tensor [batch, kv_heads, keys, 1] for each of `values`, and returns the output of attention over
    all of them [batch, heads, n, 1]. Works under `torch.no_grad`, not under `torch.inference_mode`.
    """
    # Saved-tensor hooks of a checkpoint around this call must not count its tensors.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        ones = [value.new_ones(*value.shape[:3], 1, dtype=dtype).requires_grad_() for value in values]
        found = torch.autograd.grad(attend(*ones).sum(), ones, allow_unused=True)
    return [
        each.new_zeros(each.shape[0], each.shape[2]) if grad is None else grad[..., 0].sum(1)
        for each, grad in zip(ones, found, strict=True)
    ]


def weights_of_positions(
    mass: Float[Tensor, "batch keys"], positions: Int[Tensor, "rows keys"], stretch: int, count: int
) -> Float[Tensor, "batch count"]:
    """Return the sum of mass over each of `count` stretches of `stretch` tokens; keys before position 0 have none."""
    index = (positions.to(mass.device) // stretch).clamp(0, count - 1).expand(mass.shape)
    return mass.new_zeros(len(mass), count).scatter_add(1, index, mass)


def _positions(context: ForwardContext, count: int) -> Tensor:
    """Return the positions [rows, count] of the keys that a cache returns; those of empty slots mean nothing."""
    device, sinks = context.last_position.device, context.leading_sinks
    if context.ring_slots is not None:
        others = context.query_positions - context.ring_slots[1][:, sinks:].to(device)
    else:
        others = context.last_position - torch.arange(count - sinks - 1, -1, -1, device=device)
    return torch.cat([torch.arange(sinks, device=device).expand(len(others), -1), others], dim=1)


def _html_fields(
    tokenizer: Any, ids: list[int], prompt: str, stretch: int, read: Sequence[tuple[Tensor, Tensor | None]]
) -> dict[str, Any]:
    """Return the data that `trace.html` shows.

    `read` holds for each token of the answer the mass of each stretch [stretches] and the selected blocks [blocks, 2].
    """
    per_cell = -(-len(read[-1][0]) // _CELLS)  # stretches
    cell, first = stretch * per_cell, len(ids) - len(read)
    texts = list(pieces(tokenizer, ids))
    answer = []
    for text, (mass, blocks) in zip(texts[first:], read, strict=True):
        padded = torch.nn.functional.pad(mass, (0, -len(mass) % per_cell))
        shares = padded.view(-1, per_cell).sum(1).tolist()
        answer.append(
            {
                "text": text,
                "mass": [_NOT_SEEN if share == 0 else round(share * _PARTS) for share in shares],
                "blocks": [] if blocks is None else [span for span in blocks.tolist() if span[1]],
            }
        )
    return {
        "prompt": prompt,
        "cell": cell,
        "length": len(ids),
        "first": first,
        "parts": _PARTS,
        "words": ["".join(texts[start : start + cell]) for start in range(0, len(ids), cell)],
        "answer": answer,
    }


def _prepare_cache(prepare: Callable[..., Any], generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams={generation_config.num_beams} lets the rows of a batch change places, and a trace could not "
            "tell which row read what: generate with num_beams=1, or detach the AttentionTrace"
        )
    return prepare(generation_config, *args, **kwargs)
