"""Where an answer read: for every token of it, how much attention each stretch of the text got."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_longtrunc.arguments import check_int
from hf_longtrunc.attention.full_store import FullStoreCacheLayer
from hf_longtrunc.attention.key_retrieval import TopBlocks
from hf_longtrunc.attention.mass import by_stretch, mass_of_keys
from hf_longtrunc.attention.page import write_page
from hf_longtrunc.attention.patch import AttentionPatch
from hf_longtrunc.handles import Handle
from hf_longtrunc.models import bound

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from hf_longtrunc.attention.context import AttentionCall, ForwardContext
    from hf_longtrunc.attention.technique import Technique


@dataclass(eq=False)
class AttentionRecord:
    """What the last token of one forward read; the next token was made of it.

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
    """A record of what a patched model reads, until `detach()` or the end of a `with` block.

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
        handle: what `LMInfinite(...).attach(model)` or `DualChunkAttention(...).attach(model)` returned.
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
        _refuse_untraceable(handle)
        model, decoder = handle.model, handle.decoder
        super().__init__("AttentionTrace", model, "its attention layers record what they read")
        with self.or_nothing():
            for module, layer in handle.layers.items():
                handle.route(self, module, layer, self._attend)
            self.set(decoder, "_hf_longtrunc_trace", self)
            self.set(handle, "passthrough", False)  # a short text is to be read by layers that can be listened to
            self.set(decoder, "forward", update_wrapper(partial(self._forward), decoder.forward))
            prepare = model._prepare_cache_for_generation
            self.set(model, "_prepare_cache_for_generation", partial(_without_beams, prepare))

    def _forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the decoder and record what its last token read."""
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
        """Attend as the technique does, and record what the last query reads, except in a scoring pass."""
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
        return write_page(Path(path), tokenizer, ids, first, records, self.stretch, prompt)

    def _of_row(self, ids: list[int], first: int, row: int) -> list[tuple[Tensor, Tensor | None]]:
        """Return the mass, and the chosen blocks, of which each token from `first` on was made."""
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


def _refuse_untraceable(handle: AttentionPatch) -> None:
    if not handle.is_attached:
        raise ValueError(f"{handle!r} reads nothing any more: attach the technique again, and trace that")
    if getattr(handle.model, "_device_mesh", None) is not None:
        raise ValueError("tensor parallelism gives this process some of the heads alone: trace without it")
    if handle.compiled is not None:
        raise ValueError("a compiled step cannot be listened to: attach again, and leave compile() out")
    if "_hf_longtrunc_trace" in handle.decoder.__dict__:
        raise ValueError("this model has an AttentionTrace already: detach that first")


def _layer_record(technique: Technique, call: AttentionCall, stretch: int) -> AttentionRecord:
    """Return what the last query of a layer read; its mass is summed over the heads."""
    context, held = call.context, call.context.cache_layers.get(call.layer.index)
    last = context.last_position[:, 0].expand(len(call.value)).cpu()
    mass = torch.zeros(len(last), int(last.max()) // stretch + 1, dtype=torch.float64)
    for of_keys, positions in _masses(technique, call, held):
        mass += by_stretch(of_keys, positions, stretch, mass.shape[1]).cpu()
    blocks = None
    if held is not None and held.selection is not None and isinstance(technique.retrieval, TopBlocks):
        blocks = _spans(held.selection.blocks, technique.retrieval, technique.first_block)
    return AttentionRecord(last, None, mass, blocks)


def _masses(technique: Technique, call: AttentionCall, held: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the attention that the last query pays to keys [batch, m], and their positions [rows, m].

    `held` is the layer's cache: keys of its full store, where it has one, are read too.
    """
    text = held.text() if isinstance(held, FullStoreCacheLayer) else None
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    call = call.in_text_order()
    positions = call.context.query_positions[:, -1:]
    context = replace(call.context, query_positions=positions, query_order=None, key_order=None)
    query, scoring = call.query[:, :, -1:].to(dtype, copy=True), call.scoring._replace(dropout=0.0)

    def attend(values: Tensor, of_text: Tensor | None = None) -> Tensor:
        shown = context
        if of_text is not None:
            view = copy.copy(held)
            view.store_values = of_text
            shown = replace(context, cache_layers={call.layer.index: view})
        key = call.key.to(dtype, copy=True)
        return technique.attend(call._replace(query=query, key=key, value=values, context=shown, scoring=scoring))

    values = [call.value] if text is None else [call.value, text.value]
    first, *rest = mass_of_keys(attend, *values, dtype=dtype)
    own = first, _positions(context, call.key.shape[2])
    return [own, *((mass, text.positions) for mass in rest if text is not None)]


def _positions(context: ForwardContext, count: int) -> Tensor:
    """Return the positions [rows, count] of the keys that a cache returns; those of empty slots mean nothing."""
    device, sinks = context.last_position.device, context.leading_sinks
    if context.ring_slots is not None:
        others = context.query_positions - context.ring_slots[1][:, sinks:].to(device)
    else:
        others = context.last_position - torch.arange(count - sinks - 1, -1, -1, device=device)
    return torch.cat([torch.arange(sinks, device=device).expand(len(others), -1), others], dim=1)


def _spans(blocks: Tensor, retrieval: TopBlocks, first: int) -> Tensor:
    """Return where chosen blocks [batch, blocks] start and stop, their margins included [batch, blocks, 2]."""
    start = first + blocks.cpu() * retrieval.block_size
    spans = torch.stack([start - retrieval.margin, start + retrieval.block_size + retrieval.margin], dim=-1)
    return spans.clamp_min(0).masked_fill(blocks.cpu()[..., None] < 0, 0)


def _without_beams(prepare: Callable[..., Any], generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(
            f"num_beams={generation_config.num_beams} lets the rows of a batch change places, and a trace could not "
            "tell which row read what: generate with num_beams=1, or detach the AttentionTrace"
        )
    return prepare(generation_config, *args, **kwargs)
