"""`hf-longtrunc ask`: questions about a text of any length: passages are found, and read right before the question."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path  # noqa: TC003 (typer reads the annotations when it runs)
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from typer import Argument, Option

from hf_longtrunc.asking.passages import CONTEXT, GUIDANCE, UNITS
from hf_longtrunc.cli import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_longtrunc import Passage
    from hf_longtrunc.asking.finders import Finder

FinderName = Literal["fused", "encoder", "bm25"]


def ask(
    file: Annotated[str, Argument(help="A text, or - for standard input.")],
    questions: Annotated[list[str], Argument(help="One question or several.")],
    model: common.Model = None,
    dtype: common.DType = None,
    device: common.Device = None,
    also: Annotated[list[str] | None, Option("--also", help="One more text to look in; can be repeated.")] = None,
    finder: Annotated[FinderName, Option(help="Find by meaning and words, by meaning, or by words.")] = "fused",
    encoder: Annotated[
        str | None, Option(help="Sentence encoder: hub id or folder; all-MiniLM-L6-v2 if left out.")
    ] = None,
    index: Annotated[Path | None, Option(help="Folder that keeps the index for the next time.")] = None,
    count: Annotated[int, Option(min=1, help="Passages that are read at most.")] = 1,
    context: Annotated[int, Option(min=0, help="Longest neighbour that a sentence may be read with.")] = CONTEXT,
    hops: Annotated[int, Option(min=1, max=2, help="2 searches again, with the first passage's words.")] = 1,
    rerank: Annotated[int, Option(min=1, help="Best passages that the model compares; 1 for none.")] = UNITS,
    guidance: Annotated[
        float,
        Option(min=0, max=1000, help="How far the passage outweighs what the model would say anyway; 1: not at all."),
    ] = GUIDANCE,
    follow_up: Annotated[bool, Option("--follow-up", help="A question may refer to the one before it.")] = False,
    prompt: Annotated[Path | None, Option(help="A file with {passages} and {question} in it.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, max=2**31 - 1, help="Tokens of an answer.")] = 64,
    as_json: common.AsJson = False,
) -> None:
    """Ask about a text of any length: the passage that answers is found, and read right before the question."""
    import hf_longtrunc
    from hf_longtrunc.asking.answers import NOT_FOUND
    from hf_longtrunc.asking.prompt import PROMPT, check_prompt, is_about_the_whole

    for question in questions:
        if not question.strip():
            raise typer.BadParameter("a question is empty", param_hint="QUESTIONS")
    files = [file, *(also or [])]
    if len(set(files)) < len(files):
        raise typer.BadParameter("a text is named twice", param_hint="--also")
    for path in files:
        common.check_file(path)
    text = {path: common.read_text(path) for path in files} if also else common.read_text(file)
    if not any(part.strip() for part in ([text] if isinstance(text, str) else text.values())):
        raise typer.BadParameter("the text is empty", param_hint="FILE")
    try:
        template = PROMPT if prompt is None else check_prompt(common.read_text(str(prompt), "--prompt").strip())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--prompt") from error
    if index is not None:
        common.check_outputs(index, force=True, option="--index")
    loaded, tokenizer = common.load(model, dtype, device, needs="a causal LM")
    found = indexed(text, finder_of(finder, encoder), index)
    answers: list[dict[str, Any]] = []
    turns: list[tuple[str, str]] = []

    def note(passages: Sequence[Passage]) -> None:
        if is_about_the_whole(question):
            common.notes().print("[dim](about the whole text: read a few places of it, and no more than those)[/dim]")
        elif not passages:
            common.notes().print(f"[dim]({NOT_FOUND})[/dim]")
        for passage in passages:
            place = f"{passage.source or file}, characters {passage.start:,} to {passage.end:,}"
            common.notes().print(
                f"[dim]{escape(place)} ({passage.score:.2f}): {escape(' '.join(passage.text.split()))}[/dim]"
            )

    for question in questions:
        streamer = None
        if not as_json:
            from transformers import TextStreamer

            common.notes().print(f"[bold]{escape(question)}[/bold]")
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = hf_longtrunc.ask(
            loaded,
            tokenizer,
            found,
            question,
            count=count,
            context=context,
            hops=hops,
            rerank=rerank,
            guidance=guidance,
            prompt=template,
            before=turns if follow_up else (),
            max_new_tokens=max_new_tokens,
            on_passages=note,
            streamer=streamer,
        )
        turns.append((question, answer.text))
        answers.append(asdict(answer))
        if not answer.text:
            common.notes().print("[dim](the model ended its answer at once)[/dim]")
    if as_json:
        common.print_json({"units": len(found), "finder": finder, "answers": answers})


def finder_of(name: FinderName, encoder: str | None) -> Finder:
    """Return the finder that the options name."""
    from hf_longtrunc import BM25, SentenceEncoder, load_encoder
    from hf_longtrunc.asking.answers import default_finder

    if name == "bm25":
        if encoder is not None:
            raise typer.BadParameter("goes with --finder encoder or fused", param_hint="--encoder")
        return BM25()
    with common.notes().status("loading the sentence encoder"):
        return default_finder(encoder) if name == "fused" else SentenceEncoder(*load_encoder(encoder))


def indexed(text: str | dict[str, str], finder: Finder, folder: Path | None) -> Any:
    """Return the index of a text: the one in the folder, or a new one that is kept there."""
    from hf_longtrunc import TextIndex

    if folder is not None and (folder / "text_index.safetensors").exists():
        try:
            index = TextIndex.load(folder, text, finder)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--index") from error
        common.notes().print(f"index of {len(index):,} units: [bold]{escape(str(folder))}[/bold]")
        return index
    index = TextIndex(text, finder, progress=common.is_watched())
    if folder is not None:
        index.save(folder)
        common.notes().print(f"index of {len(index):,} units kept: [bold]{escape(str(folder))}[/bold]")
    return index
