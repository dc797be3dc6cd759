"""`hf-longtrunc summarize`: a text of any length through an encoder-decoder, unmodified or under Unlimiformer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from hf_longtrunc.cli import common

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding


def summarize(
    file: Annotated[str, Argument(help="A text, or - for standard input.")],
    model: Annotated[str, Option(help="Hub id or folder of an encoder-decoder: BART, T5, LED, Pegasus, ...")],
    prefix: Annotated[str | None, Option(help="Put before the text; by the model's config if left out.")] = None,
    top_k: Annotated[int | None, Option(min=1, help="States that a head reads; the window if left out.")] = None,
    window: Annotated[int | None, Option(min=1, help="Tokens read at a time; the model's if left out.")] = None,
    index: Annotated[str | None, Option(help="Such as faiss:HNSW32; exact search if left out.")] = None,
    dtype: common.DType = None,
    device: common.Device = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Tokens of the summary.")] = 256,
    num_beams: Annotated[int, Option(min=1, help="Beams of the search.")] = 4,
    compare: Annotated[bool, Option(help="Also summarize the beginning alone, as the model would.")] = False,
) -> None:
    """Summarize a text of any length: every head of the decoder reads the whole of it (Unlimiformer)."""
    text = common.read_text(file)
    if not text.strip():
        raise typer.BadParameter("the text is empty", param_hint="FILE")
    from hf_longtrunc import Unlimiformer

    loaded, tokenizer = common.load(model, dtype, device, needs="an encoder-decoder")
    patch = Unlimiformer(top_k=top_k, window=window, index=index).attach(loaded)
    inputs = tokenizer(_prefix(loaded, prefix) + text, return_tensors="pt", verbose=False)
    settings = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "min_length": 0, "max_length": None}
    try:
        _show(f"the whole text, top {patch.top_k:,} states a head", loaded, tokenizer, inputs, settings)
    finally:
        patch.detach()
    if compare:
        beginning = {name: tensor[:, : patch.window] for name, tensor in inputs.items()}
        _show("its beginning, unmodified", loaded, tokenizer, beginning, settings)


def _prefix(model: Any, given: str | None) -> str:
    if given is not None:
        return given
    tasks = getattr(model.config, "task_specific_params", None) or {}
    return str(tasks.get("summarization", {}).get("prefix", ""))


def _show(
    title: str, model: Any, tokenizer: Any, inputs: BatchEncoding | dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Print the summary on stdout; tokens read and seconds on stderr."""
    since = time.perf_counter()
    accepted = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with common.notes().status("summarizing"):
        ids = model.generate(**accepted, **settings)
    seconds, tokens = time.perf_counter() - since, inputs["input_ids"].shape[1]
    common.notes().print(f"[bold]{title}: {tokens:,} tokens in {seconds:.1f} s[/bold]")
    print(tokenizer.decode(ids[0], skip_special_tokens=True).strip(), flush=True)
