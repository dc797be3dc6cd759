"""Draw pictures of the pages into docs/assets: a mask, packed rows, samplers, perplexity, facts found.

    python scripts/pictures.py

Plain SVG on a white card: they look the same in the light and the dark theme. The rows are packed by this package; the
last two, and the heat maps of docs/evidence, are drawn from records.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_longtrunc import best_fit_decreasing

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
from instruments.heat_maps import plot_scores  # noqa: E402

DOCS = ROOT / "docs"
FOLDER = DOCS / "assets"
INK, FAINT, TEAL, ORANGE, BLUE, RED = "#1f2933", "#e4e7eb", "#00796b", "#c2410c", "#1d4ed8", "#b91c1c"
SHADES = ("#0f766e", "#1d4ed8", "#7c3aed", "#b45309", "#0369a1", "#4d7c0f", "#be185d", "#475569")


def main() -> None:
    """Draw all pictures."""
    for name, picture in schematic().items():
        (FOLDER / f"{name}.svg").write_text(picture, encoding="utf-8")
    heat_maps()


def schematic() -> dict[str, str]:
    """Return the SVGs by name."""
    return {
        "lm_infinite_mask": mask(),
        "packing_rows": rows(),
        "eta_cut": eta(),
        "bat_kept": bat(),
        "dual_chunk_perplexity": perplexity(),
    }


def mask(tokens: int = 24, window: int = 7, sinks: int = 3, cell: int = 15) -> str:
    """Return the mask of LM-Infinite, a cell a pair of tokens."""
    parts = [text(84, 24, "keys", bold=True), text(8, 50, "queries", bold=True)]
    for query in range(tokens):
        for key in range(tokens):
            is_near, is_sink = query - key < window, key < sinks
            colour = FAINT if key > query or not (is_near or is_sink) else TEAL if is_near else ORANGE
            parts.append(box(84 + key * cell, 36 + query * cell, cell - 1, cell - 1, colour))
    left = 84 + tokens * cell + 24
    legend = [
        (TEAL, "seen in the window, at its true distance"),
        (ORANGE, "sinks: seen at the fixed distance D"),
        (FAINT, "not seen"),
    ]
    for line, (colour, words) in enumerate(legend):
        parts += [box(left, 60 + 30 * line, 16, 16, colour), text(left + 24, 73 + 30 * line, words)]
    words = [
        f"S = {sinks} sinks, window L = {window} tokens.",
        "Each row has at most S + L keys,",
        "however long the text is.",
    ]
    parts += [text(left, 180 + 20 * line, each) for line, each in enumerate(words)]
    return svg(left + 320, 36 + tokens * cell + 16, parts)


def rows(length: int = 32, cell: int = 21) -> str:
    """Return the same documents in rows: padded, concatenated and cut, packed by best fit."""
    documents = [20, 9, 27, 5, 14, 12, 23, 7, 18, 6, 11, 8]
    padded = [[(number, size, False)] for number, size in enumerate(documents)]
    cut: list[list[tuple[int, int, bool]]] = [[]]
    for number, size in enumerate(documents):
        while size:
            free = length - sum(piece[1] for piece in cut[-1])
            if not free:
                cut.append([])
                continue
            taken = min(size, free)
            cut[-1].append((number, taken, taken < size))
            size -= taken
    plan = best_fit_decreasing(documents, length)
    packed = [plan.document[plan.row(row)].tolist() for row in range(len(plan))]
    fitted = [[(number, documents[number], False) for number in row] for row in packed]
    parts, top = [], 12
    for name, filled in (("padding", padded), ("concatenate and cut", cut), ("best-fit packing", fitted)):
        wasted = 1 - sum(documents) / (len(filled) * length)
        cuts = len({number for row in filled for number, _, is_cut in row if is_cut})
        words = f"{len(filled)} rows, {wasted:.0%} empty, {cuts} of {len(documents)} documents cut"
        parts += [text(8, top + 14, name, bold=True), text(200, top + 14, words)]
        top += 24
        for row in filled:
            parts.append(box(8, top, length * cell, 12, FAINT))
            left: float = 8
            for number, size, is_cut in row:
                parts.append(box(left, top, size * cell - 1, 12, SHADES[number % len(SHADES)]))
                left += size * cell
                if is_cut:
                    parts.append(box(left - 4, top - 2, 4, 16, RED))
            top += 16
        top += 14
    return svg(length * cell + 16, top, parts)


def eta(epsilon: float = 8e-3) -> str:
    """Return a sure and an unsure distribution with eta's thresholds."""
    parts = []
    for panel, (name, decay) in enumerate((("a sure step", 1.9), ("an open continuation", 0.085))):
        weights = [math.exp(-decay * rank) + 6e-5 for rank in range(60)]
        probabilities = [weight / sum(weights) for weight in weights]
        entropy = -sum(p * math.log(p) for p in probabilities)
        threshold = min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))
        parts += bars(
            panel, f"{name}: entropy {entropy:.1f} nats", probabilities, [p >= threshold for p in probabilities]
        )
        y = height(threshold)
        parts.append(line(panel, y, ORANGE))
        parts.append(text(270 + 400 * panel, y + (-6 if threshold == epsilon else 16), f"eta {threshold:.1e}"))
        y = height(epsilon)
        if threshold < epsilon:
            parts += [line(panel, y, INK, dash=True), text(270 + 400 * panel, y - 6, f"epsilon {epsilon:.1e}")]
    words = "Green: kept; grey: cut. Tokens by decreasing probability, on a logarithmic scale."
    return svg(800, 300, [*parts, text(20, 290, words)])


