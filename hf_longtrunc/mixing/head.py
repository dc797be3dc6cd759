"""A causal language model's map from its last hidden state to its logits, and the states that go into it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.models import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class LanguageModelHead:
    """A language model's map from the input of its output embedding to its logits, in fp32: `head(states)`.

    The map is the output embedding itself, with bias, adapters and quantisation as it has them, and then one of:
    nothing, a constant factor (Cohere, Granite), or the cap c * tanh(z / c) of `config.final_logit_softcapping`
    (Gemma). One forward of a few tokens finds which of them it is, and checks it.

    Args:
        model: a decoder-only transformers language model, or a wrapper of one (PEFT, DDP).

    Attributes:
        hidden_size: width of the states.
        vocab_size: width of the logits, which may exceed the tokenizer.

    Raises:
        ValueError: an encoder-decoder, no output embedding, or logits that are none of the above.
    """

    def __init__(self, model: Any) -> None:
        inside = unwrapped(model)
        if inside.config.is_encoder_decoder:
            raise ValueError(
                f"{type(inside).__name__} is an encoder-decoder: its logits depend on a source that input_ids do not "
                "hold; take a decoder-only model"
            )
        self.module = inside.get_output_embeddings()
        if self.module is None:
            raise ValueError(f"{type(inside).__name__} has no output embedding: take a causal language model")
        self._model_name = type(inside).__name__
        self._cap: float | None = getattr(inside.config.get_text_config(), "final_logit_softcapping", None)
        self._factor = 1.0
        states, logits = _probe(inside, self.module)
        self._dtype = states.dtype
        self.hidden_size, self.vocab_size = states.shape[-1], logits.shape[-1]
        self._fit(states, logits)

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits [..., vocabulary], fp32, of states [..., width] of any dtype, on the head's device."""
        return self._finish(self._embed(states))

    def _embed(self, states: Tensor) -> Tensor:
        # Calls `forward` directly, so hooks on the module do not fire.
        logits: Tensor = self.module.forward(states.to(self.device, self._dtype))
        return logits.float()

    @property
    def device(self) -> torch.device:
        """Where the output embedding is now."""
        device: torch.device = next(self.module.parameters()).device
        return device

    def _finish(self, logits: Tensor) -> Tensor:
        if self._cap is not None:
            return self._cap * torch.tanh(logits / self._cap)
        return self._factor * logits

    @torch.no_grad()
    def _fit(self, states: Tensor, logits: Tensor) -> None:
        raw = self._embed(states)
        if self._cap is None:
            factor = float((raw * logits).sum() / raw.square().sum())
            self._factor = 1.0 if torch.equal(raw, logits) else factor
        tolerance = 8 * torch.finfo(states.dtype).eps * float(logits.abs().max())
        if raw.shape != logits.shape or not float((self._finish(raw) - logits).abs().max()) <= tolerance:
            raise ValueError(
                f"{self._model_name} does something to its logits after the output embedding that is neither a "
                "constant factor nor the cap of config.final_logit_softcapping: states cannot be put through its head "
                "from outside"
            )


@contextmanager
def head_inputs(module: Any, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with the input of the output embedding at every use of it in the block.

    What `see` returns, if anything, goes into the embedding instead.
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
    """Run three tokens; return the states [1, 3, width] before the output embedding and the logits, in fp32, after."""
    seen: list[Tensor] = []
    ids = torch.arange(3, device=model.get_input_embeddings().weight.device)[None]
    with head_inputs(module, seen.append):
        logits = model(input_ids=ids, use_cache=False).logits
    return seen[-1], logits.float()
