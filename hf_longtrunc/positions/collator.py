"""CREAM under Trainer: the collator that gives every document of a batch its position ids, and the door they take.

`position_ids` stay what they are, since transformers reads the borders of packed documents from them and would read
every jump as another. The drawn ids travel beside them and reach the model's rotary modules alone.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_longtrunc.models import without_peft
from hf_longtrunc.positions.cream import SCHEMES, check_lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from hf_longtrunc.positions.cream import Sampler

ROPE_IDS = "rope_position_ids"


class CreamCollator(TrainerCallback):
    """Let a model meet the distances of a long window in documents of a short one, with any collator.

    The batch is that of `inner` with `rope_position_ids` [rows, n] added: for every document its own draw of increasing
    ids out of [0, factor * window). `attach(model)` makes the model rotate by them *while it is in training mode*; an
    evaluation, and anything else, sees the plain model and the plain batch. Nothing of it is saved with the model.

    A document is what lies between two jumps of the batch's `position_ids` if it has any (packed rows), within it the
    tokens whose `attention_mask` is not 0. Its draw depends on `seed`, the epoch and its tokens, and on nothing else:
    not on rank, worker, batch or resuming. torch's and numpy's global generators are left alone. Cost: some 0.1 ms a
    document.

    Args:
        inner: makes the batch, `input_ids` at least, as torch tensors; e.g. `BestFitPackingCollator` or
            `DataCollatorForLanguageModeling`.
        window: N, the length that the model was trained on; no document may be longer.
        factor: f; the model is to read factor * window tokens. `extend_context(model, factor)` prepares it.
        scheme: "cream", "pose", "random" or "contiguous", or a sampler such as `CreamPositions.official()`: any
            function `(length, window, factor, generator)` that returns the ids.
        seed: of all draws.

    It is a `TrainerCallback` too: with `Trainer(..., data_collator=collator, callbacks=[collator])` every epoch draws
    anew (else call `set_epoch`), and training a model that is not attached stops at once.

    Raises:
        TypeError, ValueError: a bad argument; a batch without `input_ids`, or with a document longer than the window;
            collating before `attach`, when the ids would go nowhere.
    """

    def __init__(
        self,
        inner: Callable[[Sequence[Any]], Any],
        window: int,
        factor: int,
        scheme: str | Sampler = "cream",
        seed: int = 0,
    ) -> None:
        for name, value, least in (("window", window, 1), ("factor", factor, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not callable(inner):
            raise TypeError(f"inner must be a collator (a function of a list of examples), got {type(inner).__name__}")
        if not callable(scheme) and scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, or a sampler, got {scheme!r}")
        self.inner, self.window, self.factor, self.scheme, self.seed = inner, window, factor, scheme, seed
        # Shared with DataLoader workers, those that live on from epoch to epoch too.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._is_attached = False
        self._undo = ExitStack()

    # -- batches -------------------------------------------------------------------------------------------------------

    def __call__(self, examples: Sequence[Any]) -> Any:
        """Return the inner collator's batch with `rope_position_ids` added."""
        if not self._is_attached:
            raise ValueError(
                "CreamCollator is attached to no model, which would ignore its ids without a word: call "
                "attach(model) before training, or collate with the inner collator (`collator.inner`)"
            )
        batch = self.inner(examples)
        batch[ROPE_IDS] = self.rope_ids(batch)
        return batch

    def rope_ids(self, batch: Any) -> Tensor:
        """Return the ids [rows, n] of every document in a batch; padding has id 0."""
        tokens = batch.get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            raise ValueError("the inner collator's batch must have input_ids [rows, n] as a torch tensor")
        documents = documents_of(tokens, batch.get("position_ids"), batch.get("attention_mask")).numpy()
        values, ids = tokens.numpy(), np.zeros(tokens.shape, np.int64)
        for row, number in enumerate(documents):
            for document in range(1, int(number.max(initial=0)) + 1):
                places = np.flatnonzero(number == document)
                ids[row, places] = self._draw(values[row, places])
        return torch.from_numpy(ids)

    def _draw(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        digest = hashlib.blake2b(np.ascontiguousarray(tokens, "<i8").tobytes(), digest_size=16).digest()
        generator = np.random.default_rng([self.seed, int(self._epoch), *np.frombuffer(digest, "<u4").tolist()])
        sampler = SCHEMES[self.scheme] if isinstance(self.scheme, str) else self.scheme
        check_lengths(len(tokens), self.window, self.factor)
        return sampler(len(tokens), self.window, self.factor, generator)

    def set_epoch(self, epoch: int) -> None:
        """Draw other ids for the same documents; in all DataLoader workers too."""
        self._epoch.fill_(epoch)

    # -- the model -----------------------------------------------------------------------------------------------------

    def attach(self, model: Any) -> CreamCollator:
        """Let `model`, a causal language model or a PEFT wrapper of one, rotate by the ids while in training mode.

        Returns the collator. Wrapping the model afterwards (PEFT, DDP) is fine. `verify_positions(model)` finds out
        whether CREAM means something to it.

        Raises:
            TypeError: it is no such model.
            ValueError: it has no rotary modules (ALiBi, learned positions), or a CreamCollator is attached already.
        """
        if self._is_attached:
            raise ValueError("this CreamCollator is attached to a model already: detach() it first")
        decoder, rotaries = find_rotaries(model)
        if is_attached(decoder):
            raise ValueError("a CreamCollator is attached to this model already: detach() that one first")
        self._undo.callback(decoder.register_forward_pre_hook(_hand_on, with_kwargs=True).remove)
        for rotary in rotaries:
            self._undo.callback(rotary.__dict__.pop, "_rope_ids", None)
            self._undo.callback(rotary.register_forward_pre_hook(_rotate_by_own_ids, with_kwargs=True).remove)
        self._is_attached = True
        return self

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        self._undo.close()
        self._is_attached = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model behind when a DataLoader sends the collator to a spawned worker."""
        return {name: value for name, value in self.__dict__.items() if name != "_undo"}

    # -- Trainer's events ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop a training whose model is not the attached one."""
        if not is_attached(find_rotaries(kwargs["model"])[0]):
            raise ValueError("Trainer's model is not attached to this CreamCollator: call attach(model) before train()")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw anew for this epoch."""
        self.set_epoch(int(state.epoch))


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


def find_rotaries(model: Any) -> tuple[Any, list[nn.Module]]:
    """Return a causal language model's decoder and the rotary modules in it.

    Raises:
        TypeError: it is no transformers model, nor a PEFT wrapper of one.
        ValueError: it has no rotary modules.
    """
    owner = without_peft(model)
    if not isinstance(owner, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers causal language model or a PEFT wrapper of one, got {type(model).__name__}"
        )
    decoder: Any = owner.get_decoder()  # type: ignore[no-untyped-call]
    decoder = decoder if isinstance(decoder, PreTrainedModel) else owner.base_model
    rotaries = [
        module
        for module in decoder.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]
    if not rotaries:
        raise ValueError(
            f"{type(owner).__name__} has no rotary modules: its positions (ALiBi, learned or none) cannot be spread "
            "over a longer window, and training it with CREAM would do nothing"
        )
    return decoder, rotaries


def is_attached(decoder: nn.Module) -> bool:
    """Tell whether a CreamCollator's hooks are on this decoder."""
    return _hand_on in decoder._forward_pre_hooks.values()


def _hand_on(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take the ids out of a decoder's arguments and leave them with its rotary modules.

    They stay there until the next forward: gradient checkpointing may run a layer again. The modules are looked up at
    every forward, since each replica of nn.DataParallel has its own.
    """
    ids = kwargs.pop(ROPE_IDS, None)
    for module in decoder.modules():
        if _rotate_by_own_ids in module._forward_pre_hooks.values():
            module.__dict__["_rope_ids"] = ids if decoder.training else None
    return args, kwargs


def _rotate_by_own_ids(rotary: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Put the ids that were left with a rotary module in the place of the `position_ids` it is called with."""
    ids = rotary.__dict__.get("_rope_ids")
    if ids is None:
        return args, kwargs
    given = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    if given.ndim != 2 or given.shape[-1] != ids.shape[-1]:
        raise ValueError(
            f"the model rotates positions of shape {list(given.shape)}, the batch has rope_position_ids of "
            f"{list(ids.shape)}: something between them adds tokens (prompt tuning) or axes of position (multimodal "
            "models), which CREAM cannot serve"
        )
    ids = ids.to(given.device)
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": ids}
    return (args[0], ids, *args[2:]), kwargs
