"""What a saved model's card says about how it was made and how to decode it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

BEGIN, END = "<!-- hf_longtrunc: begin -->", "<!-- hf_longtrunc: end -->"


@dataclass(frozen=True)
class Paper:
    """A method's paper, as the card cites it."""

    method: str
    authors: str
    year: int
    title: str
    arxiv: str


_ETA = Paper("eta-sampling", "Hewitt et al.", 2022, "Truncation Sampling as Language Model Desmoothing", "2210.15191")
_BAT = Paper(
    "basis-aware truncation",
    "Finlayson et al.",
    2023,
    "Closing the Curious Case of Neural Text Degeneration",
    "2310.01693",
)
_LM_INFINITE = Paper(
    "LM-Infinite",
    "Han et al.",
    2024,
    "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models",
    "2308.16137",
)
_PACKING = Paper("best-fit packing", "Ding et al.", 2024, "Fewer Truncations Improve Language Modeling", "2404.10830")
PAPERS = {
    "EtaLogitsProcessor": _ETA,
    "EpsilonLogitsProcessor": _ETA,
    "BasisAwareLogitsProcessor": _BAT,
    "LMInfinite": _LM_INFINITE,
    "BestFitPackingCollator": _PACKING,
    "PackedDataset": _PACKING,
    "pack": _PACKING,
}


def update_model_card(
    folder: str | os.PathLike[str], techniques: Sequence[object], *, records: Iterable[Any] = ()
) -> Path:
    """Write into a saved model's README.md what it was made with, how to decode it and what was measured.

    Everything stands in one section between two markers, which a second call replaces; the rest of the card and its
    metadata stay, and the tag `hf_longtrunc` is added. A card that is not there yet is begun.

    Args:
        folder: of the saved model.
        techniques: what was used in training or is meant for decoding: the objects themselves (`LMInfinite(...)`,
            `EtaLogitsProcessor(2e-3)`, a collator), classes or functions of this package.
        records: instances of one dataclass of plain values, e.g. `PerplexityRecord`; they become a table.

    Returns:
        The card's path.

    Raises:
        NotADirectoryError: `folder` is none.
        ValueError: a technique is not one of this package's, or records of several kinds.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"folder must be that of a saved model, {str(folder)!r} is none: save the model first")
    section = "\n\n".join([BEGIN, "## hf_longtrunc", _methods(techniques), *_figures(list(records)), END])
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Model card\n"
    card: Any = ModelCard(text if text.startswith("---\n") else f"---\nlibrary_name: transformers\n---\n\n{text}")
    card.data.tags = [*dict.fromkeys([*(card.data.tags or []), "hf_longtrunc"])]
    old = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if old.search(card.text):
        card.text = old.sub(lambda match: section, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    path.write_text(f"---\n{card.data.to_yaml()}\n---\n\n{card.text.lstrip()}", encoding="utf-8")
    return path


def _methods(techniques: Sequence[object]) -> str:
    lines = []
    for technique in techniques:
        name, settings = _name(technique)
        if name not in PAPERS:
            raise ValueError(
                f"techniques: {technique!r} is none of hf_longtrunc's with a paper; there are {', '.join(PAPERS)}"
            )
        paper = PAPERS[name]
        source = f"{paper.authors} {paper.year}, [{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
        lines.append(f"- {paper.method}: `{settings}` ({source})")
    return "\n".join(lines)


def _name(technique: object) -> tuple[str, str]:
    """Return a technique's name, and how its settings are written if it says so itself."""
    name = getattr(technique, "__name__", None)
    if name is not None:
        return name, name
    name = type(technique).__name__
    return name, name if type(technique).__repr__ is object.__repr__ else repr(technique)


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
