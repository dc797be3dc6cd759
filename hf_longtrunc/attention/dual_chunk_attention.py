"""Dual chunk attention for transformers models: `with DualChunkAttention()(model): model.generate(...)`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.cache_utils import DynamicLayer

from hf_longtrunc.arguments import one_of, whole
from hf_longtrunc.attention.cache import ChosenLayer
from hf_longtrunc.attention.dual_chunk import Chunks, Emphasis, block_votes, dual_chunk_attention, sharpness
from hf_longtrunc.attention.families import own_forward
from hf_longtrunc.attention.forward import Call, check_implementation
from hf_longtrunc.attention.lm_infinite import trained_length
from hf_longtrunc.attention.middle import positions_of
from hf_longtrunc.attention.patch import AttentionPatch
from hf_longtrunc.attention.retrieval import TopBlocks
from hf_longtrunc.attention.rotary import CannotPatchError, exact_forward
from hf_longtrunc.attention.row_positions import check_positions, checked_mask, taken
from hf_longtrunc.attention.step import Native, Step, carry, made, padding_of, text_step
from hf_longtrunc.models import CACHE, attachable, bound, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from hf_longtrunc.attention.lambda_attention import Scoring
    from hf_longtrunc.attention.patch import Learnt
    from hf_longtrunc.attention.retrieval import Ballot
    from hf_longtrunc.attention.rotary import Rotation
    from hf_longtrunc.attention.states import States

# rope_types whose frequencies depend on the running length: they are frozen at the trained one.
_RUNNING = {"dynamic", "longrope"}
_SINKS = 16  # first tokens that every token attends to, whatever is asked: no block holds them


@dataclass(frozen=True, kw_only=True)
class DualChunkAttention:
    """The whole text at distances that the model was trained on, without training.

    The text is cut into chunks of `chunk_length` tokens. Keys of a query's own chunk stand at their true distance,
    those of the chunk before at the true one as long as it is trained, and all earlier ones in their order at the end
    of what is trained. Nothing is left out: memory and time are those of full attention, with the cache that the model
    has anyway. A text of at most `chunk_length` tokens is the unmodified model, to the bit (Falcon: to rounding).

    Args:
        chunk_length: s; None takes three quarters of the trained length, as the authors do.
        trained_length: c, more than s; None takes what the config says.
        retrieval: `TopBlocks(...)` lets the keys of the blocks that a question points at count for several, in all
            layers that read: what the model overlooks. Texts of any length are emphasised so, and it needs a cache
            that grows (`DynamicCache`). None: every key counts for one.
        temperature: sharpens the scores of queries past the trained length, "log" by log(i + 1) / log c, "yarn" by
            (0.1 log((i + 1) / c) + 1)^2; None leaves them as they are.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    `with DualChunkAttention(...)(model):` patches for the block; `handle = DualChunkAttention(...).attach(model)` until
    `handle.detach()`. Only that model instance is touched, and afterwards it is as it was.

    Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463. Deviations:
    positions are counted from each row's first real token.
    """

    chunk_length: int | None = None
    trained_length: int | None = None
    retrieval: TopBlocks | None = None
    temperature: Literal["log", "yarn"] | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            one_of("temperature", self.temperature, ("log", "yarn"))
        for name, least in (("chunk_length", 1), ("trained_length", 2)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole(name, value, least=least))
        if self.chunk_length is not None and self.trained_length is not None:
            whole("chunk_length", self.chunk_length, most=self.trained_length - 1)
        if self.retrieval is not None and not isinstance(self.retrieval, TopBlocks):
            raise TypeError(f"retrieval must be TopBlocks(...) or None: all keys are seen; got {self.retrieval!r}")
        if self.retrieval is not None and (self.retrieval.distance is not None or self.retrieval.store != "device"):
            raise ValueError(
                "retrieval: all keys stay in the cache, at the distances of their chunks, so TopBlocks(distance=..., "
                f"store=...) say nothing here: leave them out, got {self.retrieval.distance}, {self.retrieval.store!r}"
            )

    def attach(self, model: Any) -> ChunkPatch:
        """Patch `model`, a transformers causal language model or a PEFT or DDP wrapper of one, until `detach()`.

        Raises:
            TypeError: it is no such model.
            ValueError: it is patched or compiled already, the chunk is not shorter than what it was trained on, or its
                architecture cannot be patched: no rotary positions, soft-capped scores, learned sink logits, layers
                with a window of their own, or others that the message names.
        """
        owner = attachable(model, "DualChunkAttention")
        trained = trained_length(owner.config) if self.trained_length is None else self.trained_length
        chunk = max(1, 3 * trained // 4) if self.chunk_length is None else self.chunk_length
        if chunk >= trained:
            raise ValueError(
                f"chunk_length must be less than the {trained} tokens that the model was trained on, got {chunk}; "
                "leave it out to take three quarters of them"
            )
        return ChunkPatch(self, owner, chunk, trained)

    __call__ = attach


@dataclass(frozen=True, eq=False)
class ChunkLayer:
    """One attention module: its place among the layers, its rotation, and what was chosen for all of them."""

    index: int
    rotation: Rotation
    chunk: int
    trained: int
    retrieval: TopBlocks | None
    temperature: str | None

    @property
    def first_in_block(self) -> int:
        """The position of the first key of the first block that can be chosen."""
        return _SINKS

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step, scoring: Scoring) -> Tensor:
        """Return the attention [batch, heads, n, value_dim] of one forward's queries over all keys so far.

        Args:
            query: [batch, heads, n, dim], rotated at i mod s.
            key: [batch, kv_heads, m, dim], rotated at j mod s, in the order in which the columns came.
            value: [batch, kv_heads, m, value_dim].
            step: the forward that the queries belong to.
            scoring: of this module; dropout is not applied.
        """
        if not scoring.is_plain or scoring.dropout:
            raise CannotPatchError(
                "DualChunkAttention joins plain attention calls, and this layer soft-caps its scores, has learned sink "
                "logits, slopes or dropout: set its attention dropout to 0, or take LMInfinite"
            )
        if key.shape[2] != step.keys:
            raise ValueError(
                f"the cache hands out {key.shape[2]} keys where {step.keys} were announced: DualChunkAttention needs a "
                "cache that grows; take DynamicCache or leave it to generate()"
            )
        if not query.dtype == key.dtype == value.dtype:  # under autocast, which turns queries and keys in fp32
            query, key = query.to(value.dtype), key.to(value.dtype)
        if step.key_order is not None:
            key, value = taken(key, step.key_order), taken(value, step.key_order)
        query = query if step.query_order is None else taken(query, step.query_order)
        if self.temperature is not None:
            wide = torch.promote_types(query.dtype, torch.float32)
            factor = sharpness(step.queries.to(query.device), self.trained, self.temperature, wide)
            query = (query * factor[:, None, :, None]).to(query.dtype)
        padding = (step.keys - 1 - step.last[:, 0]).expand(len(query)) if step.is_padded else None
        chunks = Chunks(self.chunk, self.trained, scoring.scaling, self.rotation.rotate)
        if self.retrieval is not None and step.ballot is not None and self.retrieval.reads(self.index, is_vote=True):
            self._vote(query, key, padding, chunks, step, self.retrieval)
        output = self._output(query, key, value, padding, chunks, step)
        return output if step.query_order is None else taken(output, step.query_order.argsort(dim=-1))

    def _output(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, chunks: Chunks, step: Step
    ) -> Tensor:
        """Attend; the last rows with what was chosen, unless they are choosing."""
        emphasis = self._emphasis(step)
        if emphasis is None or self.retrieval is None:
            return dual_chunk_attention(query, key, value, padding, chunks)
        plain = max(0, query.shape[2] - self.retrieval.rows)
        output = dual_chunk_attention(query[:, :, plain:], key, value, padding, chunks, emphasis)
        if not plain:
            return output
        end = key.shape[2] - self.retrieval.rows
        first = dual_chunk_attention(query[:, :, :plain], key[:, :, :end], value[:, :, :end], padding, chunks)
        return torch.cat([first, output], dim=2)

    def _emphasis(self, step: Step) -> Emphasis | None:
        """Return which keys count for several in this layer."""
        archive, retrieval = step.archives.get(self.index), self.retrieval
        chosen = None if archive is None else archive.chosen
        if chosen is None or retrieval is None or step.ballot is not None:
            return None
        if not retrieval.reads(self.index, is_vote=False):
            return None
        return Emphasis(*positions_of(chosen, retrieval.block_size, retrieval.margin, _SINKS))

    def _vote(
        self, query: Tensor, key: Tensor, padding: Tensor | None, chunks: Chunks, step: Step, retrieval: TopBlocks
    ) -> None:
        """Cast what rows that vote, and those before, pay to each block."""
        assert step.ballot is not None
        rows = retrieval.reading_rows(query.shape[2], is_vote=True)
        positions = step.queries[:, -rows:].to(query.device)
        groups = retrieval.groups(positions, step.last.to(query.device))
        last = retrieval.rows + retrieval.margin  # what reads must stand behind what is read
        votes = block_votes(query[:, :, -rows:], key, padding, chunks, groups, _SINKS, retrieval.block_size, last)
        retrieval.cast(step.ballot, self.index, votes, groups)


class ChunkPatch(AttentionPatch):
    """A model under dual chunk attention: what `DualChunkAttention.attach` returns. `detach()` undoes it.

    Attributes:
        chunk: s.
        trained: c.
    """

    technique: DualChunkAttention

    def __init__(self, technique: DualChunkAttention, model: Any, chunk: int, trained: int):
        super().__init__(technique, model, "its attention, masks and positions")
        self._retrieval = technique.retrieval
        self.chunk = chunk
        self.trained = trained
        self._install(trained)
        # Until here texts of every length took our attention, so that a layer which it cannot serve was refused.
        # So it stays where attention modules run forwards of ours, and where blocks are chosen.
        if technique.retrieval is None and not any(own_forward(module) for module in self.layers):
            run = self.decoder.forward.func
            self.set(self.decoder, "forward", update_wrapper(partial(run, chunk, None), self.decoder.forward))

    def traced_forward(self) -> Callable[..., Any]:
        """Return what runs while an `AttentionTrace` listens: our attention for a text of any length."""
        forward: Any = super().traced_forward()
        return forward if self._retrieval is not None else partial(forward.func, 0, None)

    def _layers(self, found: Learnt) -> dict[nn.Module, Any]:
        if found.has_windows:
            raise CannotPatchError(
                "some of its layers were trained with a window of their own, and would see positions start again at "
                "every chunk"
            )
        if None in found.rotations.values():
            raise CannotPatchError("some of its layers have no rotary positions, so there is no distance to limit")
        rope = getattr(self.decoder.config, "rope_parameters", None) or {}
        if {rope.get("rope_type"), *(v.get("rope_type") for v in rope.values() if isinstance(v, dict))} & _RUNNING:
            for module, rotaries in found.exact.items():
                self.set(module, "forward", exact_forward(rotaries))
        retrieval = self._retrieval
        if retrieval is not None:
            retrieval.check(list(found.indices.values()), not found.cached_otherwise, self._states is None)
            retrieval = retrieval.for_layers(max(found.indices.values()) + 1)
        self._retrieval, temperature = retrieval, self.technique.temperature
        return {
            module: ChunkLayer(found.indices[module], rotation, self.chunk, self.trained, retrieval, temperature)
            for module, rotation in found.rotations.items()
            if rotation is not None
        }

    def _forward(self) -> Callable[..., Any]:
        if "position_ids" not in parameters_of(self.decoder):
            raise CannotPatchError("its decoder takes no position_ids, so its keys cannot start again at every chunk")
        mesh = getattr(self.model, "_device_mesh", None)
        forward = ChunkedForward(
            self.decoder, self.decoder.forward, self._name, self.chunk, self._states, self._retrieval, mesh
        )
        return partial(forward.run, 0, None) if self._retrieval is None else partial(forward.reading)


@dataclass(frozen=True, eq=False)
class ChunkedForward:
    """Runs a decoder under dual chunk attention.

    Attributes:
        decoder: the patched model without its head.
        original: its forward before it was patched.
        name: of the patch's attention in its config.
        chunk: s.
        states: what its recurrent and convolutional layers carry; None where there are none.
        retrieval: chooses blocks; None where none are.
        mesh: over which tensor parallelism splits its heads; None: it does not.
    """

    decoder: Any
    original: Callable[..., Any]
    name: str
    chunk: int
    states: States | None
    retrieval: TopBlocks | None
    mesh: Any

    def reading(self, *args: Any, **inputs: Any) -> Any:
        """Run the decoder as the choice of blocks wants it."""
        assert self.retrieval is not None
        return ChunkCall(self, bound(self.decoder, args, inputs)).read(self.retrieval)

    def once(self, ballot: Ballot | None, **inputs: Any) -> Any:
        """Run the decoder once; with a ballot, let its last rows vote."""
        return self.run(0, ballot, **inputs)

    def run(self, untouched: int, ballot: Ballot | None, /, *args: Any, **inputs: Any) -> Any:
        """Run the decoder; a text of at most `untouched` tokens is left to the model's own attention."""
        inputs = bound(self.decoder, args, inputs)
        check_implementation(self.decoder, self.name, "DualChunkAttention")
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        new, cache = tokens.shape[1], inputs.get(CACHE)
        past = 0 if cache is None else int(cache.get_seq_length())
        padding = padding_of(inputs.get("attention_mask"))
        real = checked_mask(padding, past + new)
        check_positions(inputs.get("position_ids"), real, new)
        if self.states is not None:
            self.states.check(real, past, new)
        step, positions = text_step(real, past, new, tokens.device)
        layers = enumerate([] if cache is None else cache.layers)
        archives = {index: layer for index, layer in layers if isinstance(layer, ChosenLayer)}
        step = replace(step, archives=archives, ballot=ballot)
        is_short = past + new <= untouched and step.key_order is None
        if not is_short or (step.is_padded and inputs.get("position_ids") is None):
            inputs["position_ids"] = positions.clamp_min(0) % self.chunk
            if padding is None:  # without one, transformers takes a new chunk for a new document
                padding = tokens.new_ones(len(tokens), past + new, dtype=torch.long)
        carried = Native() if is_short else step
        inputs["attention_mask"] = made(inputs.get("attention_mask"), padding, carried)
        before = carry(carried)
        try:
            return self.original(**inputs)
        finally:
            carry(before)


class ChunkCall(Call):
    """One call of a decoder under dual chunk attention, which may be run twice."""

    @property
    def has_middle(self) -> bool:
        """Whether a block can be chosen before the rows that read."""
        retrieval = self.forward.retrieval
        least = _SINKS + retrieval.block_size + retrieval.margin + retrieval.rows
        return bool(self.seen >= least)

    def archives(self) -> list[Any]:
        """Return every layer of the cache, as one that holds a choice beside its keys.

        Raises:
            ValueError: the cache is another than transformers' ordinary one.
        """
        cache = self.inputs.get(CACHE)
        layers = [] if cache is None else cache.layers
        kinds = {type(layer) for layer in layers}
        if not layers or not kinds <= {DynamicLayer, ChosenLayer}:
            got = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
            raise ValueError(
                "DualChunkAttention(retrieval=TopBlocks(...)) keeps what it chose beside an ordinary cache that grows, "
                f"DynamicCache(config=model.config), got {got}: leave the cache to generate(), or leave retrieval out"
            )
        layers[:] = [layer if isinstance(layer, ChosenLayer) else ChosenLayer.of(layer) for layer in layers]
        return list(layers)
