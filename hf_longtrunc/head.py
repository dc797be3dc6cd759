"""A causal language model's map from its last hidden state to its logits, found by probing, and the states it takes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from hf_longtrunc.models import evaluating, few_tokens, unwrapped, weight_and_bias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

# One probed state is scaled until its largest logit is this: tanh is 1 there, so a cap shows its value.
_SATURATING = 1e4
# By how much of the logits' norm eight bits for the input may move them.
_INPUT_ROUNDING = 0.05


class LanguageModelHead:
    """A language model's map from the input of its output embedding to its logits, in fp32: `head(states)`.

    The map is the output embedding itself, with bias, adapters and quantisation as it has them, and then one of:
    nothing, a constant factor (Cohere, Granite), or a cap c * tanh(factor * z / c) (Gemma, RecurrentGemma, xLSTM).
    One forward of a few tokens finds which of them it is: no attribute of the config is read. The forward replaces two
    of the states, one by zero and one by a multiple so large that a cap is reached.

    Args:
        model: a transformers language model, or a wrapper of one (PEFT, DDP). It is probed in eval mode.

    Attributes:
        module: the output embedding.
        cap: the cap c, None without one.
        hidden_size: width of the states.
        vocab_size: width of the logits, which may exceed the tokenizer.

    Raises:
        TypeError: it is no model.
        ValueError: no output embedding, one that the forward does not call or that has active dropout, or logits that
            are none of the above.
    """

    def __init__(self, model: Any) -> None:
        inside = unwrapped(model)
        if not hasattr(inside, "get_output_embeddings"):
            raise TypeError(
                "model must be a transformers language model or a wrapper of one, got "
                f"{type(model).__name__}; load one with load_pretrained(name)"
            )
        self._model_name = type(inside).__name__
        self.module = inside.get_output_embeddings()
        if self.module is None:
            raise ValueError(
                f"{self._model_name} has no output embedding, and so no linear map from hidden states to logits: take "
                "a language model with a head"
            )
        if any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in self.module.modules()):
            raise ValueError(
                "the output embedding has dropout and is in training mode, so it is no fixed linear map: call .eval() "
                "first"
            )
        self.cap: float | None = None
        self._factor: float = 1.0
        self._shift: Tensor | float = 0.0
        self._states, logits = _probe(inside, self.module)
        self._dtype = self._states.dtype
        self.hidden_size, self.vocab_size = self._states.shape[-1], logits.shape[-1]
        self._fit(logits)

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits [..., vocabulary], fp32, of states [..., width] of any dtype, on the head's device."""
        return self._finish(self._embed(states))

    @property
    def device(self) -> torch.device:
        """Where the output embedding is now; the CPU where it has no parameters (quantised by torch)."""
        return next((each.device for each in self.module.parameters()), self._states.device)

    def weight(self) -> Tensor:
        """Return the output embedding [vocabulary, width], dequantised and with its adapters, detached.

        Raises:
            ValueError: the embedding is not affine: its outputs leave the space that this matrix spans.
        """
        weight, bias = weight_and_bias(self.module, self.hidden_size)
        if type(self.module) is not nn.Linear:
            self._check_affine(weight, bias)
        return weight

    def _embed(self, states: Tensor) -> Tensor:
        # Calls `forward` directly, so hooks on the module do not fire.
        logits: Tensor = self.module.forward(states.to(self.device, self._dtype))
        return logits.float()

    def _finish(self, raw: Tensor) -> Tensor:
        if self.cap is not None:
            return self.cap * torch.tanh(self._factor * raw / self.cap)
        return self._factor * raw + self._shift

    @torch.no_grad()
    def _fit(self, logits: Tensor) -> None:
        """Find factor and cap. Rows of `logits` [n, V] are plain states, then the large one, then zero."""
        raw = self._embed(self._states)
        if raw.shape == logits.shape:
            if self._agrees(raw, logits):
                return
            moved, seen = raw[:-1] - raw[-1], logits[:-1] - logits[-1]
            self._factor = _slope(moved, seen)
            self._shift = logits[-1] - self._factor * raw[-1]
            if self._agrees(raw, logits):
                return
            self.cap, self._shift = float(logits[-2].abs().max()), 0.0
            inner = self.cap * torch.atanh(logits / self.cap)
            bent = logits.abs() < 0.9 * self.cap
            for factor in (1.0, _slope(raw[bent], inner[bent])):
                self._factor = factor
                if self._agrees(raw, logits):
                    return
        raise ValueError(
            f"{self._model_name} does something to its logits after the output embedding that is neither a constant "
            "factor nor a cap c * tanh(z / c): states cannot be put through its head from outside, and nothing can be "
            "proved about its logits; a quantised head has to be dequantised first"
        )

    def _agrees(self, raw: Tensor, logits: Tensor) -> bool:
        largest = torch.maximum(logits.abs(), (self._factor * raw).abs().clamp_max(self.cap or torch.inf))
        tolerance = 8 * torch.finfo(self._dtype).eps * largest.amax(-1, keepdim=True)
        return bool(((self._finish(raw) - logits).abs() <= tolerance).all())

    @torch.no_grad()
    def _check_affine(self, weight: Tensor, bias: Tensor) -> None:
        """Raise ValueError unless the layer is W h + b, up to a rounding of h.

        Layers that quantise their input give W h' + b: in the column space of W to rounding, and h' near h.
        """
        rows = slice(None, None, max(1, len(weight) // (2 * self.hidden_size + 64)))
        plain = self._states[
            :-2
        ]  # one scale for all rows, as some quantise, would round these to zero next to the large one
        part, moved = weight[rows].double(), (self._embed(plain) - bias.float())[:, rows].T.double()
        left = moved - part @ torch.linalg.lstsq(part, moved, driver="gelsd").solution
        outside = (left.abs() > 32 * torch.finfo(self._dtype).eps * moved.abs().amax(0)).any()
        far = (moved - part @ plain.T.double()).norm(dim=0) > _INPUT_ROUNDING * moved.norm(dim=0)
        if bool(outside) or bool(far.any()):
            raise ValueError(
                f"the output embedding of {self._model_name} ({type(self.module).__name__}) is no affine map of its "
                "input to rounding, and its logits have no column space to make proofs in; a quantised head has to be "
                "dequantised first"
            )


@contextmanager
def head_inputs(module: Any, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with the input of the output embedding at every use of it in the block.

    If `see` returns a tensor, it goes into the embedding instead.
    """

    def hook(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        replaced = see(arguments[0])
        return None if replaced is None else (replaced, *arguments[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _probe(model: Any, module: Any) -> tuple[Tensor, Tensor]:
    """Run eight tokens; return the inputs of the output embedding [8, width] and the logits [8, V], fp32.

    The last state but one is scaled up, the last is zero.
    """
    seen: list[Tensor] = []

    def see(states: Tensor) -> Tensor:
        largest = float(module.forward(states[..., -2:-1, :]).abs().max())
        room = torch.finfo(states.dtype).max / 4 / float(states[..., -2, :].abs().max().clamp_min(1e-6))
        states = states.clone()
        states[..., -2, :] *= min(_SATURATING / max(largest, 1e-6), room)
        states[..., -1, :] = 0
        seen.append(states)
        return states

    ids = few_tokens(model, 8)
    options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with head_inputs(module, see), evaluating(model):
        logits = model(input_ids=ids, use_cache=False, **options).logits
    if not seen:
        raise ValueError(
            f"{type(model).__name__} does not call its output embedding in a forward: states cannot be put through its "
            "head from outside"
        )
    return seen[-1].flatten(0, -2), logits.float().flatten(0, -2)


def _slope(raw: Tensor, seen: Tensor) -> float:
    return float((raw.double() * seen.double()).sum() / raw.double().square().sum().clamp_min(1e-30))
