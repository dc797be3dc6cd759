"""Read a text in chunks through the cache that a model's `generate` builds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache

from hf_longtrunc.arguments import check_int, check_kind, check_tensor
from hf_longtrunc.models import CACHE, cache_of, check_model, decoder_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@torch.no_grad()
def start_stream(model: Any, input_ids: Tensor) -> tuple[Cache, Tensor]:
    """Read the first tokens of a stream; continue with `model(input_ids=..., use_cache=True, cache=cache)`.

    Before transformers 5.24 the argument is called `past_key_values`; `hf_longtrunc.models.CACHE` is its name.

    Args:
        model: a causal LM that generates. Patched by LMInfinite, it builds a cache of constant size.
        input_ids: [texts, n >= 1], no padding.

    Returns:
        The cache, which has seen n tokens, and the logits [texts, 1, V] that predict the next one.

    Raises:
        ValueError: the model keeps no cache.

    Examples:
        >>> cache, logits = start_stream(model, torch.tensor([[5, 6, 7]]))
        >>> cache.get_seq_length(), logits.shape[1]
        (3, 1)
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
    """Yield the fp32 logits [chunk, V] that predict the tokens of `input_ids` [n] after the first."""
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
    """Read a text into a cache, `chunk` tokens a forward, before a question about it is known.

    Args:
        model: a causal LM that generates.
        input_ids: [texts, n >= 1], no padding.
        chunk: tokens a forward.
        cache: from an earlier call, with the tokens before `input_ids`; changed in place. None begins a text.
        progress: show a bar.

    Returns:
        The cache, with these n tokens too. Give `generate` a copy of it for each question, or crop it afterwards.

    Raises:
        TypeError, ValueError: `chunk` is no whole number of at least 1; the model keeps no cache.

    Examples:
        >>> read_ahead(model, torch.arange(2, 22)[None], chunk=8).get_seq_length()
        20
    """
    chunk = check_int("chunk", chunk, minimum=1)
    check_tensor("input_ids", input_ids)
    decoder = decoder_of(check_model(model))
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


def greedy_answer(model: Any, ids: list[int], max_new_tokens: int) -> Tensor:
    """Return the token ids [n] that `model` generates greedily; an encoder-decoder's include its start token."""
    prompt = torch.tensor([ids], device=model.device)
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, **greedy)
    answer: Tensor = output[0] if model.config.is_encoder_decoder else output[0, len(ids) :]
    return answer


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all tensors in the layers of a transformers cache, each storage counted once.

    Examples:
        >>> cache, _ = start_stream(model, torch.tensor([[5, 6, 7]]))
        >>> cache_bytes(cache) > 0
        True
    """
    check_kind("cache", cache, Cache, "the past_key_values of an output is one")
    held = (tensor for layer in cache.layers for tensor in _tensors(list(vars(layer).values())))
    return sum({storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, held)}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, inside tuples, lists and the values of dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
