"""Perplexity by position of a very long text at constant memory: LM-Infinite's cache, read chunk by chunk.

    python recipes/constant_memory.py --tokens 200000 --out constant_memory
    python recipes/constant_memory.py --prompts 20000,80000
    python recipes/constant_memory.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text some_novel.txt --window 2048

Without --model, the model is a Llama of two layers with random weights and the text is random tokens: that shows
memory and time, not quality. Every EVERY tokens a record says how many tokens were read, the perplexity of the last
ones, the peak memory of the process so far and the processor time of the last ones. With `--prompts` no text is read:
each number of tokens is given to `generate` as one prompt, first as it reads them by itself, in chunks, then whole.

Expect: after the first lines the peak stays where it is, and so does the time. Prompts read in chunks let the peak grow
by the same, whatever their length.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.evaluation import append_records, stream_losses

Named = tuple[str, int, int]  # model, window, sinks


@dataclass(frozen=True)
class MemoryRecord:
    """Memory, time and perplexity after so many tokens."""

    model: str
    window: int
    sinks: int
    tokens: int
    perplexity: float
    peak_mib: float
    seconds: float


@dataclass(frozen=True)
class PromptRecord:
    """By how much the peak has grown since a short prompt, once one of so many tokens was given to `generate`."""

    model: str
    window: int
    sinks: int
    tokens: int
    read: str
    grown_mib: float


def peak_mib() -> float:
    """Return the peak memory of this process so far, on CUDA that of the device."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def tokens_of(text: Path | None, tokenizer: Any, count: int, vocab_size: int) -> torch.Tensor:
    if text is None:
        return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    ids: torch.Tensor = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    return ids.repeat(-(-count // len(ids)))[:count]


def main(
    tokens: Annotated[int, typer.Option(help="Tokens to read; a shorter text starts again.")] = 200_000,
    every: Annotated[int, typer.Option(help="Report every so many tokens.")] = 20_000,
    window: Annotated[int, typer.Option(help="LM-Infinite's window.")] = 512,
    sinks: Annotated[int, typer.Option(help="First tokens that stay visible.")] = 16,
    chunk: Annotated[int, typer.Option(help="Tokens per forward.")] = 500,
    model: Annotated[str | None, typer.Option(help="Hub id or folder; a tiny random model if left out.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text; random tokens if left out. Needs a model.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Lengths of prompts for generate, separated by commas, instead of reading.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for memory.jsonl or prompts.jsonl.")] = Path("constant_memory"),
) -> None:
    language_model, tokenizer = (tiny_model(), None) if model is None else load_pretrained(model)
    lengths = sorted(int(length) for length in prompts.split(",")) if prompts else []
    ids = tokens_of(text, tokenizer, lengths[-1] if lengths else tokens, language_model.config.vocab_size)
    ids = ids.to(language_model.device)
    named = model or "tiny random Llama", window, sinks
    with LMInfinite(num_sink_tokens=sinks, window_length=window)(language_model):
        if lengths:
            give_prompts(language_model, ids, lengths, named, out)
        else:
            read_stream(language_model, ids, chunk, every, named, out)


def read_stream(model: Any, ids: torch.Tensor, chunk: int, every: int, named: Named, out: Path) -> None:
    """Read the text in chunks, and report every so many tokens."""
    losses: list[torch.Tensor] = []
    since = time.process_time()
    for index, piece in enumerate(stream_losses(model, torch.split(ids[None], chunk, dim=1)), 1):
        losses.append(piece)
        if index * chunk % every == 0 or index * chunk >= len(ids):
            perplexity = torch.cat(losses, dim=1).mean().exp().item()
            seconds = round(time.process_time() - since, 2)
            read, peak = min(index * chunk, len(ids)), peak_mib()
            append_records(out / "memory.jsonl", [MemoryRecord(*named, read, round(perplexity, 3), peak, seconds)])
            line = f"{read:>9,} tokens  perplexity {perplexity:9.2f}  peak {peak:8.1f} MiB  {seconds:6.2f} s"
            print(line, flush=True)
            losses, since = [], time.process_time()


def give_prompts(model: Any, ids: torch.Tensor, lengths: list[int], named: Named, out: Path) -> None:
    """Generate two tokens after each prompt, short ones first, since a peak never falls."""
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    model.generate(ids[None, : named[1]], **settings)
    before = peak_mib()
    for read in ("in chunks", "whole"):
        for length in lengths:
            whole = {"prefill_chunk_size": length} if read == "whole" else {}
            model.generate(ids[None, :length], **settings, **whole)
            grown = round(peak_mib() - before, 1)
            append_records(out / "prompts.jsonl", [PromptRecord(*named, length, read, grown)])
            print(f"{length:>9,} tokens read {read:9}  peak grown by {grown:6.1f} MiB", flush=True)


if __name__ == "__main__":
    typer.run(main)
