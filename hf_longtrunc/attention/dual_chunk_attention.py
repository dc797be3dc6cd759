"""Dual chunk attention for transformers models: `with DualChunkAttention()(model): model.generate(...)`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.arguments import whole
from hf_longtrunc.attention.dual_chunk import dual_chunk_attention
from hf_longtrunc.attention.families import own_forward
from hf_longtrunc.attention.forward import check_implementation
from hf_longtrunc.attention.lm_infinite import trained_length
from hf_longtrunc.attention.patch import AttentionPatch
from hf_longtrunc.attention.rotary import CannotPatchError, exact_forward
from hf_longtrunc.attention.row_positions import check_positions, checked_mask, taken
from hf_longtrunc.attention.step import Native, Step, carry, made, padding_of, text_step
from hf_longtrunc.models import CACHE, attachable, bound, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from hf_longtrunc.attention.lambda_attention import Scoring
    from hf_longtrunc.attention.patch import Learnt
    from hf_longtrunc.attention.rotary import Rotation
    from hf_longtrunc.attention.states import States

# rope_types whose frequencies depend on the running length: they are frozen at the trained one.
_RUNNING = {"dynamic", "longrope"}


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

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    `with DualChunkAttention(...)(model):` patches for the block; `handle = DualChunkAttention(...).attach(model)` until
    `handle.detach()`. Only that model instance is touched, and afterwards it is as it was.

    Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463. Deviations:
    positions are counted from each row's first real token.
    """

    chunk_length: int | None = None
    trained_length: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("chunk_length", 1), ("trained_length", 2)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole(name, value, least=least))
        if self.chunk_length is not None and self.trained_length is not None:
            whole("chunk_length", self.chunk_length, most=self.trained_length - 1)

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
    """One attention module: its rotation, and the lengths that were chosen."""

    rotation: Rotation
    chunk: int
    trained: int

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
        if step.key_order is not None:
            key, value = taken(key, step.key_order), taken(value, step.key_order)
        query = query if step.query_order is None else taken(query, step.query_order)
        output = dual_chunk_attention(
            query,
            key,
            value,
            (step.keys - 1 - step.last[:, 0]).expand(len(query)) if step.is_padded else None,
            chunk=self.chunk,
            trained=self.trained,
            scaling=scoring.scaling,
            rotate=self.rotation.rotate,
        )
        return output if step.query_order is None else taken(output, step.query_order.argsort(dim=-1))


class ChunkPatch(AttentionPatch):
    """A model under dual chunk attention: what `DualChunkAttention.attach` returns. `detach()` undoes it.

    Attributes:
        chunk: s.
        trained: c.
    """

    def __init__(self, technique: DualChunkAttention, model: Any, chunk: int, trained: int):
        super().__init__(technique, model, "its attention, masks and positions")
        self.chunk = chunk
        self.trained = trained
        self._install(trained)
        # Until here texts of every length took our attention, so that a layer which it cannot serve was refused.
        # So it stays where attention modules run forwards of ours.
        if not any(own_forward(module) for module in self.layers):
            run = self.decoder.forward.func
            self.set(self.decoder, "forward", update_wrapper(partial(run, chunk), self.decoder.forward))

    def traced_forward(self) -> Callable[..., Any]:
        """Return what runs while an `AttentionTrace` listens: our attention for a text of any length."""
        forward: Any = super().traced_forward()
        return partial(forward.func, 0)

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
        return {
            module: ChunkLayer(rotation, self.chunk, self.trained)
            for module, rotation in found.rotations.items()
            if rotation is not None
        }

    def _forward(self) -> Callable[..., Any]:
        if "position_ids" not in parameters_of(self.decoder):
            raise CannotPatchError("its decoder takes no position_ids, so its keys cannot start again at every chunk")
        forward = ChunkedForward(self.decoder, self.decoder.forward, self._name, self.chunk, self._states)
        return partial(forward.run, 0)


@dataclass(frozen=True, eq=False)
class ChunkedForward:
    """Runs a decoder under dual chunk attention.

    Attributes:
        decoder: the patched model without its head.
        original: its forward before it was patched.
        name: of the patch's attention in its config.
        chunk: s.
        states: what its recurrent and convolutional layers carry; None where there are none.
    """

    decoder: Any
    original: Callable[..., Any]
    name: str
    chunk: int
    states: States | None

    def run(self, untouched: int, /, *args: Any, **inputs: Any) -> Any:
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