def bat(threshold: float = 8e-3) -> str:
    """Return a distribution of which BAT keeps some tokens below the threshold."""
    weights = [math.exp(-0.16 * rank) + 6e-5 for rank in range(60)]
    probabilities = [weight / sum(weights) for weight in weights]
    proved = {21, 22, 24, 27, 28, 33, 36}
    kept = [p >= threshold or rank in proved for rank, p in enumerate(probabilities)]
    colours = [BLUE if rank in proved else TEAL for rank in range(60)]
    parts = [*bars(0, "one step, one threshold", probabilities, kept, colours), line(0, height(threshold), ORANGE)]
    legend = [
        (TEAL, "kept: above the threshold"),
        (BLUE, "kept below it: every distribution that explains"),
        (None, "the logits gives this token some probability"),
        (FAINT, "cut: some such distribution gives it none"),
    ]
    for number, (colour, words) in enumerate(legend):
        parts += [box(410, 70 + 26 * number, 16, 16, colour)] if colour else []
        parts.append(text(434, 83 + 26 * number, words))
    return svg(800, 270, parts)


def perplexity() -> str:
    """Return how much more perplexity each way of reading has than dual chunk attention, along Middlemarch."""
    steps = ("dual-chunk-2", "dual-chunk-window-2")
    lines = [
        each for step in steps for each in (DOCS / "evidence" / step / "perplexity.jsonl").read_text().splitlines()
    ]
    found: dict[str, dict[int, float]] = {}
    for record in map(json.loads, lines):
        found.setdefault(record["arm"], {})[record["start"]] = record["perplexity"]
    names = {
        "dual chunk": (TEAL, "dual chunk attention (the zero line)"),
        "window re-computed": (BLUE, "unmodified, its window read again"),
        "LM-Infinite, a quarter": (RED, "LM-Infinite, a quarter of the window"),
    }
    parts = [text(20, 24, "perplexity, % above dual chunk attention", bold=True)]
    for place, start in enumerate(sorted(found["dual chunk"])):
        left = 60 + 110 * place
        for number, (arm, (colour, _)) in enumerate(names.items()):
            above = 100 * (found[arm][start] / found["dual chunk"][start] - 1)
            parts.append(box(left + 16 * number, 220 - 40 * max(above, 0), 14, max(40 * abs(above), 1.5), colour))
        parts.append(text(left, 262, f"{start // 1024}k to {start // 1024 + 4}k"))
    parts += [f'<path d="M50 220H500" stroke="{TEAL}" stroke-width="1.5"/>', text(20, 225, "0"), text(20, 65, "4 %")]
    parts.append(f'<path d="M50 60H500" stroke="{FAINT}"/>')
    for number, (colour, words) in enumerate(names.values()):
        parts += [box(520, 60 + 28 * number, 16, 16, colour), text(544, 73 + 28 * number, words)]
    return svg(820, 290, [*parts, text(60, 282, "position in the text (tokens)")])


