"""What is found in a long novel, in a chat, and what reading costs where nothing is asked: one reading, many questions.

    python recipes/reading.py --texts a_novel.txt,another.txt --lengths "4000,7500;12000,16000" --out reading

Eight facts, each stated once, before the first length of a group; the text is read on to the next length, and asked
again. See `LongText`. Dual chunk attention is the unmodified model up to 6,144 tokens of SmolLM2-135M-Instruct, so its
shortest row is the model's own. A run that was cut off goes on where it stopped: records are appended to
OUT/questions.jsonl, and OUT/questions.png shows them.

Cost: with that model and one CPU core a text of 16,000 tokens takes four minutes.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_longtrunc import DualChunkAttention, LMInfinite, TopBlocks, load_pretrained, trained_length
from hf_longtrunc.evaluation import Haystack, plot_questions, questions_table, run_questions


def main(
    texts: Annotated[str, typer.Option(help="Novels, separated by commas.")],
    lengths: Annotated[str, typer.Option(help="Tokens before a question; semicolons between texts.")] = "4000,7500",
    arms: Annotated[str, typer.Option(help="dual-chunk, both, blocks, chat, window")] = "dual-chunk,both",
    each: Annotated[int, typer.Option(help="Stretches of each novel.")] = 1,
    batteries: Annotated[str | None, typer.Option(help="Only these kinds of questions.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for questions.jsonl.")] = Path("reading"),
) -> None:
    language_model, tokenizer = load_pretrained(model)
    window = max(1, trained_length(language_model.config) // 4)
    known: dict[str, Any] = {
        "dual-chunk": DualChunkAttention(),
        "both": DualChunkAttention(retrieval=TopBlocks.for_chat(tokenizer)),
        "blocks": LMInfinite(window_length=window, retrieval=TopBlocks()),
        "chat": LMInfinite(window_length=window, retrieval=TopBlocks.for_chat(tokenizer)),
        "window": LMInfinite(window_length=window),
    }
    if unknown := set(arms.split(",")) - set(known):
        raise typer.BadParameter(f"--arms takes {', '.join(known)}; got {', '.join(sorted(unknown))}")
    haystacks = [Haystack(tokenizer, Path(text).read_text(encoding="utf-8")) for text in texts.split(",")]
    records = []
    for group, haystack in product(lengths.split(";"), haystacks):
        records += run_questions(
            language_model,
            haystack,
            [int(length) for length in group.split(",")],
            {name: known[name] for name in arms.split(",")},
            texts=each,
            seed=seed,
            batteries=None if batteries is None else batteries.split(","),
            path=out / "questions.jsonl",
            progress=True,
        )
    Console().print(questions_table(records))
    plot_questions(records)[0].figure.canvas.print_figure(out / "questions.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
