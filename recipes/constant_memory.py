"""Perplexity by position of a very long text at constant memory: LM-Infinite's cache, read chunk by chunk.

    python recipes/constant_memory.py --tokens 200000 --out constant_memory
    python recipes/constant_memory.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text some_novel.txt --window 2048

Left out, the model is a Llama of two layers with random weights and the text is random tokens: what is shown then is
memory and time, not quality. Every EVERY tokens a record says how many tokens were read, the perplexity of the last
ones, the peak memory of the process so far and the processor time of the last ones.

Expect: after the first lines the peak stays where it is, and so does the time.
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


@dataclass(frozen=True)
class MemoryRecord:
    """What was true when so many tokens had been read."""

    model: str
    window: int
    sinks: int
    tokens: int
    perplexity: float
    peak_mib: float
    seconds: float


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return model.eval()


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
    out: Annotated[Path, typer.Option(help="Folder for memory.jsonl.")] = Path("constant_memory"),
) -> None:
    language_model, tokenizer = (tiny_model(), None) if model is None else load_pretrained(model)
    ids = tokens_of(text, tokenizer, tokens, language_model.config.vocab_size)
    losses: list[torch.Tensor] = []
    since = time.process_time()
    with LMInfinite(num_sink_tokens=sinks, window_length=window)(language_model):
        for index, piece in enumerate(stream_losses(language_model, torch.split(ids[None], chunk, dim=1)), 1):
            losses.append(piece)
            if index * chunk % every == 0 or index * chunk >= tokens:
                perplexity = torch.cat(losses, dim=1).mean().exp().item()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                seconds = round(time.process_time() - since, 2)
                read = min(index * chunk, tokens)
                name = model or "tiny random Llama"
                record = MemoryRecord(name, window, sinks, read, round(perplexity, 3), round(peak, 1), seconds)
                append_records(out / "memory.jsonl", [record])
                print(
                    f"{read:>9,} tokens  perplexity {perplexity:9.2f}  peak {peak:8.1f} MiB  {seconds:6.2f} s",
                    flush=True,
                )
                losses, since = [], time.process_time()


if __name__ == "__main__":
    typer.run(main)
