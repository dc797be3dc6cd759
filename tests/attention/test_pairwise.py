"""Every pair of what users combine: two techniques in turn on one cache, doors, decoding, caches, and rotary laws.

Each cell reads a first part of a text under one technique, the rest under another one, and generates. It either agrees
with attention pair by pair in fp64 (`pairs.py`: none of it is the package's code) or is refused by the package in a
message with a way out. `refusal` says which; nothing else may happen.
"""

from __future__ import annotations

import itertools
import random
import re
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from hf_longtrunc import DualChunkAttention, LMInfinite, StreamingLLM, TopBlocks
from hf_longtrunc.models import CACHE

from .pairs import (
    BLOCK,
    CHUNKS,
    EMPHASIS,
    ENDING,
    LENGTH,
    NEW,
    PARTS,
    PLAIN,
    READERS,
    RINGS,
    VOTERS,
    Cached,
    L,
    Pairs,
    S,
    assistant,
    best_of_beams,
    defined,
    definition,
    patchable,
)
from .reference import Rope

CHAT = TopBlocks(
    blocks=1, block_size=BLOCK, voting_rows=VOTERS, rows=READERS, ending_ids=ENDING, emphasis=EMPHASIS,
    first_layer=0, first_voting_layer=0,
)  # fmt: skip
TECHNIQUES: dict[str, Any] = {
    "unpatched": None,
    "lm-infinite": LMInfinite(num_sink_tokens=S, window_length=L),
    "lm-infinite for chat": LMInfinite(num_sink_tokens=S, window_length=L, retrieval=CHAT),
    "streaming": StreamingLLM(num_sink_tokens=S, window_length=L),
    **{
        name: DualChunkAttention(chunk_length=s, trained_length=c, retrieval=CHAT if "chat" in name else None)
        for name, (s, c) in CHUNKS.items()
    },
}
LIKE = [{name, f"{name} for chat"} for name in ("lm-infinite", "chunks")]  # read a text alike
EXACT = {
    "unpatched": 10**9,
    **dict.fromkeys(RINGS, L),
    "streaming": S + L,
    **{name: s for name, (s, _) in CHUNKS.items()},
}
FACTORS: dict[str, list[str]] = {
    "first": ["nothing", *TECHNIQUES],
    "second": [*TECHNIQUES],
    "length": [*PARTS],
    "door": ["ids", "embeddings", "decoder", "past_key_values"],
    "decoding": ["greedy", "in chunks", "beams", "prompt lookup", "assistant", "itself", "early exit"],
    "cache": ["generate's", "dynamic", "static", "quantised", "offloaded"],
    "rope": ["default", "yarn", "longrope", "longrope beyond", "W8A8"],
}


# -- a cell ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    first: str
    second: str
    length: str
    door: str
    decoding: str
    cache: str
    rope: str

    @property
    def drafts(self) -> bool:
        return self.decoding not in ("greedy", "in chunks", "beams")

    def __str__(self) -> str:
        return " | ".join((self.first, self.second, self.length, self.door, self.decoding, self.cache, self.rope))


class LosslessQuantizedLayer(QuantizedLayer):
    """A quantised cache layer, of a library that rounds nothing."""

    def __init__(self):
        super().__init__(residual_length=4)

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


def new_cache(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=64)
    if kind == "offloaded":
        return DynamicCache(config=model.config, offloading=torch.cuda.is_available())
    if kind == "quantised":
        return Cache(layers=[LosslessQuantizedLayer() for _ in range(model.config.num_hidden_layers)])
    inputs: dict[str, Any] = {}
    model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
    return inputs[CACHE]


