"""Reading a text through the cache that a model's `generate` builds, without asking it to generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_longtrunc.arguments import check_int
from hf_longtrunc.models import CACHE, cache_of, decoder_of, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

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
def stream_logits(model: Any, input_ids: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yield the fp32 logits that predict the tokens of `input_ids` [n] after the first, at most `chunk` [.., V] a time.

    Holds one chunk of logits, and the model's cache.

    Raises:
        ValueError: the model keeps no cache.
    """
    ids = input_ids.to(model.device)
    cache, first = start_stream(model, ids[None, :1])
    yield first[0].float()
    for start in range(1, len(ids) - 1, chunk):
        piece = ids[start : min(start + chunk, len(ids) - 1)]
        yield model(input_ids=piece[None], use_cache=True, **{CACHE: cache}).logits[0].float()


@torch.no_grad()
def read_ahead(
    model: Any, input_ids: Tensor, *, chunk: int = 1024, cache: Cache | None = None, progress: bool = False
) -> Cache:
    """Read a text before anything is asked about it, `chunk` tokens a forward.

    Args:
        model: a causal LM that generates.
        input_ids: [texts, n >= 1], no padding.
        chunk: tokens a forward.
        cache: has seen what stands before `input_ids`, from an earlier call; it is changed. None begins a text.
        progress: show a bar.

    Returns:
        The cache, which has seen these n tokens too. Give `generate` a copy of it, or crop it afterwards, and several
        questions about the text cost one reading.

    Raises:
        TypeError, ValueError: `chunk` is no whole number of at least 1; the model keeps no cache.
    """
    chunk = check_int("chunk", chunk, minimum=1)
    decoder = decoder_of(unwrapped(model))
    with tqdm(total=input_ids.shape[1], desc="reading", unit="tok", disable=not progress) as bar:
        begun = 0
        if cache is None:
            cache, _ = start_stream(model, input_ids[:, :chunk])
            begun = min(chunk, input_ids.shape[1])
            bar.update(begun)
        for start in range(begun, input_ids.shape[1], chunk):
            part = input_ids[:, start : start + chunk]
            decoder(input_ids=part, use_cache=True, **{CACHE: cache})
            bar.update(part.shape[1])
    return cache


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all tensors that the layers of a transformers cache hold, each storage once."""
    held = (tensor for layer in cache.layers for tensor in _tensors(list(vars(layer).values())))
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, held)}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, inside tuples, lists and the values of dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
