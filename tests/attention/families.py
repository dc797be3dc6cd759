"""What LM-Infinite does with each causal language model of transformers: a page of the documentation.

python -m tests.attention.families > docs/lm_infinite_families.md
"""

from __future__ import annotations

import logging
import warnings

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_longtrunc import LMInfinite
from hf_longtrunc.models import CACHE

from .shells import SHELLS, shell_config
from .tiny_models import family_names, tiny_model

S, L = 3, 12
WORKS, GROWS, REFUSED, NOT_TRIED = "works", "works with an ordinary cache", "refused", "not tried"


def model_of(family: str) -> PreTrainedModel:
    if family not in SHELLS:
        return tiny_model(family).requires_grad_(False)
    model = AutoModelForCausalLM.from_config(shell_config(family)).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def outcome(family: str) -> tuple[str, str]:
    """What happens, and the reason where it is refused or not tried; anything else is raised."""
    try:
        model = model_of(family)
        ids = torch.randint(3, 90, (1, 2 * L + 5), generator=torch.Generator().manual_seed(1))
        before = model(ids).logits
    except Exception as error:
        return NOT_TRIED, str(error)
    try:
        within = LMInfinite(num_sink_tokens=S, window_length=2 * L + 5).attach(model)
    except ValueError as error:
        assert torch.equal(model(ids).logits, before), family
        return REFUSED, str(error).split(": ", 1)[1]
    unchanged = model(ids).logits
    within.detach()
    scale = max(1.0, float(before.abs().max()))
    assert (unchanged - before).abs().max() < 1e-4 * scale, family
    lost = _lost(model, ids)
    try:
        with LMInfinite(num_sink_tokens=S, window_length=L)(model):
            _check_patched(model, ids, before, family, lost)
            what = GROWS if _grows(model) else WORKS
    except ValueError as error:
        return REFUSED, str(error)
    assert torch.equal(model(ids).logits, before), family
    return what, ""


def _grows(model) -> bool:
    """Whether the cache that `generate` builds holds layers that keep every token."""
    inputs = {}
    model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
    cache = inputs.get(CACHE)
    return cache is None or any(type(layer) is DynamicLayer for layer in cache.layers)


def _check_patched(model, ids, before, family, lost):
    patched = model(ids).logits
    assert (patched - before).abs().max() > 1e-3, family
    assert _lost(model, ids) < max(1e-3, 3 * lost), family


def _lost(model, ids):
    """How far what is generated with a cache is from what the same tokens give without."""
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(ids, **options)
    uncached = model(cached.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    return float((torch.stack(cached.logits, 1) - uncached).abs().max() / max(1.0, float(uncached.abs().max())))


def page(outcomes: dict[str, tuple[str, str]]) -> str:
    """The page, of what became of each family."""
    groups: dict[tuple[str, str], list[str]] = {}
    for family, found in sorted(outcomes.items()):
        groups.setdefault(found, []).append(family)
    refused = {why: names for (what, why), names in groups.items() if what == REFUSED}
    count = sum(map(len, refused.values()))
    tried = sum(what != NOT_TRIED for what, _ in outcomes.values())
    lines = [
        f"<!-- Written by `python -m tests.attention.families` under transformers {transformers.__version__}. -->",
        "# LM-Infinite: which families",
        f"A tiny random model of each family that `AutoModelForCausalLM` knows: past its window, with and without a "
        f"cache, within the window, and after detaching. {tried} of {len(outcomes)} families are listed; the rest are "
        "not tried.",
        *_section("Works", groups.get((WORKS, ""), [])),
        *_section("Works with an ordinary cache, which grows", groups.get((GROWS, ""), [])),
        f"## Refused: {count}",
        "At attach, or in the first forward that needs it; the model is left as it was.",
        "| because | families |\n|---|---|\n"
        + "\n".join(f"| {why.replace('|', '/')} | {_named(names)} |" for why, names in refused.items()),
        "Models that see images, as `AutoModelForImageTextToText` hands them out, are in a table of "
        "[their own](lm_infinite_models.md#models-that-see-images).",
    ]
    return "\n\n".join(lines)


def _section(title: str, families: list[str]) -> list[str]:
    return [f"## {title}: {len(families)}", _named(families) + "."] if families else []


def _named(families: list[str]) -> str:
    return ", ".join(f"`{family}`" for family in families)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(page({family: outcome(family) for family in family_names()}))


if __name__ == "__main__":
    main()