def forward(door: str, model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    if door == "ids":
        return model(tokens, **{CACHE: cache}).logits
    if door == "embeddings":
        return model(inputs_embeds=model.get_input_embeddings()(tokens), **{CACHE: cache}).logits
    if door == "decoder":
        return model.lm_head(model.model(tokens, None, None, cache)[0])
    return model.lm_head(model.model(tokens, past_key_values=cache)[0])


def patched(name: str, model: Any) -> Any:
    return nullcontext() if TECHNIQUES.get(name) is None else TECHNIQUES[name](model)


def run(cell: Cell, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the logits of the second part, where the door is not generate(), and the text with its continuation."""
    beams = 2 if cell.decoding == "beams" else 1
    rows, cache, read = ids.expand(beams, -1), None, 0
    if cell.first != "nothing":
        read = PARTS[cell.length]
        with patched(cell.first, model):
            cache = new_cache(cell.cache, model)
            forward(cell.door, model, rows[:, :read], cache)
    options: dict[str, Any] = {
        "greedy": {},
        "in chunks": {"prefill_chunk_size": 7},
        "beams": {"num_beams": 2},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": assistant(cell.rope)},
        "itself": {"assistant_model": model},
        "early exit": {"assistant_early_exit": 1},
    }[cell.decoding]
    options |= {"max_new_tokens": NEW, "do_sample": False}
    logits = None
    with patched(cell.second, model):
        cache = new_cache(cell.cache, model) if cache is None else cache
        if cell.door != "ids":
            logits = forward(cell.door, model, rows[:, read:], cache)[:1]
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        options["attention_mask"] = torch.ones_like(ids)
        name = "past_key_values" if cell.door == "past_key_values" else CACHE
        if cell.drafts and cache.get_seq_length():
            if cell.second != "unpatched":  # to which transformers feeds the text a second time, silently
                with pytest.raises(ValueError, match=r"hold|need|cache") as caught:
                    model.generate(ids, **{name: cache}, **options)
                assert re.search("a second time.*without drafts|start anew", sentence(caught.value))
            cache = new_cache(cell.cache, model)
        return logits, model.generate(ids, **{name: cache}, **options)


def refusal(cell: Cell) -> str | None:
    """What the package says to a cell, by the laws of its techniques and the kind of its cache; None: nothing."""
    first, second, kind, said = cell.first, cell.second, cell.cache, []
    techniques = [second] if first == "nothing" else [first, second]
    if kind == "static" and set(techniques) != {"unpatched"}:
        said.append("Static(Cache|Layer)")
    if kind == "quantised" and cell.drafts:
        said.append("a cache that can be cropped")  # transformers' own sentence
    if cell.drafts and cell.door == "ids":  # the cache is refused, and the whole text read anew
        first = "nothing"
    keeps_ring = kind == "generate's" and first in RINGS
    if keeps_ring and second not in RINGS:
        said.append("no longer is|keeps a window")
    if second == "lm-infinite for chat":
        if kind != "generate's" or first not in ("nothing", *RINGS):
            said.append("TopBlocks runs the end of a question twice")
        elif first in ("lm-infinite", "streaming"):
            said.append("TopBlocks runs the end of a question twice|built without retrieval")
    if second == "chunks for chat" and kind == "quantised":
        said.append("keeps what it selected with an ordinary cache")
    if first not in ("nothing", second) and {first, second} not in LIKE:
        exact = min(EXACT[first], EXACT[second])
        if PARTS[cell.length] > exact or cell.rope == "longrope beyond":
            said.append("start anew")
    return "|".join(said) or None


def sentence(error: Exception) -> str:
    """Return what an exception says, if the package says it and names a way out."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if "a cache that can be cropped" in str(error):
        return str(error)
    assert "hf_longtrunc" in Path(where).parts, f"{where}: {type(error).__name__}: {error}"
    assert re.search(r"start anew|leave |take |call |detach|without", str(error)), str(error)
    return str(error)


def text_of(seed: int) -> torch.Tensor:
    """A text that ends as a question does, and whose last token stands in it before, for prompt lookup."""
    ids = torch.randint(10, 90, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[0, -2:] = torch.tensor(ENDING)
    ids[0, 3] = ENDING[-1]
    return ids


def judge(cell: Cell) -> str | None:
    """Hold a cell to the definition; return the sentence where it is refused."""
    ids = text_of(1)
    try:
        logits, text = run(cell, patchable(cell.rope), ids)
    except (ValueError, TypeError) as error:
        said = sentence(error)
        expected = refusal(cell)
        assert expected is not None, f"refused, and could be served: {said}"
        assert re.search(expected, said), said
        return said
    assert refusal(cell) is None, "served, and should be refused"
    reference = definition(cell.second, cell.rope, ids)
    tolerance = 0.1 if cell.rope == "W8A8" else 1e-4
    if cell.second == cell.first == "unpatched":  # with the cache, whose frequencies may be those of a short text
        reference = Cached(reference, PARTS[cell.length])
    expected = reference(text, use_cache=False).logits
    scale = max(1.0, float(expected.abs().max()))
    if logits is not None:
        difference = float((logits - expected[:, LENGTH - logits.shape[1] : LENGTH]).abs().max()) / scale
        assert difference < tolerance, f"logits are off by {difference:.1e}"
    start = LENGTH + (logits is not None)
    assert text.shape[1] == start + NEW
    new = expected[:, start - 1 : -1].log_softmax(-1)
    taken = new.gather(-1, text[:, start:, None])[..., 0]
    if cell.decoding == "beams":
        best = best_of_beams(reference, text[:, :start])
        assert float(taken.sum()) > best - tolerance * scale * NEW, "not the best of its beams"
    else:
        assert float((new.max(-1).values - taken).max()) < tolerance * scale, "not the likeliest token"
    return None


# -- which cells -------------------------------------------------------------------------------------------------------


def pairs_of(cell: Cell) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations([(name, getattr(cell, name)) for name in FACTORS], 2))


def covering(seed: int = 0) -> list[Cell]:
    """Cells in which every pair of values occurs, in one that is served where there is such a cell."""
    draw = random.Random(seed)
    open_pairs = set().union(
        *({((a, x), (b, y)) for x in FACTORS[a] for y in FACTORS[b]} for a, b in itertools.combinations(FACTORS, 2))
    )
    cells = []

    def gain(cell: Cell) -> int:
        return len(pairs_of(cell) & open_pairs) if refusal(cell) is None else 0

    while open_pairs:
        pair = min(open_pairs)
        candidates = [
            Cell(**{**{name: draw.choice(values) for name, values in FACTORS.items()}, **dict(pair)}) for _ in range(60)
        ]
        best = max(candidates, key=gain)
        if gain(best):
            open_pairs -= pairs_of(best)
        else:  # refused whatever else is chosen
            open_pairs.discard(pair)
        cells.append(best)
    return cells


@pytest.mark.filterwarnings("ignore:.*past_key_values.*")
@pytest.mark.transformers_own_deprecation("Passing `generation_config` together")
@pytest.mark.transformers_own_deprecation("past_key_values")
@pytest.mark.parametrize("cell", covering(), ids=str)
def test_every_pair_is_the_definition_or_a_sentence(cell):
    judge(cell)


def test_the_definitions_lie_farther_apart_than_rounding():
    """What a cell allows W8A8 for its rounding is less than any law of distances changes."""
    ids = text_of(1)
    model, now = defined("W8A8")
    rope = Rope(8, frequencies=PLAIN)
    found = []
    for kind in ("unpatched", "lm-infinite", "streaming", "chunks", "other chunks"):
        now["attention"] = Pairs(S, L, L, rope, kind=kind)
        found.append(model(ids, use_cache=False).logits[:, -12:])
    scale = max(1.0, float(found[0].abs().max()))
    assert min(float((a - b).abs().max()) for a, b in itertools.combinations(found, 2)) > 0.2 * scale


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together")
@pytest.mark.parametrize("decoding", [{"assistant_model": "itself"}, {"assistant_early_exit": 1}], ids=str)
@pytest.mark.parametrize("name", ["lm-infinite", "streaming", "chunks for chat"])
def test_a_drafted_token_that_equals_the_pad_token_is_a_token(name, decoding):
    """transformers gives an assistant no mask, and would take such a token for padding."""
    model, ids = patchable("default"), text_of(1)
    options = {"max_new_tokens": 9, "do_sample": False}
    with patched(name, model):
        plain = model.generate(ids, **options)
        if "assistant_model" in decoding:
            decoding = {"assistant_model": model}
        for token in plain[0, LENGTH + 2 : LENGTH + 4].tolist():
            if token not in ids[0].tolist():
                assert torch.equal(model.generate(ids, pad_token_id=token, **options, **decoding), plain)


@pytest.mark.parametrize("name", ["lm-infinite for chat", "chunks for chat", "chunks"])
def test_no_more_drafts_than_rows_that_read(name):
    """The text comes twice, so that lookup finds as many tokens as are asked for."""
    model, ids = patchable("default"), text_of(1).repeat(1, 2)
    options = {"max_new_tokens": 16, "do_sample": False}
    with patched(name, model):
        plain = model.generate(ids, **options)
        for drafts in (READERS - 1, READERS):
            if "chat" in name and drafts >= READERS:
                with pytest.raises(ValueError, match="prompt_lookup_num_tokens must be at most 4"):
                    model.generate(ids, prompt_lookup_num_tokens=drafts, **options)
            else:
                assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=drafts, **options), plain)


@pytest.mark.parametrize("name", ["lm-infinite for chat", "chunks for chat"])
def test_a_question_is_not_cut_by_chunks(name):
    model, ids = patchable("default"), text_of(1)
    with patched(name, model):
        whole = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        for chunk in (8, 16, 31, 33, 40):  # 33 tokens: the last chunk would hold 1, 1 and 2
            in_chunks = model.generate(ids, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk)
            assert torch.equal(in_chunks, whole), chunk
        with pytest.raises(ValueError, match="prefill_chunk_size=4 cuts the question of a prompt of 33"):
            model.generate(ids, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=4)


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together")
@pytest.mark.parametrize("name", ["lm-infinite", "chunks", "chunks for chat"])
def test_generate_from_embeddings_is_generate_from_ids_or_a_sentence(name):
    model, ids = patchable("default"), text_of(1)
    embeddings = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": NEW, "do_sample": False}
    with patched(name, model):
        for option in ({"prefill_chunk_size": 8}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}):
            expected = model.generate(ids, **options, **option)[:, LENGTH:]
            assert torch.equal(model.generate(**embeddings, **options, **option), expected)
        with pytest.raises(ValueError, match=r"brings no token.*Pass input_ids"):
            model.generate(**embeddings, **options, assistant_model=model)
