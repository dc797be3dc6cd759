"""Whether the blocks that a chat's question selects hold its answer, with instructions after the question.

    python recipes/block_choice.py --texts a_novel.txt,another.txt --out blocks

A text of `FactText` and a question about it are one user turn, read under LM-Infinite with `TopBlocks.for_chat`
("turn") and with the twelve rows before the template's ending alone ("last 12 rows"). Each fact whose question shares
words with it is asked for without an instruction, and with three of twelve after it, other ones than the next fact;
questions that the text does not answer are asked without. A run that was cut off goes on where it stopped.

Cost: with SmolLM2-135M-Instruct on one CPU core a text of 7,500 tokens takes 9 minutes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from tqdm import tqdm

from hf_longtrunc import LMInfinite, TopBlocks, load_pretrained
from hf_longtrunc.evaluation import wilson_interval
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.records import Journal, ModelRecord, model_settings, read_records
from hf_longtrunc.evaluation.streaming import read_ahead
from hf_longtrunc.models import CACHE, decoder_of
from instruments.fact_text import NOTHING, SHARED, FactText
from instruments.facts import TRAILING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

SINKS, WINDOW = 16, 2048
ARMS: dict[str, dict[str, Any]] = {"turn": {}, "last 12 rows": {"question_rows": None, "voting_rows": 12}}
# An emphasis without an upper bound is the square of a block's contrast; blocks of any contrast are recorded.
RECORDED = {"emphasis": 1e9, "least_contrast": 1e-6}
LEAST = {"turn": 3.0, "last 12 rows": 1.5}  # contrast of a block that is read
EVERY = 4  # three of twelve instructions follow a fact, other ones than the next fact


@dataclass(frozen=True, kw_only=True)
class ChoiceRecord(ModelRecord):
    """One question: the contrast of its four best blocks, at least 1, and the place of its fact's block among them."""

    arm: str
    filler: str
    part: str
    length: int
    trial: int
    kind: str
    depth: float
    question: str
    ending: str
    contrasts: list[float]
    place: int | None

    @property
    def selected(self) -> int:
        """How many blocks `TopBlocks.for_chat` reads."""
        return sum(contrast >= LEAST[self.arm] for contrast in self.contrasts)

    @property
    def is_right(self) -> bool:
        """Whether the fact's block is among them."""
        return self.place is not None and self.place < self.selected


def main(
    texts: Annotated[str, typer.Option(help="Novels, separated by commas.")],
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 7500,
    each: Annotated[int, typer.Option(help="Texts of each novel.")] = 1,
    part: Annotated[str, typer.Option(help="Whose phrasings: choose or report.")] = "report",
    arms: Annotated[str, typer.Option(help=", ".join(ARMS))] = ",".join(ARMS),
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of blocks.jsonl.")] = Path("blocks"),
) -> None:
    torch.set_num_threads(1)
    loaded, tokenizer = load_pretrained(model)
    journal = Journal(out / "blocks.jsonl", ChoiceRecord, ("contrasts", "place"))
    for name in texts.split(","):
        novel = Path(name).read_text(encoding="utf-8")
        for trial in range(each):
            text = FactText(novel, tokenizer, length, trial, part=part)
            where = {"filler": Path(name).stem, "part": part, "length": length, "trial": trial}
            for arm in arms.split(","):
                retrieval = TopBlocks.for_chat(tokenizer, **RECORDED, **ARMS[arm])
                technique = LMInfinite(num_sink_tokens=SINKS, window_length=WINDOW, retrieval=retrieval)
                with technique(loaded):
                    ask_all(loaded, tokenizer, text, retrieval, {"arm": arm, **where}, journal)
    Console(width=100).print(table_of(read_records(out / "blocks.jsonl", ChoiceRecord)))


def ask_all(
    model: Any, tokenizer: Any, text: FactText, retrieval: TopBlocks, where: dict[str, Any], journal: Journal[Any]
) -> None:
    """Read a text once, and note what each of its questions selects."""
    fixed = {**where, **model_settings(model)}
    facts = [question for question in text.questions if question.kind in SHARED]
    asked = [(q, ending) for n, q in enumerate(facts) for ending in ["", *TRAILING[n % EVERY :: EVERY]]]
    asked += [(question, "") for question in text.questions if question.kind in NOTHING]
    read: Any = None
    ids = encoded(tokenizer, text.text, "Q").input_ids
    held_back = len(ids) - retrieval.query_rows(len(ids), is_scoring=True)
    for question, ending in tqdm(asked, desc=where["arm"]):
        plan = {"kind": question.kind, "depth": question.depth, "question": question.text, "ending": ending, **fixed}
        if journal.get(**plan) is not None:
            continue
        if read is None:
            read = read_ahead(model, torch.tensor([ids[:held_back]]))
        made = encoded(tokenizer, text.text, f"{question.text} {ending}".strip())
        cache = copy.deepcopy(read)
        with torch.no_grad():
            decoder_of(model)(torch.tensor([made.input_ids[held_back:]]), use_cache=True, **{CACHE: cache})
        selection = cache.layers[-1].selection
        blocks, contrasts = selection.indices[0].tolist(), selection.emphasis[0].sqrt().tolist()
        place = None
        if question.stated:
            start = made.text.index(question.stated[0])
            end = start + len(question.stated[0])
            inside = [at for at, (begin, stop) in enumerate(made.offset_mapping) if begin < end and stop > start]
            right = {(at - SINKS) // retrieval.block_size for at in (inside[0], inside[-1])}
            place = next((at for at, block in enumerate(blocks) if block in right), None)
        journal.add(ChoiceRecord(**plan, contrasts=[round(each, 3) for each in contrasts], place=place))


def encoded(tokenizer: Any, text: str, question: str) -> Any:
    """Return the tokens of a user's turn and their places in its `text`."""
    messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    made = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    made.text = rendered
    return made


def table_of(records: Sequence[ChoiceRecord]) -> Table:
    """Lay shares out with 95 % intervals: right block selected, and the first; any block where nothing answers."""
    arms = list(dict.fromkeys(record.arm for record in records))
    table = new_table("questions", "counted", title="blocks that a question selects: share (95 %, n)")
    for arm in arms:
        table.add_column(arm, justify="right")
    facts, nothing = ([r for r in records if (r.kind in NOTHING) is is_nothing] for is_nothing in (False, True))
    plain, tailed = ([r for r in facts if bool(r.ending) is has_ending] for has_ending in (False, True))
    rows: list[tuple[str, str, list[ChoiceRecord], Callable[[ChoiceRecord], bool]]] = [
        (name, counted, some, counts)
        for name, some in (("a fact", plain), ("a fact, an instruction after it", tailed))
        for counted, counts in (
            ("its block is selected", lambda r: r.is_right),
            ("it is the first", lambda r: r.is_right and r.place == 0),
        )
    ]
    rows.append(("nothing answers", "blocks are selected", nothing, lambda r: r.selected > 0))
    for name, counted, some, counts in rows:
        cells = []
        for arm in arms:
            own = [counts(record) for record in some if record.arm == arm]
            share = sum(own) / max(1, len(own))
            low, high = wilson_interval(share, max(1, len(own)))
            cells.append(f"{share:.2f} ({low:.2f}-{high:.2f}, {len(own)})")
        table.add_row(name, counted, *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
