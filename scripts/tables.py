"""Write tables of docs/results from the records of docs/evidence; a test compares them.

    python scripts/tables.py

A table is found on its page by its header. Its cells are those of the table that a recipe printed, or means of its
records. Tables that join text with figures are written by hand, and a test looks each figure up in its record.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = Path(__file__).parent.parent / "docs"
RUNS = [json.loads(line) for line in (DOCS / "evidence" / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
Cells = dict[tuple[str, ...], dict[str, str]]


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        page: its name in docs/results.
        header: as on the page; the first cells head the rows' names.
        rows: the rows' names on the page -> their keys in the record.
        columns: the columns of the record for the cells behind the names.
        cells: of the record.
        shown: makes a cell of the page from one of the record.
        number: of the page's tables with this header, from 0 on.
    """

    page: str
    header: str
    rows: dict[str, tuple[str, ...]]
    columns: tuple[str, ...]
    cells: Cells
    shown: Callable[[str], str] = str
    number: int = 0

    def lines(self) -> list[str]:
        """Return the rows as the page has them."""
        lines = []
        for name, key in self.rows.items():
            cells = (self.shown(self.cells[key].get(column, "")) for column in self.columns)
            lines.append(f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |"))
        return lines

    def written(self, text: str) -> str:
        """Return the page's text with this table's rows."""
        start = 0
        for _ in range(self.number + 1):
            start = text.index(f"\n{self.header}\n", start) + 1
        end = text.index("\n\n", start)
        head = text[start:end].split("\n")[:2]
        return text[:start] + "\n".join([*head, *self.lines()]) + text[end:]


def printed(step: str, title: str, keys: int = 1) -> Cells:
    """Return a table that a step printed under a title: first cells of a row -> column -> cell."""
    (run,) = [each for each in RUNS if each["step"] == step][-1:]
    place = run["printed"].index(title)
    heads: list[list[str]] = []
    rows: list[list[str]] = []
    for line in run["printed"][place:].splitlines()[1:]:
        parts = [part.strip() for part in re.split("[│┃]", line)[1:-1]]
        if line.startswith("┃"):
            heads.append(parts)
        elif line.startswith("│"):
            if rows and not (parts[0] and parts[keys]):  # a cell of several lines
                rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], parts, strict=True)]
            else:
                rows.append(parts)
        elif line.startswith("└"):
            break
    names = [" ".join(filter(None, column)) for column in zip(*heads, strict=True)]
    return {tuple(row[:keys]): dict(zip(names, row, strict=True)) for row in rows}


def means(step: str, file: str, row: str, column: str) -> Cells:
    """Return the mean scores of a step's records by two of their fields, to two digits."""
    text = (DOCS / "evidence" / step / file).read_text(encoding="utf-8")
    found: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for record in map(json.loads, text.splitlines()):
        if "score" in record or "correct" in record:
            scores = found.setdefault((str(record[row]),), {}).setdefault(str(record[column]), [])
            scores.append(float(record["score"] if "score" in record else record["correct"]))
    return {key: {name: f"{sum(each) / len(each):.2f}" for name, each in cells.items()} for key, cells in found.items()}


def joined(left: Cells, right: Cells, between: str) -> Cells:
    """Return cells of two tables, written one behind the other."""
    return {key: {name: f"{cell}{between}{right[key][name]}" for name, cell in left[key].items()} for key in left}


def turned(cells: Cells) -> Cells:
    """Return a table with its rows as columns."""
    names = list(next(iter(cells.values())))
    return {(name,): {" ".join(key): row[name] for key, row in cells.items()} for name in names}


