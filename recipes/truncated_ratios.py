"""On-policy ratios on a real model: what a trainer computes of truncated samples, beside what the sampler drew from.

    python recipes/truncated_ratios.py --tokens 10000

Behind every token of a text each sampler draws one token from the model's distribution, and its kept set is recorded as
a `SamplingMask`. Printed for each sampler: the largest and the mean |log ratio| of `truncated_log_probs` against the
log-softmax of the scores that were drawn from, with the same logits (the arithmetic alone) and with those of another
forward, whose batch has another shape (what a model's kernels add); by how much the full vocabulary's log-probabilities
are off; and the memory of the masks. `tests/sampling/test_recorder.py` holds `generate`'s own scores against them.

Cost: five minutes on two CPU cores.
Expect: 1e-5 at most of the kept sets with the same logits, 0.1 to 0.8 nats of the full vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from transformers import MinPLogitsWarper, TopHLogitsWarper, TopPLogitsWarper

from hf_longtrunc import (
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    PLessLogitsProcessor,
    SamplingMask,
    TopNSigmaLogitsProcessor,
    load_pretrained,
    truncated_scores,
)
from hf_longtrunc.evaluation import python_reference

SAMPLERS: dict[str, Any] = {
    "eta 2e-3": EtaLogitsProcessor(2e-3),
    "epsilon 9e-4": EpsilonLogitsProcessor(9e-4),
    "top-n-sigma 1": TopNSigmaLogitsProcessor(1.0),
    "p-less": PLessLogitsProcessor(),
    "top-p 0.9": TopPLogitsWarper(0.9),
    "min-p 0.1": MinPLogitsWarper(0.1),
    "top-H 0.4": TopHLogitsWarper(0.4),
}
LENGTH, ROWS = 100, 4  # tokens of a row, rows of a batch


def main(
    tokens: Annotated[int, typer.Option(help="Drawn by each sampler.")] = 10_000,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
) -> None:
    model, tokenizer = load_pretrained(dtype=getattr(torch, dtype), device="cpu")
    rows = torch.tensor(tokenizer(python_reference()[: 8 * tokens]).input_ids)[: tokens // LENGTH * LENGTH]
    found: dict[str, list[list[torch.Tensor]]] = {name: [] for name in SAMPLERS}
    generator = torch.Generator().manual_seed(0)
    for batch in torch.split(rows.view(-1, LENGTH), ROWS):
        with torch.no_grad():
            logits = model(batch).logits.flatten(0, 1)
            others = torch.cat([model(row[None]).logits[0] for row in batch])
        for name, processor in SAMPLERS.items():
            scores = processor(None, logits.float())
            log_probs = scores.log_softmax(-1)
            drawn = log_probs.exp().multinomial(1, generator=generator)
            old = log_probs.gather(1, drawn)[:, 0]
            mask = SamplingMask.from_kept(scores > -torch.inf)
            own = truncated_scores(logits, drawn[:, 0], mask)
            again = truncated_scores(others, drawn[:, 0], mask).log_probs
            full = own.log_probs + own.log_kept_mass
            memory = torch.tensor([len(mask.data)]) / len(mask)
            found[name].append([own.log_probs - old, again - old, full - old, memory])
    print(f"{len(rows):,} tokens of each sampler, {dtype}; |log ratio|: largest (mean)")
    for name, parts in found.items():
        same, again, full, memory = (torch.cat(each) for each in zip(*parts, strict=True))
        print(
            f"{name}: same logits {said(same)}, another forward {said(again)}, full vocabulary {said(full)}; "
            f"{memory.mean():.0f} bytes a token"
        )


def said(differences: torch.Tensor) -> str:
    sizes = differences.double().abs()
    return f"{sizes.max():.1e} ({sizes.mean():.1e})"


if __name__ == "__main__":
    typer.run(main)
