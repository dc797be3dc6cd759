"""Truncation sampling and long context for Hugging Face transformers, from the command line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_longtrunc import load_pretrained
from hf_longtrunc.data.command import pack_command
from hf_longtrunc.evaluation.commands import Model, lm_eval, ppl, scrolls
from hf_longtrunc.summarize import summarize

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
console = Console()


@app.callback(help=__doc__)
def main() -> None:
    """Hold the subcommands together: typer would drop the name of a lone one."""


class Part(str, Enum):
    """The demo's parts, in the order in which they run."""

    sampling = "sampling"
    bat = "bat"
    packing = "packing"
    cream = "cream"
    past_window = "past-window"


QUICK = [Part.sampling, Part.bat, Part.packing, Part.cream]


@app.command()
def demo(
    parts: Annotated[list[Part] | None, typer.Argument(help="Left out: every part that takes no minutes.")] = None,
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="sampling: text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="sampling: tokens that each sampler draws.")] = 80,
    epsilon: Annotated[float, typer.Option(help="sampling: eta's parameter, in (0, 1).")] = 2e-3,
    top_p: Annotated[float, typer.Option(help="sampling: top-p's parameter, in (0, 1].")] = 0.9,
    seed: Annotated[int, typer.Option(help="sampling: of every sampler.")] = 0,
    text: Annotated[typer.FileText | None, typer.Option(encoding="utf-8", help="past-window: text to read.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("longtrunc_demo"),
) -> None:
    """Run the techniques on a real model and show what they do.

    [b]sampling[/b]: plain sampling, top-p and eta on one prompt, and what each of them cut; half a minute on two cores.
    [b]bat[/b]: basis-aware truncation, and the tokens that it kept below eta's threshold; half a minute.
    [b]packing[/b]: docstrings packed into rows, and that no document sees another; ten seconds.
    [b]cream[/b]: position ids drawn by CREAM and PoSE, and the distances that they teach; five seconds, no model.
    [b]past-window[/b]: a text longer than the trained window, unmodified and under LM-Infinite; some four minutes.
    """
    from hf_longtrunc.demo import PROMPT, bat_part, cream_part, packing_part, sampling_part
    from hf_longtrunc.evaluation.commands import past_the_window

    if not 0 < epsilon < 1:
        raise typer.BadParameter(f"must lie in (0, 1), got {epsilon}", param_hint="--epsilon")
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"must lie in (0, 1], got {top_p}", param_hint="--top-p")
    chosen = parts or QUICK
    loaded: Any
    tokenizer: Any
    loaded, tokenizer = (None, None) if chosen == [Part.cream] else _load(model)
    if Part.sampling in chosen:
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
    if Part.bat in chosen:
        bat_part(loaded, tokenizer, output_dir, prompt=prompt or PROMPT, seed=seed, console=console)
    if Part.packing in chosen:
        packing_part(loaded, tokenizer, output_dir, console=console)
    if Part.cream in chosen:
        cream_part(output_dir, seed=seed, console=console)
    if Part.past_window in chosen:
        past_the_window(loaded, tokenizer, output_dir, text=text.read() if text else None, console=console)
    else:
        console.print("[dim]next: hf-longtrunc demo past-window reads beyond the trained window (some minutes)[/dim]")


app.command()(ppl)
app.command()(scrolls)
app.command("lm-eval")(lm_eval)
app.command()(summarize)
app.command("pack")(pack_command)


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


def _load(model: str | None) -> tuple[Any, Any]:
    try:
        with console.status("loading the model"):
            return load_pretrained(model)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        name = model or "the default model"
        console.print(f"[bold red]Could not load {name}.[/bold red] {error}", highlight=False)
        console.print("--model takes a hub id or a folder that transformers' from_pretrained can load.")
        raise typer.Exit(1) from error