def by(rows: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return rows with keys of one cell."""
    return {name: (key,) for name, key in rows.items()}


def two_digits(cell: str) -> str:
    """Return a number to two digits, halves rounded up."""
    return f"{float(cell) + 1e-9:.2f}"


def main() -> None:
    """Write all tables."""
    for table in tables():
        path = DOCS / "results" / f"{table.page}.md"
        path.write_text(table.written(path.read_text(encoding="utf-8")), encoding="utf-8")


def tables() -> list[Table]:
    """Return the tables that are made."""
    return [*asking(), *adapters(), *packing(), *long_context(), *sampling()]


def asking() -> list[Table]:
    """Return the tables of results/asking.md."""
    kinds = {"words shared": "words shared", "none shared": "unshared"}
    rows = {}
    for name, kind in kinds.items():
        rows |= {f"{name}, {length} tokens": (kind, length) for length in ("7,500", "12,000", "16,000")}
        rows |= {f"{name}, fact at {at} of the text": (f"{kind}, at {at}", "all") for at in ("5%", "35%", "65%", "95%")}
        rows[f"{name}, all"] = (kind, "all")
    rows |= {
        "two places, `hops=1`": ("two hops", "all"),
        "nothing to do with the text": ("off-topic", "all"),
        "a person whom it does not name": ("unknown name", "all"),
        "a matter that it leaves unsaid": ("unsaid", "all"),
        "these three together": ("nothing answers", "all"),
    }
    cells = printed("asking", "right answers (strict)", keys=2)
    header = "| | `ask` | by meaning alone | by words alone | the fact in hand |"
    return [Table("asking", header, rows, ("ask", "encoder", "bm25", "oracle"), cells)]


def adapters() -> list[Table]:
    """Return the tables of results/adapters.md."""
    rows = {
        "model alone": "model alone",
        "**PEMA, constant 0.5**": "PEMA, constant 0.5",
        "PEMA, constant 0.7": "PEMA, constant 0.7",
        "P_PEMA alone": "PEMA alone",
        "PEMA, gradual unrolling from 0.9": "PEMA, gradual unrolling from 0.9",
        "model alone, 3 examples in the prompt": "model alone, 3 examples in the prompt",
    }
    cells = printed("pema", "Requests over unseen")
    return [
        Table(
            "adapters", "| arm | exact match | slots kept |", by(rows), ("exact match", "slots kept"), cells, two_digits
        )
    ]


def packing() -> list[Table]:
    """Return the tables of results/packing.md."""
    cells = printed("trl-packing", "CPU seconds to the first batch")
    for row in cells.values():
        lost, share = row["tokens lost"], row.pop("")
        row["tokens lost"] = lost if lost == "0" else f"{lost} ({share})"
    rows = {
        "TRL `bfd`, its default": "TRL bfd",
        "TRL `bfd_split`": "TRL bfd_split",
        "TRL `wrapped`, which cuts": "TRL wrapped",
        "`Dataset.map` as in run_clm.py, which cuts": "Dataset.map, as run_clm.py",
        "lightbinpack `obfd`, rows joined by numpy": "lightbinpack obfd, joined by numpy",
        "`pack(dataset)`, a view": "here, a view",
        "`pack(dataset).materialize()`, int32": "here, written",
        "`pack(stream)`": "here, a stream",
    }
    helps: Cells = {}
    for kind in ("code", "prose"):
        for key, row in printed("packing-helps", f"held-out documents, {kind}").items():
            helps.setdefault(key, {}).update({f"{kind} {name}": cell for name, cell in row.items()})
    arms = tuple(f"{kind} {arm} - cut" for kind in ("code", "prose") for arm in ("best-fit", "padding"))
    tokens = {name: name for name in ("1 to 15", "16 to 63", "64 to 127", "128 to 255", "all")}
    beside = "| | rows | full | tokens lost | seconds |"
    helped = "| tokens of the document | code: best fit | code: padding | prose: best fit | prose: padding |"
    return [
        Table("packing", beside, by(rows), ("rows", "full", "tokens lost", "seconds"), cells),
        Table("packing", helped, by(tokens), arms, helps),
    ]


def long_context() -> list[Table]:
    """Return the tables of results/long_context.md."""
    names = ("0-4,096", "4,096-8,192", "8,192-12,288", "12,288-16,384")
    header = "| | 0-4k | 4k-8k | 8k-12k | 12k-16k |"
    title = "perplexity by position"
    first = printed("dual-chunk", title) | printed("streaming-llm", title) | printed("dual-chunk-window", title)
    quarter, again, ours = "LM-Infinite, a quarter", "window re-computed", "dual chunk"
    rows = {
        "LM-Infinite, a quarter of the window": quarter,
        "StreamingLLM, the same window": "StreamingLLM, a quarter",
        "the unmodified model, its window read again": again,
        "**dual chunk attention**": ours,
    }
    second = printed("dual-chunk-2", title) | printed("dual-chunk-window-2", title)
    on_second = {name: key for name, key in rows.items() if key in (quarter, again, ours)}
    layer = printed("dual-chunk-cost", "one layer", keys=2)
    layers = {
        f"{name} | {length}": (key, length)
        for name, key, length in (
            ("a prompt", "prompt", "8,192"),
            ("a prompt", "prompt", "16,384"),
            ("a token", "token", "16,384"),
            ("a token that reads 384 chosen keys", "token, 384 keys chosen", "16,384"),
            ("a token", "token", "32,768"),
            ("a token that reads 384 chosen keys", "token, 384 keys chosen", "32,768"),
        )
    }
    index = {
        key: {"build": f"{row['build ms']} ms", "search": f"{row['search ms']} ms", "recall": row["recall"]}
        for key, row in printed("index-cost", "search of the best").items()
    }
    indexes = {"exact": "exact", "Flat": "Flat", "HNSW32 (looks at 2 k states)": "HNSW32"}
    indexes |= {name: name for name in ("IVF256,Flat:nprobe=16", "IVF256,Flat:nprobe=64")}
    facts = {
        '"The special magic number for X is: N"': "magic number",
        "a code, asked for in other words": "own words",
        "two numbers of one word, in two places": "two values",
        "one of four ships' numbers": "ship",
    }
    window = means("reading-window", "questions.jsonl", "battery", "arm")
    in_window = (
        "| | unmodified | with `TopBlocks.for_chat` | LM-Infinite, `TopBlocks.for_chat` | LM-Infinite, `TopBlocks()` |"
    )
    decoded = {name: name for name in ("LMInfinite", "StreamingLLM", "DualChunkAttention")}
    columns = ("keys", "unmodified", "patched", "ratio", "quartiles")
    full = {
        key: {**row, "full ms": f"{row['full ms']} ms"} for key, row in printed("attention-cost", "decode of").items()
    }
    for row in full.values():
        row |= {name: f"{row[name]} ms" for name in ("S + L keys ms", "LM-Infinite ms")}
    lengths = {length: length for length in ("4,096", "8,192", "16,384", "32,768")}
    keys = {length: length for length in ("32", "1,024", "65,536")}
    cut = ("truncated to 32", *(f"Unlimiformer, k = {k}" for k in (32, 8, 1)))
    scores = printed("ruler", "RULER: mean score", keys=2)
    ruler = {f"{task}, {length}": (task, length) for task, length in scores}
    return [
        Table("long_context", "| task, tokens | `ask` | by words alone |", ruler, ("ask", "bm25"), scores),
        Table("long_context", header, by(rows), names, first),
        Table("long_context", header, by(on_second), names, second, number=1),
        Table("long_context", "| | keys | by full attention |", layers, ("by full attention",), layer),
        Table("long_context", "| index | build | search | recall |", by(indexes), ("build", "search", "recall"), index),
        Table("long_context", in_window, by(facts), ("dual-chunk", "both", "chat", "blocks"), window),
        Table(
            "long_context", f"| | {' | '.join(columns)} |", by(decoded), columns, printed("decode-cost", "one decoded")
        ),
        Table(
            "long_context",
            "| n | full SDPA | SDPA over S + L keys | LM-Infinite |",
            by(lengths),
            ("full ms", "S + L keys ms", "LM-Infinite ms"),
            full,
        ),
        Table(
            "long_context",
            "| tokens | cut to 32 | k = 32 | k = 8 | k = 1 |",
            by(keys),
            cut,
            printed("unlimiformer", "passkeys found"),
        ),
    ]


def sampling() -> list[Table]:
    """Return the tables of results/sampling.md."""
    sizes = {f"{size} x {batch}": f"{size} x {batch}" for size in ("49,152", "128,256") for batch in (1, 8)}
    header = (
        "| V x batch | softmax | top-h | transformers' | the same, all tokens | min-k | by a sort | XTC | by a sort | "
        "DRY | by a loop |"
    )
    columns = (
        *("softmax", "top-h", "transformers' top-h", "transformers' top-h, all tokens", "min-k", "min-k by a sort"),
        *("XTC", "XTC by a sort", "DRY", "DRY by a loop"),
    )
    ranks = turned(printed("ranks-cost", "milliseconds a call"))
    written: dict[str, Cells] = {
        heat: printed("sampler-battery", f"continuations of 128 tokens at temperature {heat},")
        for heat in ("1", "0.7", "1.3")
    }
    loss, repeated, apart = "loss less the author's", "4-grams said before", "frontier less eta's"
    written["1"]["eta",][apart] = ""
    others = {
        key: {f"{name} at {heat}": cell for heat in ("0.7", "1.3") for name, cell in written[heat][key].items()}
        for key in written["0.7"]
    }
    names = {"the author": "human", "no sampler": "none"}
    names |= {name: name for name in ("eta", "epsilon", "top-n-sigma", "p-less", "top-p", "top-k", "min-p", "typical")}
    names["top-h"] = "top-h"
    at_one = f"| at temperature 1 | {loss}, nats | distinct 3-grams in ten | {repeated} | frontier | less eta's |"
    at_others = f"| | {loss} at 0.7 | {repeated} | frontier | {loss} at 1.3 | frontier |"
    shown = (f"{loss} at 0.7", f"{repeated} at 0.7", "frontier at 0.7", f"{loss} at 1.3", "frontier at 1.3")
    first = (loss, "distinct 3-grams", repeated, "frontier", apart)
    return [
        Table("sampling", header, by(sizes), columns, ranks),
        Table("sampling", at_one, by({**names, "BAT on eta": "BAT on eta"}), first, written["1"]),
        Table("sampling", at_others, by(names), shown, others),
    ]


if __name__ == "__main__":
    main()
