"""Truncation sampling and long context for Hugging Face transformers, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hf_longtrunc import load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
console = Console()

Model = Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")]


@app.callback(help=__doc__)
def main() -> None:
    """Hold the subcommands together: typer would drop the name of a lone one."""


@app.command()
def demo(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each sampler draws.")] = 80,
    epsilon: Annotated[float, typer.Option(help="Eta-sampling's parameter, in (0, 1).")] = 2e-3,
    top_p: Annotated[float, typer.Option(help="Top-p's parameter, in (0, 1].")] = 0.9,
    seed: Annotated[int, typer.Option(help="Of every sampler.")] = 0,
    output_dir: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("longtrunc_demo"),
) -> None:
    """Run every technique on a real model and show what it does: two minutes on two CPU cores."""
    from hf_longtrunc.demo import PROMPT, sampling_part

    if not 0 < epsilon < 1:
        raise typer.BadParameter(f"must lie in (0, 1), got {epsilon}", param_hint="--epsilon")
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"must lie in (0, 1], got {top_p}", param_hint="--top-p")
    loaded, tokenizer = _load(model)
    sampling_part(
        loaded,
        tokenizer,
        output_dir,
        prompt=prompt or PROMPT,
        max_new_tokens=max_new_tokens,
        epsilon=epsilon,
        top_p=top_p,
        seed=seed,
        console=console,
    )


@app.command()
def match(
    text: Annotated[str, typer.Argument(help="A human text, or a file that holds one.")],
    model: Model = None,
    rank: Annotated[int, typer.Option(min=0, help="Directions of the softmax basis.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text that are read.")] = 512,
    picture: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("longtrunc_match.png"),
) -> None:
    """Find the epsilons at which eta, epsilon and basis-aware truncation refuse the same share of a human text."""
    from hf_longtrunc.evaluation.matching import match_text

    loaded, tokenizer = _load(model)
    if len(text) < 4096 and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    try:
        match_text(loaded, tokenizer, text, picture, rank=rank, max_tokens=max_tokens, console=console)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _load(model: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        with console.status("loading the model"):
            return load_pretrained(model)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        name = model or "the default model"
        console.print(f"[bold red]Could not load {name}.[/bold red] {error}", highlight=False)
        console.print("--model takes a hub id or a folder that transformers' from_pretrained can load.")
        raise typer.Exit(1) from error
