"""What LM-Infinite does with each causal language model of transformers: the documentation's table.

python -m tests.attention.families > docs/lm_infinite_families.md
"""

from __future__ import annotations

import logging
import warnings

import torch
import transformers

from hf_longtrunc import LMInfinite

from .tiny_models import family_names, tiny_model

S, L = 3, 12
WORKS = "works"


def outcome(family: str) -> tuple[str, str]:
    """("works", ""), ("refused", reason) or ("not tried", why); anything else is raised."""
    try:
        model = tiny_model(family).requires_grad_(False)
        ids = torch.randint(3, 90, (1, 2 * L + 5), generator=torch.Generator().manual_seed(1))
        before = model(ids).logits
    except Exception as error:
        return "not tried", f"{type(error).__name__}: no tiny model from a configuration"
    try:
        within = LMInfinite(num_sink_tokens=S, window_length=2 * L + 5).attach(model)
    except ValueError as error:
        assert torch.equal(model(ids).logits, before), family
        return "refused", str(error).split(": ", 1)[1]
    unchanged = model(ids).logits
    within.detach()
    scale = max(1.0, float(before.abs().max()))
    assert (unchanged - before).abs().max() < 1e-4 * scale, family
    lost = _lost(model, ids)
    try:
        with LMInfinite(num_sink_tokens=S, window_length=L)(model):
            _check_patched(model, ids, before, family, lost)
    except ValueError as error:
        return "refused", str(error)
    assert torch.equal(model(ids).logits, before), family
    return WORKS, ""


def _check_patched(model, ids, before, family, lost):
    patched = model(ids).logits
    assert (patched - before).abs().max() > 1e-3, family
    assert _lost(model, ids) < max(1e-3, 3 * lost), family


def _lost(model, ids):
    """How far what is generated with a cache is from what the same tokens give without."""
    options = {"max_new_tokens": L + 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(ids, **options)
    uncached = model(cached.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    return float((torch.stack(cached.logits, 1) - uncached).abs().max() / max(1.0, float(uncached.abs().max())))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    outcomes = {family: outcome(family) for family in family_names()}
    works = sorted(family for family, (what, _) in outcomes.items() if what == WORKS)
    print(f"<!-- Written by `python -m tests.attention.families` under transformers {transformers.__version__}. -->\n")
    print(f"**{len(works)} families work**: " + ", ".join(f"`{family}`" for family in works) + ".\n")
    print("| family | | reason |\n|---|---|---|")
    for family, (what, reason) in sorted(outcomes.items()):
        if what != WORKS:
            print(f"| `{family}` | {what} | {reason.replace('|', '/')} |")


if __name__ == "__main__":
    main()
