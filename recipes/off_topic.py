"""How often a question of general knowledge has a passage in a novel: the false alarms of a finder's threshold.

    python recipes/off_topic.py --texts bleak_house.txt,moby_dick.txt --out off-topic

Asks 60 questions of two stretches of each text and keeps the best score of each, so that every threshold can be judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from hf_longtrunc import TextIndex
from hf_longtrunc.asking.answers import default_finder
from hf_longtrunc.evaluation import wilson_interval
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.records import append_records

PLACES = (0.1, 0.6)  # where a stretch begins, as a share of the text
QUESTIONS = """
What is the capital of Peru?
Who painted the Mona Lisa?
How many planets are in the solar system?
What is the chemical symbol for gold?
Who wrote Don Quixote?
What is the tallest mountain on earth?
When did the Second World War end?
What is the square root of 144?
Which language is spoken in Brazil?
How many legs does a spider have?
Who discovered penicillin?
What is photosynthesis?
Which planet is the largest?
What is the boiling point of water?
Who was the first man on the moon?
What is the currency of Japan?
How many bones are in the human body?
What is the speed of light?
Who composed the Ninth Symphony?
Which ocean is the deepest?
How do I install Python on Windows?
What is the difference between a list and a tuple?
How long should I boil an egg?
What is a good recipe for pancakes?
How do vaccines work?
What causes inflation?
Who won the World Cup in 1998?
What is the population of Canada?
How far is the moon from the earth?
What is machine learning?
Which element has the atomic number 6?
What does DNA stand for?
How do I reset my router?
What is the best way to learn guitar?
Who founded Microsoft?
What is the largest desert?
Which country has the most inhabitants?
How many strings does a violin have?
What is the freezing point of mercury?
When was the printing press invented?
Who was the president of the United States in 1940?
What is the longest river in Africa?
What does a thermometer measure?
Which gas do plants absorb?
How many minutes are in a day?
What is the capital of Australia?
Who developed the theory of relativity?
What is an atom made of?
How do airplanes fly?
What is the meaning of the word ubiquitous?
Which vitamin does the sun help to make?
How many sides has a hexagon?
What is the national dish of Italy?
Why is the sky blue?
Who invented the telephone?
What are the primary colours?
How is glass made?
What is a black hole?
When did the Berlin Wall fall?
Which metal is liquid at room temperature?
""".strip().splitlines()


@dataclass(frozen=True)
class OffTopicRecord:
    """The score of the passage that a question would have without a threshold; 0 if names refuse it."""

    text: str
    place: float
    question: str
    score: float


def main(
    texts: Annotated[str, typer.Option(help="Novels, separated by commas.")],
    characters: Annotated[int, typer.Option(help="Of a stretch.")] = 52_000,
    out: Annotated[Path, typer.Option(help="Folder for records.jsonl.")] = Path("off-topic"),
) -> None:
    torch.set_num_threads(1)
    finder, records = default_finder(), []
    threshold, finder.threshold = finder.threshold, -1.0
    for path in map(Path, texts.split(",")):
        text = path.read_text(encoding="utf-8")
        for place in PLACES:
            start = int(place * len(text))
            index = TextIndex(text[start : start + characters], finder)
            for question in QUESTIONS:
                found = index.find(question)
                records.append(OffTopicRecord(path.stem, place, question, round(found[0].score, 4) if found else 0.0))
    append_records(out / "records.jsonl", records)
    table = new_table("score above", "share", "95 % interval", "n", title="questions of general knowledge with a unit")
    for score in sorted({0.3, 0.32, 0.34, 0.36, 0.38, 0.4, threshold}):
        share = sum(record.score > score for record in records) / len(records)
        low, high = wilson_interval(share, len(records))
        default = " (default)" * (score == threshold)
        table.add_row(f"{score}{default}", f"{share:.3f}", f"{low:.3f}-{high:.3f}", f"{len(records)}")
    Console(width=None if Console().is_terminal else 100).print(table)


if __name__ == "__main__":
    typer.run(main)
