"""Where an answer read, as one page for a browser: the data that `trace.html` shows."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from hf_longtrunc.page import write
from hf_longtrunc.pieces import pieces

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

_CELLS = 600  # of a strip: more could not be seen apart
_PARTS = 100_000  # in which shares are written
_NOT_SEEN = -1


def write_page(
    path: Path,
    tokenizer: Any,
    ids: list[int],
    prompt_length: int,
    read: Sequence[tuple[Tensor, Tensor | None]],
    stretch: int,
    prompt: str,
) -> Path:
    """Write the page of one answer; see `AttentionTrace.to_html`.

    `read` has for each token of the answer the mass of each stretch [stretches], and the chosen blocks [blocks, 2].
    """
    joined = -(-len(read[-1][0]) // _CELLS)  # stretches a cell
    cell = stretch * joined
    texts = list(pieces(tokenizer, ids))
    data = {
        "prompt": prompt,
        "cell": cell,
        "length": len(ids),
        "first": prompt_length,
        "parts": _PARTS,
        "words": ["".join(texts[start : start + cell]) for start in range(0, len(ids), cell)],
        "answer": [
            {"text": text, "mass": _cells(mass, joined), "blocks": _blocks(blocks)}
            for text, (mass, blocks) in zip(texts[prompt_length:], read, strict=True)
        ],
    }
    content = resources.files("hf_longtrunc.attention").joinpath("trace.html").read_text(encoding="utf-8")
    return write(path, content, data, title="Where the answer read", prompt=prompt)


def _cells(mass: Tensor, joined: int) -> list[int]:
    """Return whole parts of the attention for each cell, and -1 where nothing was to be seen."""
    padded = mass.new_zeros(-(-len(mass) // joined) * joined)
    padded[: len(mass)] = mass
    return [_NOT_SEEN if share == 0 else round(share * _PARTS) for share in padded.view(-1, joined).sum(1).tolist()]


def _blocks(blocks: Tensor | None) -> list[list[int]]:
    """Return the blocks that were chosen, each once, from start to stop."""
    chosen = [] if blocks is None else blocks.tolist()
    return [[start, stop] for start, stop in chosen if stop]
