"""Unlimiformer for transformers models: `with Unlimiformer()(model): model.generate(...)`."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_longtrunc.changes import Changes, attached, disagreement
from hf_longtrunc.cross_attention.absorbed import cross_attention_modules
from hf_longtrunc.cross_attention.datastore import Datastore, FaissDatastore
from hf_longtrunc.cross_attention.long_encoder import long_encoder, real_spans
from hf_longtrunc.cross_attention.retrieved_attention import retrieved_attention
from hf_longtrunc.models import evaluating, without_peft

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_longtrunc.cross_attention.absorbed import CrossAttention
    from hf_longtrunc.cross_attention.datastore import Store

Training = Literal["retrieval", "random", "alternating"]

# Lengths that an encoder cannot exceed, and one that it was trained at but can.
_HARD_LENGTHS = ("max_encoder_position_embeddings", "max_position_embeddings")
_SOFT_LENGTHS = ("n_positions",)
# A mask of this dtype asks for random states, one of bools for the best.
_RANDOM = torch.uint8


@dataclass(frozen=True)
class Unlimiformer:
    """Inputs of any length for a pretrained encoder-decoder: every cross-attention head reads its own best states.

    The text is encoded in overlapping windows by the unmodified encoder, and each head of each decoder layer attends
    to the `top_k` encoder states that score highest for its query, wherever they stand. No weights change. An input of
    up to `window` tokens is the unmodified model, to the bit. Memory: one copy of the encoder states, shared by all
    layers, heads and beams; time: one pass over them per layer and step.

    Args:
        top_k: states that a head attends to; None takes `window`, as the paper does. A text of up to `window` tokens
            in a longer batch is attended to whole.
        window: tokens the encoder reads at a time; None takes its maximum, from the config.
        overlap: share of a window that its neighbours encode too, in [0, 1).
        index: None searches exactly; "faiss:" and what `FaissDatastore` takes, "faiss:HNSW32", through FAISS; a
            function from states [n, width] to a store, through what it returns (`ShardedDatastore`).
        encode_batch: windows the encoder is given at once.
        training: which states a layer attends to while the model is in training mode: "retrieval" its top k, "random"
            `top_k` random ones, "alternating" one and the other in turn, random first.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    `with Unlimiformer(...)(model):` patches for the block; `patch = Unlimiformer(...).attach(model)` until
    `patch.detach()`. Only that model instance is touched, and afterwards it is as it was.

    Source: Bertsch et al. 2023, "Unlimiformer: Long-Range Transformers with Unlimited Length Input", arXiv 2305.01625.
    Deviations: the search is exact unless an index is named; the first decoded token retrieves as all others do.
    """

    top_k: int | None = None
    window: int | None = None
    overlap: float = 0.5
    index: str | Callable[[Tensor], Store] | None = None
    encode_batch: int = 8
    training: Training = "retrieval"

    def __post_init__(self) -> None:
        for name in ("top_k", "window", "encode_batch"):
            value = getattr(self, name)
            if value is not None or name == "encode_batch":
                _check_count(name, value)
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, (int, float)) or not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be a number in [0, 1), got {self.overlap!r}; the paper takes 0.5")
        if isinstance(self.index, str) and not self.index.startswith("faiss:"):
            raise ValueError(f"index must begin with 'faiss:', as in 'faiss:HNSW32', got {self.index!r}")
        if not (self.index is None or isinstance(self.index, str) or callable(self.index)):
            raise TypeError(
                f"index must be None, 'faiss:...' or a function from states to a store, got {type(self.index).__name__}"
            )
        if self.training not in get_args(Training):
            raise ValueError(f"training must be one of {', '.join(get_args(Training))}, got {self.training!r}")

    __call__ = attached

    def attach(self, model: Any) -> RetrievalPatch:
        """Patch `model`, a transformers encoder-decoder over text or a PEFT wrapper of one, until `detach()`.

        Runs a few forwards of some tokens to find the cross-attention, and to see that it computes what it did.

        Raises:
            TypeError: it is no such model.
            ValueError: it is patched already, `window` exceeds what its encoder can read, or its architecture cannot
                be patched (the message says why).
            ModuleNotFoundError: `index` names FAISS, which is not installed.
        """
        owner = _encoder_decoder(model)
        window = _window(owner.get_encoder().config, self.window)
        return RetrievalPatch(owner, self, window, window if self.top_k is None else self.top_k)


class RetrievalPatch:
    """A patched model: what `Unlimiformer.attach` returns. `detach()` undoes it.

    Every change is an attribute of this model's own modules or a hook; each notes its undoing when it is made. The
    encoder's `forward` cuts long inputs into windows; a hook before the decoder hands the mask of long inputs through
    untouched, [rows, 1, 1, n], one row per text; the cross-attention modules' `forward` read states and mask.
    """

    def __init__(self, model: Any, settings: Unlimiformer, window: int, top_k: int):
        self.window = window
        self.top_k = top_k
        self._settings = settings
        self._model = model
        self._encoder, self._decoder = model.get_encoder(), model.get_decoder()
        self._decoder_parameters = list(inspect.signature(self._decoder.forward).parameters)
        self._longest_untouched = window
        self._was_random = False
        self._held: tuple[weakref.ref[Tensor], Tensor, list[Store]] | None = None
        self._changes = Changes()
        try:
            self._attach()
        except BaseException:
            self._changes.close()
            raise

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        self._changes.close()
        self._held = None

    # -- putting in place ----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        model, settings = self._model, self._settings
        if "_unlimiformer" in model.__dict__:
            raise ValueError(
                f"this {type(model).__name__} is patched by Unlimiformer already: detach that patch first, they do not "
                "nest"
            )
        self._changes.set(model, "_unlimiformer", self)
        before: list[Tensor] = []
        found = cross_attention_modules(self._decoder, lambda: before.append(self._few_states()))
        if not found:
            raise ValueError(
                f"Unlimiformer cannot patch {type(model).__name__}: no cross-attention with query, key, value and "
                "output projections was found in its decoder"
            )
        if isinstance(settings.index, str):
            width = found[0].heads().key_weight.shape[-1]
            self._store(torch.ones(1, width))  # fails now rather than after an hour of encoding
        encode = long_encoder(self._encoder.forward, self.window, settings.overlap, settings.encode_batch)
        self._changes.set(self._encoder, "forward", encode)
        self._changes.callback(self._decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        for cross in found:
            self._changes.set(cross.module, "forward", partial(self._attend, cross))
        self._check_against(before[0])
        self._changes.set(model, "_expand_inputs_for_generation", self._expand_inputs)
        self._changes.set(model, "__deepcopy__", _refuse_deepcopy)

    def _few_states(self) -> Tensor:
        """Return the decoder's hidden states after a few tokens, without cache, dropout or gradient."""
        model = self._model
        embeddings = model.get_input_embeddings().weight
        ids = torch.tensor(
            [[(7 * i + 3) % len(embeddings) for i in range(min(8, self.window))]], device=embeddings.device
        )
        with evaluating(model), torch.no_grad():
            states = self._encoder(input_ids=ids)[0]
            decoded: Tensor = self._decoder(input_ids=ids, encoder_hidden_states=states, use_cache=False)[0]
        return decoded

    def _check_against(self, before: Tensor) -> None:
        """Refuse a model whose cross-attention, retrieving everything, gives other results than its own."""
        self._longest_untouched = 0
        try:
            difference = disagreement(before, self._few_states())
        finally:
            self._longest_untouched = self.window
        if difference is not None:
            raise ValueError(
                f"Unlimiformer cannot patch {type(self._model).__name__}: its cross-attention computes something that "
                f"is not reproduced here (results differ by {difference:.1e})"
            )

    # -- a forward -----------------------------------------------------------------------------------------------------

    def _begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Hand a long input's mask through, before the decoder runs; choose what a training step attends to."""
        inputs = {**dict(zip(self._decoder_parameters, args, strict=False)), **kwargs}
        states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        if states is None or states.shape[1] <= self._longest_untouched:
            return (), inputs
        rows, length = states.shape[:2]
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.bool, device=states.device)
        # generate() repeats the mask for every beam, and here not the states.
        mask = mask.bool()[:: max(1, len(mask) // rows)]
        if not torch.is_grad_enabled():
            self._hold(states, mask)
        # The dtype travels too, and stays right when activation checkpointing runs a layer again much later.
        dtype = _RANDOM if decoder.training and self._draws_at_random() else torch.bool
        return (), {**inputs, "encoder_attention_mask": mask.to(dtype)[:, None, None]}

    def _draws_at_random(self) -> bool:
        if self._settings.training == "alternating":
            self._was_random = not self._was_random
            return self._was_random
        return self._settings.training == "random"

    def _attend(self, cross: CrossAttention, *args: Any, **kwargs: Any) -> Any:
        """Run a cross-attention module: its own forward for short inputs, retrieval for long ones."""
        hidden, states, mask = cross.inputs(args, kwargs)
        if states.shape[1] <= self._longest_untouched:
            return cross.forward(*args, **kwargs)
        assert mask is not None
        stores = self._stores(states, mask[:, 0, 0].bool())
        top_k = [len(store) if len(store) <= self.window else self.top_k for store in stores]
        if mask.dtype == _RANDOM:
            stores = [_random_states(store, k) for store, k in zip(stores, top_k, strict=True)]
        query = cross.query(hidden).to(states.dtype)
        return cross.output(retrieved_attention(query, stores, top_k, cross.heads()))

    def _hold(self, states: Tensor, mask: Tensor) -> None:
        """Keep the stores of one generation from step to step: an index is built once."""
        if self._held is None or self._held[0]() is not states or not torch.equal(self._held[1], mask):
            self._held = None
            self._held = weakref.ref(states), mask, self._built(states, mask)

    def _stores(self, states: Tensor, mask: Tensor) -> list[Store]:
        # Where gradients flow, activation checkpointing may run a layer again on states of its own.
        if self._held is not None and self._held[0]() is states and not torch.is_grad_enabled():
            return self._held[2]
        return self._built(states, mask)

    def _built(self, states: Tensor, mask: Tensor) -> list[Store]:
        stores = []
        for row, span in enumerate(real_spans(mask, states.shape[1])):
            real = mask[row, span]
            stores.append(self._store(states[row, span] if real.all() else states[row, span][real]))
        return stores

    def _store(self, states: Tensor) -> Store:
        index = self._settings.index
        if index is None:
            return Datastore(states)
        return FaissDatastore(states, index.removeprefix("faiss:")) if isinstance(index, str) else index(states)

    # -- generate() ----------------------------------------------------------------------------------------------------

    def _expand_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Repeat everything for the beams but a long input's states, which they share."""
        expand = partial(type(self._model)._expand_inputs_for_generation, self._model)
        outputs = kwargs.get("encoder_outputs")
        if outputs is None or outputs[0].shape[1] <= self.window:
            return expand(*args, **kwargs)
        ids, expanded = expand(*args, **{**kwargs, "encoder_outputs": BaseModelOutput()})
        return ids, {**expanded, "encoder_outputs": outputs}


def _random_states(store: Any, k: int) -> Datastore:
    """Return a store of k random states of a store."""
    chosen = torch.randperm(len(store), device=store.device)[:k]
    return Datastore(store.states[chosen])


def _encoder_decoder(model: Any) -> Any:
    model = without_peft(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers encoder-decoder or a PEFT wrapper of one, got {type(model).__name__}"
        )
    if not model.config.is_encoder_decoder:
        raise ValueError(
            f"Unlimiformer needs an encoder-decoder (BART, T5, ...), {type(model).__name__} has no encoder whose "
            "states could be retrieved; for a decoder-only model see LMInfinite"
        )
    if "input_ids" not in inspect.signature(model.get_encoder().forward).parameters:
        raise ValueError(f"Unlimiformer needs an encoder that reads token ids, that of {type(model).__name__} does not")
    return model


def _window(config: Any, window: int | None) -> int:
    """Return the window asked for, or the most that the encoder can read (or was trained at, if it has no limit)."""
    limits = [getattr(config, name) for name in _HARD_LENGTHS if isinstance(getattr(config, name, None), int)]
    if window is not None:
        if limits and window > limits[0]:
            raise ValueError(
                f"window must be at most {limits[0]}, the positions that this {type(config).__name__} gives its "
                f"encoder, got {window}"
            )
        return window
    lengths = limits + [getattr(config, name) for name in _SOFT_LENGTHS if isinstance(getattr(config, name, None), int)]
    if not lengths:
        raise ValueError(
            f"{type(config).__name__} does not say how long the texts were that its encoder was trained on: pass "
            "window=... (512 for T5)"
        )
    return int(lengths[0])


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _refuse_deepcopy(memo: Any) -> Any:
    raise TypeError("a model patched by Unlimiformer cannot be copied: detach first, copy, and patch the copy")
