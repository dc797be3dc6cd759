"""CREAM under Trainer: the collator that gives every document of a batch its position ids."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_longtrunc.arguments import check_int
from hf_longtrunc.models import decoder_of, unwrapped
from hf_longtrunc.positions.cream import SCHEMES, check_lengths
from hf_longtrunc.positions.rope_hooks import ROPE_IDS, attach_hooks, is_attached
from hf_longtrunc.positions.scaling import warn_of_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from hf_longtrunc.handles import Handle
    from hf_longtrunc.positions.cream import Positions, Sampler

_NOBODY_SAID = -1  # an epoch: the draws are those of epoch 0


class CreamCollator(TrainerCallback):
    """Add drawn position ids to a collator's batches: short documents then train the distances of a long window.

    The collator adds `rope_position_ids` [rows, n] to the batch of `inner`: for each document, increasing ids drawn
    from [0, factor * window). `attach(model)` makes the model rotate by them *in training mode*; in evaluation mode
    the model is unchanged. Nothing is saved with the model.

    Documents are separated by jumps in the batch's `position_ids` (packed rows) and by padding (`attention_mask` 0).
    The draw of a document depends only on `seed`, the epoch and its tokens: not on rank, worker, batch or resuming.
    The global generators of torch and NumPy are not used. Cost: some 0.1 ms a document.

    Args:
        inner: makes the batch, `input_ids` at least, as torch tensors; e.g. `BestFitPackingCollator` or
            `DataCollatorForLanguageModeling`.
        window: N, the trained window, before `extend_context`; no document may be longer.
        factor: f; the model learns to read factor * window tokens. Call `extend_context(model, factor)` first.
        scheme: "cream", "pose", "random" or "contiguous", or a sampler such as `CreamPositions.official()`: any
            function `(length, window, factor, generator)` that returns the ids.
        seed: for all draws.

    It is a `TrainerCallback` too: with `Trainer(..., data_collator=collator, callbacks=[collator])` each epoch gets new
    draws (otherwise call `set_epoch`), and training a model without `attach` raises. It warns if a PEFT adapter's base
    model on disk has another window, because an adapter's checkpoint does not save the window. Without an epoch it
    warns when its first document comes a second time.

    Raises:
        TypeError, ValueError: a bad argument; a batch without `input_ids`, with a document longer than the window, or
            with boundaries in another form than `position_ids`; a sampler that returns anything but increasing
            integers in [0, factor * window); collating before `attach`.

    Examples:
        >>> inner = BestFitPackingCollator(seq_length=8, pad_token_id=0)
        >>> collator = CreamCollator(inner, window=8, factor=2, seed=0)
        >>> config = model.config.from_dict({**model.config.to_dict(), "max_position_embeddings": 8})
        >>> extended = LlamaForCausalLM(config)
        >>> extend_context(extended, 2)
        16
        >>> with collator.attach(extended):
        ...     batch = collator([{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}])
        >>> ids = batch["rope_position_ids"][0].tolist()
        >>> ids == sorted(ids), ids[0], ids[-1]
        (True, 0, 15)
    """

    _handle: Handle | None = None

    def __init__(
        self,
        inner: Callable[[Sequence[Any]], Any],
        window: int,
        factor: int,
        *,
        scheme: str | Sampler = "cream",
        seed: int = 0,
    ) -> None:
        self.window, self.factor = check_int("window", window, minimum=1), check_int("factor", factor, minimum=1)
        check_lengths(0, self.window, self.factor)
        if not callable(inner) or hasattr(inner, "forward") or hasattr(inner, "eos_token_id"):
            raise TypeError(f"inner must be a collator (a function of a list of examples), got {type(inner).__name__}")
        if not callable(scheme) and not (isinstance(scheme, str) and scheme in SCHEMES):
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, or a sampler, got {scheme!r}")
        self.inner, self.scheme, self.seed = inner, scheme, check_int("seed", seed, minimum=0)
        self._is_attached = False
        # Shared with DataLoader workers, those that live on from epoch to epoch too.
        self._epoch = _shared(1).fill_(_NOBODY_SAID)
        self._first_document = _shared(2)
        self._passes = 0

    # -- batches -------------------------------------------------------------------------------------------------------

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Return the inner collator's batch with `rope_position_ids` added."""
        if not self._is_attached:
            raise ValueError(
                "CreamCollator is attached to no model, which would ignore its ids without a word: call "
                "attach(model) before training, or collate with the inner collator (`collator.inner`)"
            )
        batch: dict[str, Any] = self.inner(examples)
        batch[ROPE_IDS] = self.rope_ids(batch)
        return batch

    def rope_ids(self, batch: Any) -> Tensor:
        """Return the ids [rows, n] of every document in a batch; padding has id 0."""
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            raise ValueError("the inner collator's batch must have input_ids [rows, n] as a torch tensor")
        positions, mask = batch.get("position_ids"), batch.get("attention_mask")
        _check_boundaries(batch, tokens, positions, mask)
        documents = documents_of(tokens, positions, mask).numpy()
        values, ids = tokens.numpy(), np.zeros(tokens.shape, np.int64)
        for row, number in enumerate(documents):
            for document in range(1, int(number.max(initial=0)) + 1):
                places = np.flatnonzero(number == document)
                ids[row, places] = self._draw(values[row, places])
        return torch.from_numpy(ids)

    def set_epoch(self, epoch: int) -> None:
        """Draw other ids for the same documents; in all DataLoader workers too."""
        self._epoch.fill_(check_int("epoch", epoch, minimum=0))

    def _draw(self, tokens: NDArray[np.int64]) -> Positions:
        digest = hashlib.blake2b(np.ascontiguousarray(tokens, "<i8").tobytes(), digest_size=16).digest()
        epoch = int(self._epoch)
        if epoch == _NOBODY_SAID:
            self._watch(torch.from_numpy(np.frombuffer(digest, "<i8").copy()))
        seed = [self.seed, max(epoch, 0), *np.frombuffer(digest, "<u4").tolist()]
        sampler = SCHEMES[self.scheme] if isinstance(self.scheme, str) else self.scheme
        check_lengths(len(tokens), self.window, self.factor)
        ids = sampler(len(tokens), self.window, self.factor, np.random.default_rng(seed))
        return _checked_ids(ids, len(tokens), self.window * self.factor)

    def _watch(self, document: Tensor) -> None:
        """Warn once if the first document comes a second time and no epoch was set."""
        if not self._first_document.any():
            self._first_document.copy_(document)
        elif torch.equal(self._first_document, document) and self.scheme != "contiguous":
            self._epoch.fill_(0)
            warnings.warn(
                "CreamCollator gets its first document a second time, and no epoch was set: this is a second epoch, "
                "with the same positions, or the data hold the document twice. For new positions in every epoch "
                "pass Trainer(callbacks=[collator]) or call set_epoch(epoch); set_epoch(0) ends this warning",
                stacklevel=5,
            )

    # -- the model -----------------------------------------------------------------------------------------------------

    def attach(self, model: Any) -> Handle:
        """Make a causal language model rotate by the ids in training mode.

        Use it as `with collator.attach(model):`, or keep it until `collator.detach()`. The model may be wrapped by
        PEFT, DDP or FSDP before or afterwards, and compiled afterwards. `verify_positions(model)` raises if
        the model cannot be trained with CREAM.

        Returns:
            A handle; its `detach()` is the collator's.

        Raises:
            TypeError: it is no such model.
            ValueError: it is compiled already, has no rotary modules (ALiBi, learned positions) or a CreamCollator
                attached, or its `max_position_embeddings` is less than window * factor.

        Warns if the model reads more than window * factor tokens: this training does not reach positions beyond.
        """
        if self._is_attached:
            raise ValueError("this CreamCollator is attached to a model already: detach() it first")
        handle = attach_hooks(model)
        with handle.or_nothing():
            self._check_window(decoder_of(unwrapped(model)).config)
        handle.undo(setattr, self, "_is_attached", False)
        self._handle, self._is_attached = handle, True
        return handle

    def detach(self) -> None:
        """Remove the hooks from the model; a second call does nothing."""
        if self._handle is not None:
            self._handle.detach()

    def _check_window(self, config: Any) -> None:
        reads = getattr(config, "max_position_embeddings", None)
        reach = self.window * self.factor
        if not isinstance(reads, int) or reads == reach:
            return
        lie = f"the ids lie in [0, window * factor) = [0, {reach}), and the model's max_position_embeddings is {reads}"
        if reads < reach:
            raise ValueError(
                f"{lie}: call extend_context(model, {self.factor}) before attach, and give as window the "
                "max_position_embeddings from before it"
            )
        warnings.warn(
            f"{lie}: this training reaches no position from {reach} on. To train all of them, window * factor must be "
            f"{reads}: window is max_position_embeddings before extend_context, factor that of extend_context",
            stacklevel=3,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model when a DataLoader sends the collator to a spawned worker."""
        return {name: value for name, value in self.__dict__.items() if name != "_handle"}

    # -- Trainer's events ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise if the trained model is not the attached one; warn if its checkpoints will not save the window."""
        if not is_attached(kwargs["model"]):
            raise ValueError("Trainer's model is not attached to this CreamCollator: call attach(model) before train()")
        warn_of_adapter(kwargs["model"])
        self._passes = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set this epoch; passes over a stream are counted, since Trainer treats them as one epoch."""
        epoch = max(int(state.epoch), self._passes)
        self._passes = epoch + 1
        self.set_epoch(epoch)


def documents_of(tokens: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Return the number of each token's document [rows, n], from 1 on in every row; 0 is padding.

    A jump in `position_ids` begins a document, as transformers reads it, and so does the first token after padding.
    """
    real = torch.ones_like(tokens, dtype=torch.bool)
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask != 0
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    if position_ids is not None:
        begins[:, 1:] |= real[:, 1:] & (position_ids.expand_as(tokens).diff(dim=-1) != 1)
    return begins.cumsum(-1) * real


def _check_boundaries(batch: Any, tokens: Tensor, positions: Any, mask: Any) -> None:
    """Raise ValueError if the batch says where documents lie in a way that is not read: they would be drawn as one."""
    if positions is not None and (positions.ndim != 2 or positions.shape[-1] != tokens.shape[-1]):
        raise ValueError(
            f"the batch's position_ids must be [rows, n] as input_ids {list(tokens.shape)}, got {list(positions.shape)}"
        )
    if mask is not None and mask.ndim == 2 and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"the batch's attention_mask must hold 0 and 1, got {mask.min()} to {mask.max()}; documents are told apart "
            "by position_ids that restart"
        )
    others = [name for name in ("seq_idx", "cu_seq_lens_q") if batch.get(name) is not None]
    others += ["a block mask"] if mask is not None and mask.ndim != 2 else []
    if positions is None and others:
        raise ValueError(
            f"the batch has {' and '.join(others)} and no position_ids: CREAM reads where documents begin from "
            "position_ids that restart, and would take a row for one document"
        )


def _checked_ids(ids: object, length: int, end: int) -> Positions:
    array = np.asarray(ids)
    if array.dtype.kind not in "iu" or array.shape != (length,):
        raise TypeError(
            f"the sampler must return {length} integers for a document of {length} tokens, got {array.dtype} of shape "
            f"{array.shape}"
        )
    is_increasing = bool((array[1:] > array[:-1]).all())
    if length and (array[0] < 0 or array[-1] >= end or not is_increasing):
        raise ValueError(
            f"the sampler must return increasing ids out of [0, factor * window) = [0, {end}), got ids from "
            f"{array.min()} to {array.max()}{'' if is_increasing else ', not increasing'}"
        )
    return array.astype(np.int64, copy=False)


def _shared(size: int) -> Tensor:
    shared: Tensor = torch.zeros(size, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
    return shared
