"""A decoder's cross-attention to inputs longer than the encoder's window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from hf_longtrunc.cross_attention.datastore import Datastore
from hf_longtrunc.cross_attention.retrieved_attention import retrieved_attention
from hf_longtrunc.cross_attention.texts import texts_in
from hf_longtrunc.models import bound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from hf_longtrunc.cross_attention.absorbed import CrossAttention
    from hf_longtrunc.cross_attention.datastore import Store
    from hf_longtrunc.cross_attention.texts import KnownTexts

# A mask of this dtype asks for random states, one of bools for the best.
_RANDOM = torch.uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class LongInputReader:
    """The parts of a model's forward and of `generate` that differ for long inputs.

    The texts of one forward, and whether it reads random states, go from `before_decoder` to the layers as the mask
    [rows, 1, 1, n] and its dtype, which transformers passes on unchanged. So forwards of several threads are
    independent, and a layer that activation checkpointing runs again later computes the same.
    """

    window: int  # tokens that the encoder reads at a time; a text of no more is attended to whole
    top_k: int  # states that a head attends to in a longer text
    longest_untouched: int  # inputs of up to so many tokens go to the modules' own forward
    texts: KnownTexts
    draws: Iterator[bool]  # for each forward in training mode, whether it reads random states

    def before_decoder(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Return the decoder's arguments, with the mask of a long input as the layers are to read it."""
        inputs = bound(decoder, args, kwargs)
        states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        if states is None or states.shape[1] <= self.longest_untouched:
            return (), inputs
        rows, length = states.shape[:2]
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.bool, device=states.device)
        # generate() repeats the mask for every beam, and here not the states.
        mask = mask.bool()[:: max(1, len(mask) // rows), None, None]
        if decoder.training and next(self.draws):
            mask = mask.to(_RANDOM)
        elif not torch.is_grad_enabled():
            mask = self.texts.of(states, mask).mask
        return (), {**inputs, "encoder_attention_mask": mask}

    def attend(self, cross: CrossAttention, *args: Any, **kwargs: Any) -> Any:
        """Run a cross-attention module: its own forward for short inputs, retrieval for long ones."""
        hidden, states, mask = cross.inputs(args, kwargs)
        if states.shape[1] <= self.longest_untouched:
            return cross.forward(*args, **kwargs)
        assert mask is not None
        stores = self._stores(states, mask)
        query = cross.query(hidden).to(states.dtype)
        return cross.output(
            retrieved_attention(query, stores, [self._states_read(store) for store in stores], cross.heads())
        )

    def expand_inputs(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Do what `generate` does for beams, repeating everything but a long input's states, which beams share."""
        expand = partial(type(model)._expand_inputs_for_generation, model)
        outputs = kwargs.get("encoder_outputs")
        if outputs is None or outputs[0].shape[1] <= self.window:
            return expand(*args, **kwargs)
        ids, expanded = expand(*args, **{**kwargs, "encoder_outputs": BaseModelOutput()})
        return ids, {**expanded, "encoder_outputs": outputs}

    def _stores(self, states: Tensor, mask: Tensor) -> list[Store]:
        if mask.dtype == _RANDOM:
            return [self._random(text) for text in texts_in(states, mask.bool())]
        if torch.is_grad_enabled():  # stores with gradients are of this forward alone
            return self.texts.built(states, mask)
        return self.texts.of(states, mask).stores

    def _random(self, text: Tensor) -> Store:
        chosen = torch.randperm(len(text), device=text.device)[: self._states_read(text)]
        return Datastore(text[chosen])

    def _states_read(self, text: Any) -> int:
        return len(text) if len(text) <= self.window else self.top_k
