"""A second model's next-token log-probabilities, with a KV cache in each thread that is addressed by content."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hf_longtrunc.mixing.prefixes import address, common_prefix
from hf_longtrunc.models import CACHE, parameters_of, unwrapped, weights_version

# Columns of a prompt in one forward: bounds the activations, not the cache.
_CHUNK = 2048


class _Memory(threading.local):
    """The KV cache of the last rows of a thread, and the version of the weights that made it."""

    columns: Tensor | None = None  # [rows, columns], one number a column: `address`
    cache: DynamicCache | None = None
    weights: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[type[_Memory], tuple[()]]:
        """Copy and pickle as empty: a cache belongs to its thread."""
        return _Memory, ()


class CachedModel:
    """A causal language model with a KV cache in each thread."""

    def __init__(self, model: Any):
        config = getattr(unwrapped(model), "config", None)
        if config is None or not callable(model):
            raise TypeError(f"an auxiliary model must be a transformers model, got {type(model).__name__}")
        if config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, which reads no running text: the auxiliary model must "
                "be a decoder-only language model"
            )
        self.model, self.inside = model, unwrapped(model)
        self.tokens_fed = 0
        self._takes = frozenset(parameters_of(self.inside))
        self._cacheable = _has_attention_layers_only(config)
        self._memory = _Memory()

    @property
    def embeddings(self) -> int:
        """Number of token ids that the model can read."""
        return len(self.inside.get_input_embeddings().weight)

    def reset(self) -> None:
        """Forget the caches of all threads."""
        self._memory = _Memory()

    @torch.no_grad()
    def next_log_probs(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return log-probabilities [rows, V], fp32, of the token after `input_ids` [rows, columns]."""
        memory, weights = self._memory, self._weights()
        ids, mask = input_ids.to(self.inside.device), mask.to(self.inside.device)
        columns = address(ids, mask)
        cache, start = self._matching_cache(memory, columns, weights)
        memory.columns = memory.cache = None  # in case the model raises
        logits = self._read(ids, mask, cache, start)
        if cache is not None:
            memory.columns, memory.cache, memory.weights = columns, cache, weights
        return logits.float().log_softmax(-1)

    def _weights(self) -> tuple[object, ...]:
        """Return the version of the weights; raise ValueError if a module is in training mode."""
        if any(module.training for module in self.model.modules()):
            raise ValueError(
                "an auxiliary model is in training mode, or a module of it, where dropout changes it: call .eval() "
                "on it"
            )
        return weights_version(self.model)

    def leading_padding_mask(self, input_ids: Tensor) -> Tensor:
        """Read a leading run of the padding id (EOS where there is none) as padding: [rows, columns] of 0 and 1."""
        pad, bos = _special_id(self.inside, "pad_token_id"), _special_id(self.inside, "bos_token_id")
        pad = _special_id(self.inside, "eos_token_id") if pad is None else pad
        if pad is None:
            return torch.ones_like(input_ids)
        mask = input_ids.ne(pad).cumsum(-1).clamp_max(1)
        if pad == bos and not mask.all():
            raise ValueError(
                f"a row begins with token {pad}, which is padding and BOS to the auxiliary model: pass attention_mask, "
                "the one that generate() gets"
            )
        return mask

    def _matching_cache(
        self, memory: _Memory, columns: Tensor, weights: tuple[object, ...]
    ) -> tuple[DynamicCache | None, int]:
        """Return a cache of the first columns of every row, and their number, at most all but one."""
        if not self._cacheable:
            return None, 0
        if memory.cache is None or memory.columns is None or memory.weights != weights:
            return DynamicCache(), 0
        length, rows = common_prefix(memory.columns, columns)
        length = min(length, columns.shape[1] - 1)
        if length == 0:
            return DynamicCache(), 0
        if rows is not None:
            memory.cache.reorder_cache(rows)  # type: ignore[arg-type]
        memory.cache.crop(length - memory.columns.shape[1])
        return memory.cache, length

    def _read(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, start: int) -> Tensor:
        """Feed the columns from `start` on; return the last one's logits [rows, V]."""
        if start == 0 and not mask.any(-1).all():
            raise ValueError("a row is nothing but padding: the auxiliary model needs a token to read in every row")
        positions = positions_of(mask)
        chunk = ids.shape[1] if cache is None else _CHUNK
        for begin in range(start, ids.shape[1], chunk):
            end = min(begin + chunk, ids.shape[1])
            options = {"position_ids": positions[:, begin:end], "logits_to_keep": 1}
            output = self.model(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                use_cache=cache is not None,
                **{CACHE: cache},
                **{name: value for name, value in options.items() if name in self._takes},
            )
            self.tokens_fed += len(ids) * (end - begin)
        logits: Tensor = output.logits[:, -1]
        return logits


def positions_of(mask: Tensor) -> Tensor:
    """Return the place of each real token among the row's real ones [rows, columns]."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _has_attention_layers_only(config: Any) -> bool:
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    # Exact types: subclasses keep more than keys and values.
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _special_id(model: Any, name: str) -> int | None:
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True)):
        value = getattr(source, name, None)
        if value is not None:
            return int(value[0] if isinstance(value, (list, tuple)) else value)
    return None
