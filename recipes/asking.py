"""What `ask` finds and answers in long novels, beside each of its finders alone, and with the fact in hand.

    python recipes/asking.py --texts a_novel.txt,another.txt --lengths 7500,12000,16000 --each 4 --out asking

Every text holds a fact of each kind, and others of its kind about other people; see `FactText`. All arms have one
prompt. Settings were chosen on `--part choose`, which has other phrasings than `--part report`, and on other novels. A
run that was cut off goes on where it stopped: records are appended to OUT/records.jsonl.

Cost: with SmolLM2-135M-Instruct on one idle CPU core a text of 16,000 tokens takes half a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from hf_longtrunc import BM25, Fused, SentenceEncoder, load_encoder, load_pretrained
from hf_longtrunc.asking.passages import CONTEXT
from instruments.fact_text import KINDS, SHARED
from instruments.find_and_read import find_and_read_table, paired_test, run_find_and_read, turns_test

if TYPE_CHECKING:
    from collections.abc import Sequence


class Remembering(SentenceEncoder):
    """Encodes no text twice: stretches of a novel share most sentences."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._known: dict[str, torch.Tensor] = {}

    def encode(
        self, texts: Sequence[str], *, dtype: torch.dtype = torch.float32, progress: bool = False
    ) -> torch.Tensor:
        """Return each text's vector, remembered or computed."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, super().encode(new, progress=progress), strict=True))
        return torch.stack([self._known[text] for text in texts]).to(dtype)


def main(
    texts: Annotated[str, typer.Option(help="Novels, separated by commas.")],
    lengths: Annotated[str, typer.Option(help="Tokens of a text.")] = "7500,12000,16000",
    arms: Annotated[
        str, typer.Option(help="ask, finder (ask without the re-ranker), encoder, bm25")
    ] = "ask,encoder,bm25",
    each: Annotated[int, typer.Option(help="Texts of each novel and length.")] = 3,
    part: Annotated[str, typer.Option(help="Whose phrasings: choose or report.")] = "report",
    read: Annotated[bool, typer.Option(help="Let the model answer; --no-read asks the finders alone.")] = True,
    trailing: Annotated[bool, typer.Option("--trailing", help="Each question with 12 instructions.")] = False,
    conversations: Annotated[bool, typer.Option("--conversations", help="Four questions as turns too.")] = False,
    kinds: Annotated[str, typer.Option(help="Of questions.")] = ",".join(KINDS),
    count: int = 1,
    context: int = CONTEXT,
    hops: int = 1,
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Hub id or folder; all-MiniLM-L6-v2 if left out.")] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for records.jsonl.")] = Path("asking"),
) -> None:
    torch.set_num_threads(1)
    language_model, tokenizer = load_pretrained(model)
    by_meaning = Remembering(*load_encoder(encoder))
    alone = Remembering(by_meaning.model, by_meaning.tokenizer, threshold=-1, least_relevance=-3)  # nothing is refused
    alone.encode = by_meaning.encode  # type: ignore[method-assign]
    known: dict[str, Any] = {
        "ask": Fused(by_meaning, BM25()),
        "finder": Fused(by_meaning, BM25()),
        "encoder": alone,
        "bm25": BM25(threshold=0),
    }
    known["bm25"].least_relevance = -1.0
    if unknown := set(arms.split(",")) - set(known):
        raise typer.BadParameter(f"--arms takes {', '.join(known)}; got {', '.join(sorted(unknown))}")
    records = run_find_and_read(
        language_model,
        tokenizer,
        {Path(text).stem: Path(text).read_text(encoding="utf-8") for text in texts.split(",")},
        [int(length) for length in lengths.split(",")],
        {name: known[name] for name in arms.split(",")},
        texts=each,
        part=part,
        seed=seed,
        read=read,
        trailing=trailing,
        conversations=conversations,
        kinds=kinds.split(","),
        count=count,
        context=context,
        hops=hops,
        reranked=("ask",),
        path=out / "records.jsonl",
        progress=True,
    )
    console = Console(width=None if Console().is_terminal else 200)
    console.print(find_and_read_table(records))
    first, *others = arms.split(",")
    for name, among in {"words shared": SHARED, "none shared": ("unshared",)}.items() if read else ():
        some = [record for record in records if record.kind in among and record.turn == 1]
        for other in [*others, "oracle"] if some else []:
            better, worse, p = paired_test(some, first, other)
            console.print(f"{name}: right under {first} alone {better}, {other} alone {worse}, McNemar p = {p:.3g}")
    if conversations:
        better, worse, p = turns_test(records, first)
        console.print(f"turns 2 to 4: right as a turn alone {better}, as a first question alone {worse}, p = {p:.3g}")


if __name__ == "__main__":
    typer.run(main)
