"""Unlimiformer for transformers models: `with Unlimiformer()(model): model.generate(...)`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import torch

from hf_longtrunc.arguments import check_choice, check_float, check_int
from hf_longtrunc.cross_attention.absorbed import cross_attention_modules
from hf_longtrunc.cross_attention.datastore import Datastore, FaissDatastore
from hf_longtrunc.cross_attention.long_encoder import long_encoder
from hf_longtrunc.cross_attention.reader import LongInputReader
from hf_longtrunc.cross_attention.texts import KnownTexts
from hf_longtrunc.handles import Handle, PatchSettings
from hf_longtrunc.models import attachable, disagreement, evaluating, few_tokens, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from hf_longtrunc.cross_attention.absorbed import CrossAttention
    from hf_longtrunc.cross_attention.datastore import Store

Training = Literal["retrieval", "random", "alternating"]

# Lengths that an encoder cannot exceed, and one that it was trained at but can.
_HARD_LENGTHS = ("max_encoder_position_embeddings", "max_position_embeddings")
_SOFT_LENGTHS = ("n_positions",)
# Whether a forward in training mode reads random states, over and over.
_DRAWS = {"retrieval": (False,), "random": (True,), "alternating": (True, False)}


@dataclass(frozen=True, kw_only=True)
class Unlimiformer(PatchSettings):
    """Inputs of any length for a pretrained encoder-decoder: every cross-attention head reads its own best states.

    The text is encoded in overlapping windows by the unmodified encoder, and each head of each decoder layer attends
    to the `top_k` encoder states that score highest for its query, anywhere in the text. No weights change. An input of
    up to `window` tokens is computed by the unmodified model itself. Memory: one copy of the encoder states, shared by
    all layers, heads and beams; time: one pass over them per layer and step.

    Examples:
        >>> with Unlimiformer(top_k=8, window=32)(seq2seq):
        ...     answer = seq2seq.generate(ids, max_new_tokens=4, do_sample=False)  # of 100 tokens

    Args:
        top_k: states that a head attends to; None takes `window`, as the paper does. A text of up to `window` tokens
            in a longer batch is attended to whole.
        window: tokens the encoder reads at a time; None takes its maximum, from the config.
        overlap: share of a window that its neighbours encode too, in [0, 1).
        index: None searches exactly; "faiss:" and an index of `FaissDatastore`, "faiss:HNSW32", through FAISS; a
            function from states [n, width] to a store (`ShardedDatastore`) through that store.
        encode_batch: windows the encoder is given at once.
        training: which states a layer attends to while the model is in training mode: "retrieval" its top k, "random"
            `top_k` random ones, "alternating" one and the other in turn, random first.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    `with Unlimiformer(...)(model):` changes the model for the block; `handle = Unlimiformer(...).attach(model)` until
    `handle.detach()`. Only that model instance is touched, and afterwards it is as it was.

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
                object.__setattr__(self, name, check_int(name, value, minimum=1))
        object.__setattr__(self, "overlap", check_float("overlap", self.overlap, minimum=0, lt=1))
        if isinstance(self.index, str) and not self.index.startswith("faiss:"):
            raise ValueError(f"index must begin with 'faiss:', as in 'faiss:HNSW32', got {self.index!r}")
        if not (self.index is None or isinstance(self.index, str) or callable(self.index)):
            raise TypeError(
                f"index must be None, 'faiss:...' or a function from states to a store, got {type(self.index).__name__}"
            )
        check_choice("training", self.training, tuple(_DRAWS))

    def attach(self, model: Any) -> UnlimiformerHandle:
        """Change `model`, a transformers encoder-decoder over text, until the handle's `detach()`.

        A PEFT or DDP wrapper of one is unwrapped. A few tokens are run twice, to find the cross-attention and to
        compare its results.

        Raises:
            TypeError: it is no such model.
            ValueError: Unlimiformer is attached already, the model was compiled, `window` exceeds what its encoder can
                read, or its architecture does not fit (the message says why).
            ModuleNotFoundError: `index` names FAISS, which is not installed.
        """
        inside = _encoder_decoder(model)
        window = _window(inside, self.window)
        return UnlimiformerHandle(inside, self, window, window if self.top_k is None else self.top_k)

    __call__ = attach


