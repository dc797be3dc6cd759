"""What is found in a long novel, in a chat, and what reading costs where nothing is asked: one reading, many questions.

    python recipes/reading.py --text a_novel.txt --lengths 4000,12000 --arms dual-chunk,blocks --out reading

Sixteen facts, each stated once, and two right before their question; see `LongText`. Dual chunk attention is the
unmodified model up to 6,144 tokens of SmolLM2-135M-Instruct, so its shortest row is the model's own. A run that was cut
off goes on where it stopped: records are appended to OUT/questions.jsonl.

Cost: with that model and one CPU core a text of 4,000 tokens takes one and a half minutes, of 16,000 six.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_longtrunc import DualChunkAttention, LMInfinite, TopBlocks, load_pretrained, trained_length
from hf_longtrunc.evaluation import Haystack, questions_table, run_questions


def main(
    text: Annotated[Path, typer.Option(help="A novel.")],
    lengths: Annotated[str, typer.Option(help="Tokens before a question.")] = "4000,12000",
    arms: Annotated[str, typer.Option(help="dual-chunk, blocks, chat, window")] = "dual-chunk,blocks",
    texts: Annotated[int, typer.Option(help="Stretches of the novel a length.")] = 1,
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for questions.jsonl.")] = Path("reading"),
) -> None:
    language_model, tokenizer = load_pretrained(model)
    window = max(1, trained_length(language_model.config) // 4)
    known: dict[str, Any] = {
        "dual-chunk": DualChunkAttention(),
        "blocks": LMInfinite(window_length=window, retrieval=TopBlocks()),
        "chat": LMInfinite(window_length=window, retrieval=TopBlocks.for_chat(tokenizer)),
        "window": LMInfinite(window_length=window),
    }
    if unknown := set(arms.split(",")) - set(known):
        raise typer.BadParameter(f"--arms takes {', '.join(known)}; got {', '.join(sorted(unknown))}")
    haystack = Haystack(tokenizer, text.read_text(encoding="utf-8"))
    records = run_questions(
        language_model,
        haystack,
        [int(length) for length in lengths.split(",")],
        {name: known[name] for name in arms.split(",")},
        texts=texts,
        seed=seed,
        path=out / "questions.jsonl",
        progress=True,
    )
    Console().print(questions_table(records))


if __name__ == "__main__":
    typer.run(main)
