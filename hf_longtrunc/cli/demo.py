"""`hf-longtrunc demo`: the techniques on a real model, a part each."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from hf_longtrunc.cli import common

if TYPE_CHECKING:
    from collections.abc import Callable

PICTURES = {"sampling": "sampling.png", "bat": "bat.png", "packing": "packing.png", "past-window": "perplexity.png"}
Part = Enum("Part", {part: part for part in PICTURES}, type=str)  # type: ignore[misc]


def demo(
    parts: Annotated[list[Part] | None, Argument(help="Left out: all but bat.")] = None,
    model: common.Model = None,
    dtype: common.DType = None,
    device: common.Device = None,
    prompt: Annotated[str | None, Option(help="sampling, bat: text to continue.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="sampling: tokens that each sampler draws.")] = 80,
    epsilon: Annotated[float, Option(help="sampling: eta's parameter, in (0, 1).")] = 2e-3,
    top_p: Annotated[float, Option(help="sampling: top-p's parameter, in (0, 1].")] = 0.9,
    seed: Annotated[int, Option(help="sampling, bat: random seed.")] = 0,
    text: Annotated[str | None, Option(help="past-window: file of a text to read.")] = None,
    output_dir: Annotated[Path, Option(help="Folder for pictures and pages.")] = Path("longtrunc_demo"),
    force: common.Force = False,
    as_json: common.AsJson = False,
) -> None:
    """Run the techniques on a real model and show their effects: five minutes of processor time.

    [b]sampling[/b]: plain sampling, top-p and eta on one prompt, and the tokens that each cut; half a minute.
    [b]bat[/b]: basis-aware truncation, and the tokens that it kept below eta's threshold; half a minute.
    [b]packing[/b]: docstrings packed into rows, and that no document sees another; ten seconds.
    [b]past-window[/b]: a text longer than the trained window, unmodified and under LM-Infinite; some three minutes.
    """
    chosen = [part.value for part in Part if (part in parts if parts else part.value != "bat")]
    if not 0 < epsilon < 1:
        raise typer.BadParameter(f"must lie in (0, 1), got {epsilon}", param_hint="--epsilon")
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"must lie in (0, 1], got {top_p}", param_hint="--top-p")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("is empty", param_hint="--prompt")
    pages = [f"{part}.html" for part in ("sampling", "bat") if part in chosen]
    common.check_outputs(output_dir, *(PICTURES[part] for part in chosen), *pages, force=force)
    source = None if text is None else common.read_text(text, "--text")
    if source is not None and not source.strip():
        raise typer.BadParameter("the text is empty", param_hint="--text")
    from hf_longtrunc.cli import demo_long, demo_parts
    from hf_longtrunc.pretrained import computes_in_bfloat16

    console = common.results(is_quiet=as_json)
    loaded: Any
    loaded, tokenizer = common.load(model, dtype, device, needs="a causal LM")
    drawn: dict[str, Any] = {"prompt": prompt or demo_parts.PROMPT, "seed": seed, "console": console}
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "epsilon": epsilon, "top_p": top_p}
    shows: dict[str, Callable[[], Any]] = {
        "sampling": lambda: demo_parts.sampling_part(loaded, tokenizer, output_dir, **drawn, **sizes),
        "bat": lambda: demo_parts.bat_part(loaded, tokenizer, output_dir, **drawn),
        "packing": lambda: demo_parts.packing_part(loaded, tokenizer, output_dir, console=console),
        "past-window": lambda: demo_long.past_the_window(
            loaded.bfloat16() if dtype is None and computes_in_bfloat16(loaded.device) else loaded,
            *(tokenizer, output_dir),
            text=source,
            console=console,
        ),
    }
    shown = {part: shows[part]() for part in chosen}
    if as_json:
        common.print_json(shown)
    demo_parts.last_screen(shown, output_dir, console)
