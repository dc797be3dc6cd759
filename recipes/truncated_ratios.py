"""On-policy ratios on a real model: a trainer's log-probabilities of truncated samples against the sampler's own.

    python recipes/truncated_ratios.py --tokens 10000
    python recipes/truncated_ratios.py --generated 8

The first draws one token after each token of a text: each sampler from the same 10,000 distributions of the model.
The second lets `generate` write 60 tokens in each of 8 rows, by each sampler. Kept sets are recorded as a
`SamplingMask`; printed is the largest and the mean |log ratio| of `truncated_log_probs` against the log-softmax of the
scores that were drawn from,

- of the same forwards' logits: the log-probability alone, in fp32;
- of forwards of the same shapes, run again token by token from a cache: the error of a deterministic model;
- of one forward over the whole rows, as a trainer runs it: the error of kernels at other shapes;

and by how much the full vocabulary's log-probabilities are off. `tests/sampling/test_recorder.py` holds the same in
double precision, where the last two vanish.

Cost: five minutes on two CPU cores for the first, as much for the second.
Expect: 1e-5 at most of the kept sets with the same logits, 0.1 to 0.8 nats of the full vocabulary.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache, MinPLogitsWarper, TopHLogitsWarper, TopPLogitsWarper

from hf_longtrunc import (
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    PLessLogitsProcessor,
    SamplingMask,
    SamplingMaskRecorder,
    TopNSigmaLogitsProcessor,
    load_pretrained,
    sampling_settings,
    truncated_log_probs,
    truncated_scores,
)
from hf_longtrunc.evaluation import python_reference
from hf_longtrunc.models import CACHE

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
PROMPT, NEW = 16, 60


def main(
    tokens: Annotated[int, typer.Option(help="Drawn by each sampler, behind a text's.")] = 10_000,
    generated: Annotated[int, typer.Option(help="Rows of 60 tokens that each sampler writes instead.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
) -> None:
    model, tokenizer = load_pretrained(dtype=getattr(torch, dtype), device="cpu")
    wanted = 8 * (generated * PROMPT if generated else tokens)
    ids = torch.tensor(tokenizer(python_reference()[:wanted]).input_ids)
    print(f"{generated * NEW or tokens:,} tokens of each sampler, {dtype}; |log ratio|: largest (mean)")
    if generated:
        of_generated(model, ids[: generated * PROMPT].view(generated, PROMPT))
    else:
        of_text(model, ids[: tokens // LENGTH * LENGTH].view(-1, LENGTH))


@torch.no_grad()
def of_text(model: Any, rows: torch.Tensor) -> None:
    """Draw one token after each of `rows` [rows, length] by every sampler."""
    found: dict[str, list[list[torch.Tensor]]] = {name: [] for name in SAMPLERS}
    generator = torch.Generator().manual_seed(0)
    for batch in torch.split(rows, ROWS):
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
    for name, parts in found.items():
        same, again, full, memory = (torch.cat(each) for each in zip(*parts, strict=True))
        print(
            f"{name}: same logits {said(same)}, another forward {said(again)}, full vocabulary {said(full)}; "
            f"{memory.mean():.0f} bytes a token"
        )


@torch.no_grad()
def of_generated(model: Any, prompts: torch.Tensor) -> None:
    """Let every sampler go on from `prompts` [rows, length]."""
    for name, processor in SAMPLERS.items():
        torch.manual_seed(0)
        recorder = SamplingMaskRecorder()
        with recorder.attach(model):
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), **sampling_settings(model),
                min_new_tokens=NEW, max_new_tokens=NEW, output_scores=True,
                output_logits=True, return_dict_in_generate=True, logits_processor=[processor],
            )  # fmt: skip
        masks, drawn = recorder.take(), out.sequences[:, PROMPT:]
        old = torch.stack(out.scores, 1).log_softmax(-1).gather(2, drawn[..., None])[..., 0]
        whole = model(out.sequences).logits[:, PROMPT - 1 : -1]
        ratios = {
            "same forwards": torch.stack(out.logits, 1),
            "the same again": by_steps(model, out.sequences),
            "one forward": whole,
        }
        kept = ", ".join(f"{way} {said(truncated_log_probs(each, drawn, masks) - old)}" for way, each in ratios.items())
        full = whole.float().log_softmax(-1).gather(2, drawn[..., None])[..., 0] - old
        print(f"{name}: {kept}, full vocabulary {said(full)}", flush=True)


def by_steps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the tokens after the prompt, read as `generate` reads them: the prompt, then one by one."""
    cache: dict[str, Any] = {CACHE: DynamicCache(config=model.config)}
    output = model(ids[:, :PROMPT], logits_to_keep=1, **cache)
    logits = [output.logits[:, -1]]
    for place in range(PROMPT, ids.shape[1] - 1):
        output = model(ids[:, place : place + 1], **cache)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


def said(differences: torch.Tensor) -> str:
    sizes = differences.double().abs()
    return f"{sizes.max():.1e} ({sizes.mean():.1e})"


if __name__ == "__main__":
    typer.run(main)
