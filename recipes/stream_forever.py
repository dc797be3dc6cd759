"""Generate without end at constant memory and constant time per token.

    python recipes/stream_forever.py --window 2048 --every 1000
    python recipes/stream_forever.py --text some_novel.txt --tokens 100000     # read a text instead of writing one

Every EVERY tokens a line says how many tokens were seen, how many a second the last ones were, and the bytes of the
cache. Stop it with Ctrl-C, or by --tokens.

Cost: SmolLM2-135M-Instruct in fp32 with a window of 2,048 keeps a cache of about 100 MB.
Expect: the cache's bytes are the same in every line, and so is, within noise, the speed.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from hf_longtrunc import EtaLogitsProcessor, LMInfinite, load_pretrained
from hf_longtrunc.evaluation import cache_bytes, start_stream
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PROMPT = "It was a bright morning, and the road to the sea was long."


def written(model: Any, tokenizer: Any, cache: Any, logits: Tensor) -> Iterator[Tensor]:
    """Yield the model's tokens [1, 1], one at a time, by eta-sampling; its end-of-text tokens are ruled out."""
    eta = EtaLogitsProcessor(epsilon=2e-3)
    while True:
        scores = logits[:, -1].float()
        scores[:, tokenizer.all_special_ids] = -torch.inf
        token = torch.multinomial(eta(None, scores).softmax(-1), 1)
        yield token
        logits = model(input_ids=token, use_cache=True, **{CACHE: cache}).logits


def read(model: Any, cache: Any, ids: Tensor) -> Iterator[Tensor]:
    """Yield the tokens of a text [1, n] after feeding each to the model; the text starts again at its end."""
    for position in itertools.cycle(range(ids.shape[1])):
        token = ids[:, position : position + 1]
        model(input_ids=token, use_cache=True, **{CACHE: cache})
        yield token


@torch.inference_mode()
def main(
    text: Annotated[Path | None, typer.Option(help="Read this text, round and round, instead of writing.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    every: Annotated[int, typer.Option(help="Report every so many tokens.")] = 500,
    window: Annotated[int | None, typer.Option(help="LM-Infinite's window; the trained one if left out.")] = None,
    sinks: Annotated[int, typer.Option(help="First tokens that stay visible.")] = 16,
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    quiet: Annotated[bool, typer.Option(help="Do not print the text.")] = False,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    language_model: Any
    language_model, tokenizer = load_pretrained(model)
    start = tokenizer(PROMPT, return_tensors="pt").input_ids.to(language_model.device)
    with LMInfinite(num_sink_tokens=sinks, window_length=window)(language_model):
        cache, logits = start_stream(language_model, start)
        if text is None:
            stream = written(language_model, tokenizer, cache, logits)
        else:
            ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
            stream = read(language_model, cache, ids.to(language_model.device))
        since = time.perf_counter()
        for count, token in enumerate(itertools.islice(stream, tokens), 1):
            if not quiet:
                print(tokenizer.decode(token[0]), end="", flush=True)
            if count % every == 0:
                speed = every / (time.perf_counter() - since)
                seen, size = cache.get_seq_length(), cache_bytes(cache) / 2**20
                print(f"\n[{seen:,} tokens seen, {speed:.1f} tokens/s, cache {size:,.1f} MiB]", file=sys.stderr)
                since = time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
