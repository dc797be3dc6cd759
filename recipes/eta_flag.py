"""How many tokens eta-sampling leaves on the full distribution, and as transformers' flag after the default top-k.

    python recipes/eta_flag.py

`generate(eta_cutoff=...)` cuts what `top_k=50`, its default, has left; `EtaLogitsProcessor` sees all tokens. One step
of sampling is run each way after each prompt, and `TruncationTrace` counts the remaining tokens.

Cost: seconds. Expect: after "My name is" 50 tokens by the flag and 1,597 by the processor at epsilon 2e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_longtrunc import EtaLogitsProcessor, TruncationTrace, load_pretrained
from hf_longtrunc.evaluation import append_records

PROMPTS = "My name is", "The capital of France is"


@dataclass(frozen=True)
class Kept:
    """What one step leaves."""

    prompt: str
    epsilon: float
    way: str
    tokens: int
    mass: float


def main(
    epsilons: Annotated[str, typer.Option(help="Of eta, separated by commas.")] = "2e-3,3e-4",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for eta_flag.jsonl.")] = None,
) -> None:
    language_model: Any
    language_model, tokenizer = load_pretrained(model)
    records = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(language_model.device)
        for epsilon in map(float, epsilons.split(",")):
            ways: dict[str, dict[str, Any]] = {
                "eta_cutoff=": {"eta_cutoff": epsilon},
                "EtaLogitsProcessor": {"logits_processor": [EtaLogitsProcessor(epsilon)], "top_k": 0},
            }
            for way, arguments in ways.items():
                trace = TruncationTrace()
                with trace.observe(language_model):
                    ids = language_model.generate(**inputs, do_sample=True, max_new_tokens=1, **arguments)
                step = trace.finish(ids).records[0]
                records.append(Kept(prompt, epsilon, way, step.kept, step.kept_mass))
    if out is not None:
        append_records(out / "eta_flag.jsonl", records)
    table = Table("prompt", "epsilon", "way", "tokens kept", "kept mass")
    for kept in records:
        table.add_row(kept.prompt, f"{kept.epsilon:g}", kept.way, f"{kept.tokens:,}", f"{kept.mass:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
