"""Does my row leak? Each causal language model of transformers, tiny and untrained, with each form of input.

    python recipes/leaks.py                                # all families, and a line for each
    python recipes/leaks.py --families llama,lfm2          # some of them
    python recipes/leaks.py --page docs/leaks_families.md  # into the table of the page

A verdict is that of `check_packed`: "apart", "leaks", or "refused" if the model raises. This tests the code of a
family; for a checkpoint, use `hf-longtrunc check-packed MODEL`. Cost: two minutes on a CPU core.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_longtrunc import try_packed

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (8, 16, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="separated by commas; all if left out")
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    tiny = importlib.import_module("tests.attention.tiny_models")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    families = arguments.families.split(",") if arguments.families else tiny.family_names()
    found = {family: verdicts(tiny, family) for family in families}
    table = table_of(found)
    print(table)
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        marked = f"<!-- table -->\n\n{table}\n\n<!-- end -->"
        arguments.page.write_text(re.sub(r"<!-- table -->.*<!-- end -->", lambda _: marked, text, flags=re.DOTALL))


def verdicts(tiny: Any, family: str) -> dict[tuple[str, str], str] | None:
    """Return the verdicts on a family; None where no tiny model of it can be made or called."""
    ids = torch.arange(3, 3 + sum(LENGTHS)) % 60 + 1
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    try:
        config = tiny.tiny_config(family)
        # Keys of all heads come out of one latent vector there, and the number of key heads must be theirs.
        heads = {"num_key_value_heads": config.num_attention_heads} if hasattr(config, "kv_lora_rank") else {}
        model = tiny.tiny_model(family, **heads)
        model(ids[None, :8], use_cache=False)
    except Exception:
        return None
    return try_packed(model, [{"input_ids": ids, "position_ids": positions}] * 2)


def table_of(found: dict[str, dict[tuple[str, str], str] | None]) -> str:
    """Return a line for every pattern of verdicts, with the families that show it."""
    patterns = defaultdict(list)
    tried = {family: verdict for family, verdict in found.items() if verdict is not None}
    for family, verdict in tried.items():
        patterns[tuple(verdict.items())].append(family)
    kinds = list(dict.fromkeys(kind for verdict in tried.values() for _, kind in verdict))
    lines = [f"| families (transformers {transformers.__version__}) | attention | {' | '.join(kinds)} |"]
    lines.append("|---" * (len(kinds) + 2) + "|")
    for pattern, families in sorted(patterns.items(), key=lambda item: -len(item[1])):
        verdict = dict(pattern)
        by_attention = {a: tuple(verdict[a, kind] for kind in kinds) for a in ("eager", "sdpa")}
        same = by_attention["eager"] == by_attention["sdpa"]
        for attention in ("eager",) if same else ("eager", "sdpa"):
            shown = "eager, sdpa" if same else attention
            lines.append(f"| {', '.join(families)} | {shown} | {' | '.join(by_attention[attention])} |")
    left_out = [family for family, verdict in found.items() if verdict is None]
    return "\n".join(lines) + (f"\n\nNot tried, no tiny one ran: {', '.join(left_out)}." if left_out else "")


if __name__ == "__main__":
    main()
