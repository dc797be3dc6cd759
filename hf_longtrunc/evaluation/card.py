"""A section of a saved model's card: techniques with settings and papers, and measurements."""

from __future__ import annotations

import csv
import re
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard

from hf_longtrunc.handles import Handle
from hf_longtrunc.saving import replacing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

BEGIN, END = "<!-- hf_longtrunc: begin -->", "<!-- hf_longtrunc: end -->"


@dataclass(frozen=True)
class Paper:
    """A method's paper, as the card cites it."""

    method: str
    authors: str
    year: str
    title: str
    arxiv: str


def _papers() -> dict[str, Paper]:
    """Return the paper of each public name of a method, from papers.csv beside this file."""
    table = resources.files("hf_longtrunc.evaluation").joinpath("papers.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    return {name: Paper(**row) for row in rows for name in row.pop("names").split()}


PAPERS = _papers()


def update_model_card(
    folder: str | os.PathLike[str], techniques: Sequence[object], *, records: Iterable[Any] = ()
) -> Path:
    """Write a section about techniques and measurements into the README.md of a saved model.

    The section lies between two markers; a second call replaces it. The rest of the card and its metadata stay, and
    the tag `hf_longtrunc` is added. If there is no card, one is created.

    Args:
        folder: of the saved model.
        techniques: objects (`LMInfinite(...)`, `EtaLogitsProcessor(2e-3)`), handles, or classes and functions of this
            package. Each gets a line with its method, settings and paper.
        records: instances of one dataclass of plain values, such as `PerplexityRecord`: the rows of a table.

    Returns:
        The card's path.

    Raises:
        NotADirectoryError: `folder` is no folder.
        ValueError: a technique without a paper in this package, or records of several classes.

    Examples:
        >>> import tempfile
        >>> from hf_longtrunc import EtaLogitsProcessor
        >>> card = update_model_card(tempfile.mkdtemp(), [EtaLogitsProcessor(2e-3)])
        >>> [line[:44] for line in card.read_text().splitlines() if line.startswith("-") and "eta" in line]
        ['- eta-sampling: `EtaLogitsProcessor(epsilon=']
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"folder must be that of a saved model, {str(folder)!r} is none: save the model first")
    methods = "\n".join(map(_line, techniques))
    section = "\n\n".join([BEGIN, "## hf_longtrunc", methods, *_figures(list(records)), END])
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Model card\n"
    card: Any = ModelCard(text if text.startswith("---\n") else f"---\nlibrary_name: transformers\n---\n\n{text}")
    card.data.tags = [*dict.fromkeys([*(card.data.tags or []), "hf_longtrunc"])]
    old = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if old.search(card.text):
        card.text = old.sub(lambda match: section, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    with replacing(path) as written:
        written.write_text(f"---\n{card.data.to_yaml()}\n---\n\n{card.text.lstrip()}", encoding="utf-8")
    return path


def _line(technique: object) -> str:
    if isinstance(technique, Handle):
        technique = technique.technique
    named = technique if isinstance(technique, type) or hasattr(technique, "__name__") else type(technique)
    kinds: Sequence[Any] = named.__mro__ if isinstance(named, type) else [named]  # a subclass is what it derives from
    ours = [kind.__name__ for kind in kinds if kind.__module__.startswith("hf_longtrunc.") and kind.__name__ in PAPERS]
    if not ours:
        raise ValueError(
            f"techniques: {technique!r} is none of hf_longtrunc's with a paper; there are {', '.join(PAPERS)}"
        )
    paper = PAPERS[ours[0]]
    source = f"{paper.authors} {paper.year}, [{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
    return f"- {paper.method}: `{_settings(technique)}` ({source})"


def _settings(technique: Any) -> str:
    """Return a function's or class's name, else a one-line repr without addresses; a module is its class's name."""
    if hasattr(technique, "__name__"):
        return str(technique.__name__)
    kind: Any = type(technique)
    says_nothing = kind.__repr__ is object.__repr__ or isinstance(technique, torch.nn.Module)
    shown = kind.__name__ if says_nothing else repr(technique)
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", shown).replace("`", "'").split())


def _figures(records: list[Any]) -> list[str]:
    if not records:
        return []
    if len({type(record) for record in records}) != 1:
        raise ValueError(f"records must be of one kind, got {sorted({type(record).__name__ for record in records})}")
    columns = list(asdict(records[0]))
    rows = [columns, ["---"] * len(columns)]
    rows += [[_cell(value) for value in asdict(record).values()] for record in records]
    return ["\n".join("| " + " | ".join(row) + " |" for row in rows)]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
