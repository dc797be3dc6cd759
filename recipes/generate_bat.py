"""Generate with basis-aware truncation and see which tokens it rescued from the threshold.

    python recipes/generate_bat.py --prompt "The lighthouse keeper" [--epsilon 2e-3] [--rank 20]

Costs one basis (a second on two CPU cores for SmolLM2, kept in --basis if given) and 0.1 to 0.5 checks a token of some
milliseconds each. Expected: every drawn token that lies under eta's threshold comes with a critical threshold
above it; none is undecided.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hf_longtrunc import BasisAwareLogitsProcessor, SoftmaxBasis, SupportChecker, TruncationTrace, load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--prompt", default="The lighthouse keeper had not spoken to anyone for eleven days when")
    parser.add_argument("--epsilon", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--basis", type=Path, default=None, help="folder to keep the basis in")
    arguments = parser.parse_args()
    console = Console()
    model: Any
    tokenizer: Any
    model, tokenizer = load_pretrained(arguments.model)
    if arguments.basis is not None and arguments.basis.exists():
        basis = SoftmaxBasis.from_pretrained(arguments.basis, model.device)
        basis.check_model(model)
    else:
        basis = SoftmaxBasis.from_model(model, arguments.rank)
        if arguments.basis is not None:
            basis.save_pretrained(arguments.basis)
    bat = BasisAwareLogitsProcessor(basis, arguments.epsilon)
    trace = TruncationTrace([bat], critical_threshold=SupportChecker(basis).critical_threshold)
    torch.manual_seed(arguments.seed)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    sequences = model.generate(
        **inputs, do_sample=True, top_k=0, max_new_tokens=arguments.max_new_tokens, logits_processor=[trace]
    )
    records = trace.finish(sequences).records
    console.print(tokenizer.decode(sequences[0], skip_special_tokens=True))
    table = Table(title="Drawn below eta's threshold, and proved to have non-zero true probability")
    for heading in ("step", "token", "p", "threshold", "critical threshold"):
        table.add_column(heading, justify="right")
    for step, record in enumerate(records, 1):
        if record.kept_below:
            figures = record.probability, record.threshold, record.critical_threshold
            cells = ["" if figure is None else f"{figure:.2e}" for figure in figures]
            table.add_row(str(step), repr(tokenizer.decode([record.token])), *cells)
    console.print(table)
    checker = bat.checker
    console.print(f"{checker.checked / len(records):.2f} checks a token, {checker.undecided} undecided")


if __name__ == "__main__":
    main()
