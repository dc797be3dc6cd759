"""`hf-longtrunc ask`: questions about a text of any length, which is read once."""

from __future__ import annotations

import copy
import sys
import time
from contextlib import nullcontext
from pathlib import Path  # noqa: TC003 (typer reads the annotations when it runs)
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from hf_longtrunc.cli.common import (
    AsJson,
    Force,
    Model,
    Sinks,
    check_file,
    check_outputs,
    is_watched,
    load,
    notes,
    print_json,
    read_text,
    whole_text,
)
from hf_longtrunc.templates import template_parts

if TYPE_CHECKING:
    from hf_longtrunc.evaluation.records import Arm

_WITH_QUESTION = 96  # of the text's tokens are read with each question, against which the rows of the question stand


def ask(
    file: Annotated[str, typer.Argument(help="A text, or - for standard input.")],
    questions: Annotated[list[str], typer.Argument(help="One question or several, each on its own.")],
    model: Model = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="LM-Infinite and the blocks that the question points at: codes, names.")
    ] = False,
    lm_infinite: Annotated[
        bool, typer.Option("--lm-infinite", help="The text's beginning and end alone, in little memory.")
    ] = False,
    window: Annotated[
        int | None, typer.Option(min=1, help="Of those two; a quarter of the trained one, or all of it.")
    ] = None,
    sinks: Sinks = 16,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Only the text's first so many tokens.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    page: Annotated[
        Path | None, typer.Option(help="Write where the answer read, a page for a browser; one for each question.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Ask about a text of any length: it is read once, whole (dual chunk attention), and every question answered."""
    if blocks and lm_infinite:
        raise typer.BadParameter("takes one way of reading, got both --blocks and --lm-infinite")
    if window is not None and not (blocks or lm_infinite):
        raise typer.BadParameter("goes with --blocks or --lm-infinite", param_hint="--window")
    for question in questions:
        if not question.strip():
            raise typer.BadParameter("a question is empty", param_hint="QUESTIONS")
    check_file(file)
    pages = [] if page is None else pages_of(page, len(questions))
    if page is not None:
        if page.is_dir():
            raise typer.BadParameter(f"{page} is a folder, expected a file", param_hint="--page")
        check_outputs(page.parent, *(each.name for each in pages), force=force, option="--page")
    text = read_text(file)
    if not text.strip():
        raise typer.BadParameter("the text is empty", param_hint="FILE")
    loaded, tokenizer = load(model, needs="a causal LM")
    before, behind = around(tokenizer, questions)
    found = tokens_of(tokenizer, text)
    ids = before + found[:max_tokens]
    try:
        way, arm = reading(loaded, tokenizer, blocks, lm_infinite, window, sinks)
        handle: Any = arm(loaded)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    read = {"tokens": len(ids) - len(before), "of": len(found), "reading": way}
    notes().print(f"reading {read['tokens']:,} of {len(found):,} tokens of {escape(file)}: {way}")
    with handle:
        asked = list(zip(questions, behind, strict=True))
        said = answered(loaded, tokenizer, ids, asked, max_new_tokens, as_json, handle, pages)
    if as_json:
        print_json({**read, **said})


def reading(
    model: Any, tokenizer: Any, blocks: bool, lm_infinite: bool, window: int | None, sinks: int
) -> tuple[str, Arm]:
    """Return the way to read that the options name, in words and as a technique."""
    from hf_longtrunc import LMInfinite, TopBlocks, trained_length

    retrieval, trained = TopBlocks.for_chat(tokenizer), trained_length(model.config)
    chooses = f"up to {retrieval.blocks} blocks of {retrieval.block_size} that the question chooses"
    if not (blocks or lm_infinite):
        technique = whole_text(model, tokenizer)
        way = f"dual chunk attention, {trained:,} positions trained"
        return way if technique.retrieval is None else f"{way}, and above all {chooses}", technique
    length = window or (max(1, trained // 4) if blocks else trained)
    seen = f"LM-Infinite, the first {sinks} and the last {length:,} tokens"
    if not blocks:
        return seen, LMInfinite(num_sink_tokens=sinks, window_length=length)
    return f"{seen}, and {chooses}", LMInfinite(num_sink_tokens=sinks, window_length=length, retrieval=retrieval)


def pages_of(page: Path, count: int) -> list[Path]:
    """Return where each question's page goes: the path itself, numbered before its suffix where there are several."""
    if count == 1:
        return [page]
    return [page.with_name(f"{page.stem}-{number}{page.suffix}") for number in range(1, count + 1)]


def around(tokenizer: Any, questions: list[str]) -> tuple[list[int], list[list[int]]]:
    """Return the tokens before the text, and those behind it for each question, in the chat template if there is one.

    Raises:
        ValueError: the chat template drops what a user says.
    """
    is_chat = bool(getattr(tokenizer, "chat_template", None))
    before, between, behind = "", "\n\n", "\nAnswer:"
    if is_chat:  # no word of ours before the text: a question's last rows look at it, and the answer repeats it
        marks = "<<text>>", "<<question>>"
        messages = [{"role": "user", "content": f"{marks[0]}{between}{marks[1]}"}]
        before, between, behind = template_parts(tokenizer, messages, *marks)
    begin: list[int] = tokenizer(before, add_special_tokens=not is_chat, verbose=False).input_ids
    return begin, [tokens_of(tokenizer, f"{between}{question.strip()}{behind}") for question in questions]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a part of a prompt."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def answered(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    questions: list[tuple[str, list[int]]],
    max_new_tokens: int,
    is_quiet: bool,
    handle: Any,
    pages: list[Path],
) -> dict[str, Any]:
    """Read `ids` once and answer each question, given with the tokens that end its prompt; print as it is said.

    Where each answer read goes to its page, if there are any.
    """
    import torch
    from transformers import TextStreamer
    from transformers.cache_utils import DynamicLayer

    from hf_longtrunc import AttentionTrace
    from hf_longtrunc.evaluation import cache_bytes, read_ahead
    from hf_longtrunc.evaluation.greedy import greedy_answer

    since, answers = time.perf_counter(), []
    held_back = min(_WITH_QUESTION, len(ids) - 1)
    ahead = torch.tensor([ids[: len(ids) - held_back]], device=model.device)
    cache = read_ahead(model, ahead, progress=is_watched())
    seconds, kept = time.perf_counter() - since, cache_bytes(cache) / 2**20
    notes().print(f"read in {seconds:.1f} s, {kept:,.0f} MiB kept")
    grows = all(type(layer) is DynamicLayer for layer in cache.layers)
    for number, (question, ending) in enumerate(questions):
        since = time.perf_counter()
        if not is_quiet:
            notes().print(f"[bold]{escape(question)}[/bold]")
        held = cache if grows else copy.deepcopy(cache)
        streamer = None if is_quiet else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with AttentionTrace(handle) if pages else nullcontext() as trace:
            said = greedy_answer(model, ids + ending, max_new_tokens, cache=held, streamer=streamer)
        if trace is not None:
            whole, asked = [*ids, *ending, *said.tolist()], len(ids) + len(ending)
            path = trace.to_html(tokenizer, whole, pages[number], prompt_length=asked, prompt=question)
            notes().print(f"page: [bold]{escape(str(path))}[/bold]")
        if grows:
            cache.crop(ahead.shape[1] - cache.get_seq_length())
        answer = str(tokenizer.decode(said, skip_special_tokens=True)).strip()
        if not answer:
            notes().print("[dim](the model ended its answer at once: ask for what one place of the text says)[/dim]")
        answers.append({"question": question, "answer": answer, "seconds": round(time.perf_counter() - since, 3)})
    peak = peak_mib(model.device)
    return {"read_seconds": round(seconds, 3), "kept_mib": round(kept, 1), "peak_mib": peak, "answers": answers}


def peak_mib(device: Any) -> float | None:
    """Return the most memory that this process has held, on a GPU if the model is there; None where nothing tells."""
    import torch

    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(held / (2**20 if sys.platform == "darwin" else 2**10), 1)
