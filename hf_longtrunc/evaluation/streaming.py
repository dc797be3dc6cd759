"""Reading a text through the cache that a model's `generate` builds, without asking it to generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_longtrunc.arguments import whole
from hf_longtrunc.models import CACHE, cache_of, decoder_of, unwrapped

if TYPE_CHECKING:
    from transformers import Cache


@torch.no_grad()
def start_stream(model: Any, input_ids: Tensor) -> tuple[Cache, Tensor]:
    """Read the first tokens of a stream; go on with `model(input_ids=..., cache=cache, use_cache=True)`.

    Before transformers 5.24 that argument is called `past_key_values`; `hf_longtrunc.models.CACHE` holds its name.

    Args:
        model: a causal LM that generates. Patched by LMInfinite, it builds a cache of constant size.
        input_ids: [texts, n >= 1], no padding.

    Returns:
        The cache, which has seen n tokens, and the logits [texts, 1, V] that predict the next one.

    Raises:
        ValueError: the model keeps no cache.
    """
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=1,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    cache = cache_of(output)
    if cache is None or cache.get_seq_length() != input_ids.shape[1]:
        raise ValueError(f"{type(model).__name__} keeps no cache, so it cannot be read in chunks")
    return cache, output.logits[0][:, None]


@torch.no_grad()
def read_ahead(model: Any, input_ids: Tensor, *, chunk: int = 1024, progress: bool = False) -> Cache:
    """Read a text before anything is asked about it, `chunk` tokens a forward.

    Args:
        model: a causal LM that generates.
        input_ids: [texts, n >= 1], no padding.
        chunk: tokens a forward.
        progress: show a bar.

    Returns:
        The cache, which has seen n tokens. Give `generate` a copy of it, or crop it afterwards, and several questions
        about the text cost one reading.

    Raises:
        TypeError, ValueError: `chunk` is no whole number of at least 1; the model keeps no cache.
    """
    chunk = whole("chunk", chunk, least=1)
    decoder = decoder_of(unwrapped(model))
    with tqdm(total=input_ids.shape[1], desc="reading", unit="tok", disable=not progress) as bar:
        cache, _ = start_stream(model, input_ids[:, :chunk])
        bar.update(min(chunk, input_ids.shape[1]))
        for start in range(chunk, input_ids.shape[1], chunk):
            part = input_ids[:, start : start + chunk]
            decoder(input_ids=part, use_cache=True, **{CACHE: cache})
            bar.update(part.shape[1])
    return cache


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all tensors that the layers of a transformers cache hold, each storage once."""
    kept = [value for layer in cache.layers for value in vars(layer).values()]
    kept += [part for value in kept if isinstance(value, tuple) for part in value]
    held = (value.untyped_storage() for value in kept if isinstance(value, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())