class UnlimiformerHandle(Handle):
    """Unlimiformer on one model. `detach()` gives the model back as it was.

    Three kinds of things are changed: the encoder's `forward` cuts long inputs into windows, a hook before the decoder
    prepares the mask of long inputs, and the `forward` of cross-attention modules reads states and mask.

    Attributes:
        window: tokens that the encoder reads at a time.
        top_k: states that a head attends to in a text of more than `window` tokens.
    """

    def __init__(self, model: Any, settings: Unlimiformer, window: int, top_k: int):
        decoder = model.get_decoder()
        if "_unlimiformer" in decoder.__dict__:
            raise ValueError(
                f"Unlimiformer is attached to this {type(model).__name__} already: detach that handle first, two of "
                "them do not nest"
            )
        before: list[Tensor] = []
        found = cross_attention_modules(decoder, lambda: before.append(_few_logits(model, window)))
        if not found:
            raise ValueError(
                f"Unlimiformer cannot change {type(model).__name__}: in its decoder there is no module that attends to "
                "encoder states alone, a row at a time, and names its query, key, value and output projections"
            )
        layers = f"{len(found)} cross-attention modules read their {top_k} best states"
        super().__init__(
            f"Unlimiformer(top_k={top_k}, window={window})",
            model,
            f"the encoder reads {window} tokens at a time, {layers}",
        )
        self.window = window
        self.top_k = top_k
        build = partial(_store, settings.index)
        if isinstance(settings.index, str):
            build(torch.ones(1, found[0].heads().key_weight.shape[-1]))  # fails now, not after an hour of encoding
        exact = self._reader(KnownTexts(Datastore), settings, longest_untouched=0)
        reader = self._reader(KnownTexts(build), settings, longest_untouched=window)
        with self.or_nothing():
            with Handle(settings, model, "a check") as check:
                _change(check, model, found, exact)
                _check_same(model, before[0], window)
            encode = long_encoder(model.get_encoder(), window, settings.overlap, settings.encode_batch)
            self.set(model.get_encoder(), "forward", encode)
            self.set(decoder, "_unlimiformer", self)
            self.set(model, "_expand_inputs_for_generation", partial(reader.expand_inputs, model))
            self.undo(reader.texts.clear)
            _change(self, model, found, reader)
            changed = {decoder, model.get_encoder(), *(cross.module for cross in found)}
            self.refuse_copies(*_holders(model, changed), advice="detach first, copy or save it, and attach again")

    def _reader(self, texts: KnownTexts, settings: Unlimiformer, longest_untouched: int) -> LongInputReader:
        return LongInputReader(
            window=self.window,
            top_k=self.top_k,
            longest_untouched=longest_untouched,
            texts=texts,
            draws=cycle(_DRAWS[settings.training]),
        )


def _change(handle: Handle, model: Any, found: list[CrossAttention], reader: LongInputReader) -> None:
    """Let the decoder read long inputs."""
    handle.undo(model.get_decoder().register_forward_pre_hook(reader.before_decoder, with_kwargs=True).remove)
    for cross in found:
        handle.set(cross.module, "forward", partial(reader.attend, cross))


def _few_logits(model: Any, window: int) -> Tensor:
    """Return the model's logits of a few tokens, without cache, dropout or gradient."""
    ids = few_tokens(model, window)
    with evaluating(model), torch.no_grad():
        made: Tensor = model(input_ids=ids, decoder_input_ids=ids, use_cache=False)[0]
    return made


def _check_same(model: Any, before: Tensor, window: int) -> None:
    """Refuse a model if its cross-attention, retrieving everything, gives other results than its own."""
    reason = f"Unlimiformer cannot change {type(model).__name__}: its cross-attention computes something that is not "
    try:
        difference = disagreement(before, _few_logits(model, window))
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{reason}reproduced here ({type(error).__name__}: {error})") from error
    if difference is not None:
        raise ValueError(f"{reason}reproduced here (results differ by {difference:.1e})")


def _holders(model: nn.Module, changed: set[nn.Module]) -> list[nn.Module]:
    """Return the modules that are changed or hold one that is."""
    return [module for module in model.modules() if not changed.isdisjoint(module.modules())]


def _store(index: str | Callable[[Tensor], Store] | None, states: Tensor) -> Store:
    if index is None:
        return Datastore(states)
    return FaissDatastore(states, index.removeprefix("faiss:")) if isinstance(index, str) else index(states)


def _encoder_decoder(model: Any) -> Any:
    model = attachable(model, "Unlimiformer")
    if not model.config.is_encoder_decoder:
        raise ValueError(
            f"Unlimiformer needs an encoder-decoder (BART, T5, ...), {type(model).__name__} has no encoder whose "
            "states could be retrieved; for a decoder-only model see LMInfinite"
        )
    if "input_ids" not in parameters_of(model.get_encoder()):
        raise ValueError(f"Unlimiformer needs an encoder that reads token ids, that of {type(model).__name__} does not")
    return model


def _window(model: Any, window: int | None) -> int:
    """Return the window asked for, or the most that the encoder can read (or was trained at, if it has no limit)."""
    config = getattr(model.get_encoder(), "config", model.config)
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