ARMS = {  # as the records of heat maps name them, and in words
    "dual-chunk": "dual chunk attention",
    "both": "dual chunk attention,\nTopBlocks.for_chat",
    "chat": "LM-Infinite,\nTopBlocks.for_chat",
    "window": "LM-Infinite alone",
    "paper": "LM-Infinite,\nthe paper's top-k",
    "top-k": "LM-Infinite, TopK",
    "blocks": "LM-Infinite,\nTopBlocks()",
}


def heat_maps() -> None:
    """Draw shares of right answers, by kind of question or depth, and by length."""
    evidence = DOCS / "evidence"
    paths = [*evidence.glob("reading*/questions.jsonl"), *evidence.glob("passkey*/passkey.jsonl")]
    for path in sorted(paths):
        records = [SimpleNamespace(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        records = [each for each in records if getattr(each, "battery", "") != "continuation"]
        for record in records:
            record.arm = ARMS.get(record.arm, record.arm)
            record.score = record.score if path.stem == "questions" else float(record.correct)
        inside = "battery" if path.stem == "questions" else "depth"
        axes: list[Any] = plot_scores(records, "arm", [], inside=inside)
        axes[0].figure.savefig(path.with_suffix(".png"), dpi=130)
        if path.parent.name == "reading":
            axes[0].figure.savefig(FOLDER / "facts.png", dpi=130)


def bars(
    panel: int, title: str, probabilities: list[float], kept: list[bool], colours: list[str] | None = None
) -> list[str]:
    """Return a panel of bars, grey where a token is cut."""
    left = 20 + 400 * panel
    parts = [text(left, 24, title, bold=True)]
    for rank, (probability, is_kept) in enumerate(zip(probabilities, kept, strict=True)):
        y = height(probability)
        colour = (colours[rank] if colours else TEAL) if is_kept else FAINT
        parts.append(box(left + 6 * rank, y, 5, 260 - y, colour))
    return parts


def height(probability: float) -> float:
    """Return where a bar of this probability ends: 1 at the top, 1e-5 at the bottom."""
    return 260 - 220 * (math.log10(max(probability, 1e-5)) + 5) / 5


def line(panel: int, y: float, colour: str, *, dash: bool = False) -> str:
    """Return a line across a panel."""
    dashes = ' stroke-dasharray="5 4"' if dash else ""
    left = 20 + 400 * panel
    return f'<path d="M{left} {y:.1f}H{left + 360}" stroke="{colour}" stroke-width="1.5"{dashes}/>'


def box(x: float, y: float, width: float, tall: float, colour: str) -> str:
    """Return a filled rectangle."""
    return f'<rect x="{x:g}" y="{y:.1f}" width="{width:g}" height="{tall:.1f}" fill="{colour}"/>'


def text(x: float, y: float, words: str, *, bold: bool = False) -> str:
    """Return a line of text."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:.1f}"{weight}>{words}</text>'


def svg(width: float, tall: float, parts: list[str]) -> str:
    """Return a picture on a white card."""
    box_of = f'viewBox="0 0 {width:g} {tall:g}" font-family="sans-serif" font-size="14" fill="{INK}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box_of}>'
    return "\n".join([head, f'<rect width="{width:g}" height="{tall:g}" rx="6" fill="#fff"/>', *parts, "</svg>\n"])


if __name__ == "__main__":
    main()
