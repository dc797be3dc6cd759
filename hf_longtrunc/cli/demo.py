"""`hf-longtrunc demo`: the techniques on a real model, a part each."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_longtrunc.cli.common import (
    AsJson,
    Force,
    Model,
    check_outputs,
    load,
    print_json,
    read_text,
    results,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Part(str, Enum):
    """The demo's parts, in the order in which they run."""

    sampling = "sampling"
    bat = "bat"
    packing = "packing"
    cream = "cream"
    past_window = "past-window"


QUICK = [Part.sampling, Part.packing, Part.past_window]


def demo(
    parts: Annotated[list[Part] | None, typer.Argument(help="Left out: sampling, packing and past-window.")] = None,
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="sampling, bat: text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="sampling: tokens that each sampler draws.")] = 80,
    epsilon: Annotated[float, typer.Option(help="sampling: eta's parameter, in (0, 1).")] = 2e-3,
    top_p: Annotated[float, typer.Option(help="sampling: top-p's parameter, in (0, 1].")] = 0.9,
    seed: Annotated[int, typer.Option(help="sampling: of every sampler.")] = 0,
    text: Annotated[str | None, typer.Option(help="past-window: file of a text to read.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Where the pictures and pages go.")] = Path("longtrunc_demo"),
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Run the techniques on a real model and show what they do.

    [b]sampling[/b]: plain sampling, top-p and eta on one prompt, and what each of them cut; half a minute on two cores.
    [b]bat[/b]: basis-aware truncation, and the tokens that it kept below eta's threshold; half a minute.
    [b]packing[/b]: docstrings packed into rows, and that no document sees another; ten seconds.
    [b]cream[/b]: position ids drawn by CREAM and PoSE, and the distances that they teach; five seconds, no model.
    [b]past-window[/b]: a text longer than the trained window, unmodified and under LM-Infinite; two minutes.
    """
    chosen = [part for part in Part if part in (parts or QUICK)]
    if not 0 < epsilon < 1:
        raise typer.BadParameter(f"must lie in (0, 1), got {epsilon}", param_hint="--epsilon")
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"must lie in (0, 1], got {top_p}", param_hint="--top-p")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("is empty", param_hint="--prompt")
    pictures = {part: f"{part.value}.png" for part in Part} | {Part.past_window: "perplexity.png"}
    pages = [f"{part.value}.html" for part in (Part.sampling, Part.bat) if part in chosen]
    check_outputs(output_dir, *(pictures[part] for part in chosen), *pages, force=force)
    source = None if text is None else read_text(text)
    from hf_longtrunc.cli import demo_long, demo_parts

    console = results(is_quiet=as_json)
    loaded: Any
    tokenizer: Any
    loaded, tokenizer = (None, None) if chosen == [Part.cream] else load(model, needs="a causal LM")
    prompt = prompt or demo_parts.PROMPT
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "epsilon": epsilon, "top_p": top_p}
    shows: dict[Part, Callable[[], object]] = {
        Part.sampling: lambda: demo_parts.sampling_part(
            loaded, tokenizer, output_dir, prompt=prompt, **sizes, seed=seed, console=console
        ),
        Part.bat: lambda: demo_parts.bat_part(loaded, tokenizer, output_dir, prompt=prompt, seed=seed, console=console),
        Part.packing: lambda: demo_parts.packing_part(loaded, tokenizer, output_dir, console=console),
        Part.cream: lambda: demo_parts.cream_part(output_dir, seed=seed, console=console),
        Part.past_window: lambda: demo_long.past_the_window(
            loaded, tokenizer, output_dir, text=source, console=console
        ),
    }
    shown = {part.value: shows[part]() for part in chosen}
    if as_json:
        print_json(shown)
    demo_parts.last_screen(shown, output_dir, console)
