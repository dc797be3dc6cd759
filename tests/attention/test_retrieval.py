"""Reading the middle: equal to its definition pair by pair, and the contract of LM-Infinite with it."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import DynamicCache

from hf_longtrunc import ArchiveCacheLayer, LambdaCacheLayer, LMInfinite, TopBlocks, TopK
from hf_longtrunc.attention.block_scores import DistantKeys, UnrotatedKeys, select_blocks, top_k
from hf_longtrunc.attention.kernels import Scoring
from hf_longtrunc.attention.rope import Rotation

from .reference import Naive, NaiveBlocks, NaiveTopK, Rope, install, lambda_attention
from .test_lm_infinite import FAMILIES, L, S, in_chunks, logits, model_of, prompt, ring_cache

N = 5 * L
DIM = 8
ROTATION = Rotation(10000 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))
EVERY_ROW = TopK(k=3, distance=4, first_layer=0, rows=None)
SETTINGS = LMInfinite(num_sink_tokens=S, window_length=L, retrieval=EVERY_ROW)


@pytest.fixture(params=FAMILIES)
def model(request):
    return model_of(request.param)


@pytest.fixture
def llama():
    return model_of("llama")


# -- the pure part ---------------------------------------------------------------------------------------------------


def attended(query, key, value, sinks, window, scoring, k, away, rows):
    i = torch.arange(query.shape[2])[None]

    def read(queries, positions, scores):
        text = UnrotatedKeys(key, value, i)
        distant = DistantKeys(text, scoring._replace(rotation=ROTATION), sinks, window, distance=away)
        return top_k(queries, positions, distant, k)

    rotated = ROTATION.rotate(key, i)
    return lambda_attention(
        ROTATION.rotate(query, i),
        rotated,
        value,
        i,
        i,
        sinks=(rotated[:, :, :sinks], value[:, :, :sinks]) if sinks else None,
        window=window,
        max_distance=window,
        scoring=scoring,
        rotation=ROTATION,
        block_size=16,
        read=read,
        query_rows=rows,
    )


@given(
    n=st.integers(1, 90),
    sinks=st.integers(0, 5),
    window=st.integers(1, 12),
    k=st.integers(1, 9),
    away=st.integers(1, 12),
    rows=st.integers(1, 100),
    kind=st.sampled_from(["plain", "softcap", "slopes", "null"]),
    seed=st.integers(0, 99),
)
def test_it_is_the_reference(n, sinks, window, k, away, rows, kind, seed):
    torch.manual_seed(seed)
    query = torch.randn(1, 4, n, DIM, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, n, DIM, dtype=torch.float64)
    sinks = min(sinks, n)
    slopes, null = torch.rand(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    softcap = 2.0 if kind == "softcap" else None
    scoring = Scoring(0.4, softcap, slopes if kind == "slopes" else None, null if kind == "null" else None)
    got = attended(query, key, value, sinks, window, scoring, k, away, rows)
    naive = NaiveTopK(sinks, window, window, Rope(DIM), scoring.slopes, k=k, away=away, rows=rows)
    expected = naive(query[0], key[0], value[0], 0.4, softcap, scoring.null_logits)
    assert (got[0] - expected).abs().max() < 1e-12


# -- a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 6, None])
@pytest.mark.parametrize(("family", "rope"), [("llama", Rope(8)), ("cohere", Rope(8, pairs=True, base=5e5))])
def test_a_patched_model_is_the_definition(family, rope, rows):
    ids = prompt(N)
    reference = model_of(family).double()
    naive = NaiveTopK(S, L, L, rope, k=3, away=4, rows=N if rows is None else rows)
    install(reference, naive, below=(1, Naive(S, L, L, rope)))
    expected = logits(reference, ids)
    model = model_of(family)
    with LMInfinite(num_sink_tokens=S, window_length=L)(model):
        without = logits(model, ids)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=3, distance=4, first_layer=1, rows=rows))(
        model
    ):
        got = logits(model, ids)
        model.double()
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=3, distance=4, first_layer=1, rows=rows))(
        model
    ):
        exact = logits(model, ids)
    assert (got - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert (exact - expected).abs().max() < 2e-6 * max(1.0, float(expected.abs().max()))
    assert (got - without)[:, -1].abs().max() > 1e-2


def test_half_the_window_is_the_distance_unless_it_is_given(llama):
    ids = prompt(N)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=3, distance=L // 2, first_layer=0))(llama):
        expected = logits(llama, ids)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=3, first_layer=0))(llama):
        assert torch.equal(logits(llama, ids), expected)


@pytest.mark.parametrize("n", [1, L, L + S])
def test_a_text_without_a_middle_is_read_as_before_to_the_bit(model, n):
    ids = prompt(n)
    with LMInfinite(num_sink_tokens=S, window_length=L)(model):
        expected = logits(model, ids)
    with SETTINGS(model):
        assert torch.equal(logits(model, ids), expected)
        assert torch.equal(logits(model, ids, cache=ring_cache(model)), expected)


def test_any_chunking_is_one_prefill_where_every_row_reads(model):
    ids = prompt(N)
    with SETTINGS(model):
        whole = logits(model, ids)
        for sizes in ([1] * N, [1, N - 1], [7] * 6 + [N - 42], [N - 1, 1]):
            for cache in (ring_cache(model), DynamicCache(config=model.config)):
                assert (in_chunks(model, ids, sizes, cache) - whole).abs().max() < 3e-5, (sizes, type(cache.layers[0]))


def test_the_last_rows_of_each_forward_read(llama):
    """One prompt in two chunks: rows of both read, and a token decoded reads on its own."""
    ids = prompt(N)
    retrieval = TopK(k=3, distance=4, first_layer=1, rows=2)  # the last layer: what a row reads stays in its row
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=3, distance=4, first_layer=1, rows=None))(
        llama
    ):
        every = logits(llama, ids)
    with LMInfinite(num_sink_tokens=S, window_length=L)(llama):
        none = logits(llama, ids)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=retrieval)(llama):
        got = in_chunks(llama, ids, [30, N - 31, 1], ring_cache(llama))
    is_reading = torch.zeros(N, dtype=torch.bool)
    is_reading[[28, 29, N - 3, N - 2, N - 1]] = True
    assert (got - torch.where(is_reading[:, None], every, none)).abs().max() < 3e-5


@pytest.mark.parametrize("rows", [4, None])
def test_a_left_padded_row_is_the_row_alone(model, rows):
    lengths = [1, L, L + S, L + S + 1, 3 * L, N]
    texts = [prompt(n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(text, (N - text.shape[1], 0)) for text in texts])
    mask = torch.tensor([[0] * (N - n) + [1] * n for n in lengths])
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=3, distance=4, first_layer=0, rows=rows))(
        model
    ):
        batch = logits(model, ids, attention_mask=mask)
        for index, text in enumerate(texts):
            assert (batch[index, N - text.shape[1] :] - logits(model, text)[0]).abs().max() < 3e-5
        # Token 0 is padding and embedded as zero: all its scores are equal, and any keys may be the best.
        options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0]}
        together = model.generate(ids, attention_mask=mask, **options)
        for index in (1, 3, 5):
            text = texts[index]
            alone = model.generate(text, **options)
            assert torch.equal(together[index, N:], alone[0, text.shape[1] :]), lengths[index]


def test_generate_in_its_modes(model):
    ids = prompt(25, batch=2)
    greedy = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0]}
    beams = {**greedy, "num_beams": 3, "num_return_sequences": 3}
    with SETTINGS(model):
        cached = model.generate(ids, **greedy)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **greedy))
        assert torch.equal(cached, model.generate(ids, prefill_chunk_size=7, **greedy))
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


def test_a_crop_and_speculation_leave_no_trace(llama):
    ids = prompt(8).repeat(1, 4)
    options = {"max_new_tokens": 30, "do_sample": False, "suppress_tokens": [0]}
    with SETTINGS(llama):
        greedy = llama.generate(ids, **options)
        assert torch.equal(llama.generate(ids, prompt_lookup_num_tokens=5, **options), greedy)


def test_an_archive_on_the_cpu_is_the_same(llama):
    ids = prompt(25)
    options = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [0]}
    with SETTINGS(llama):
        expected = llama.generate(ids, **options)
    on_cpu = TopK(k=3, distance=4, first_layer=0, rows=None, store="cpu")
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=on_cpu)(llama):
        assert torch.equal(llama.generate(ids, **options), expected)


def test_the_cache_keeps_everything_once_and_is_refused_elsewhere(llama):
    ids = prompt(N)
    with SETTINGS(llama):
        cache = ring_cache(llama)
        assert all(type(layer) is ArchiveCacheLayer for layer in cache.layers)
        in_chunks(llama, ids, [20, *[1] * (N - 20)], cache)
        layer = cache.layers[0]
        assert layer.store_keys.shape[2] <= N * 3 / 2
        rotation = next(iter(llama.get_decoder()._hf_longtrunc_patch.layers.values())).rotation
        plain = DynamicCache(config=llama.config)
        logits(llama, ids, cache=plain)
        turned_back = rotation.rotate(plain.layers[0].keys, -torch.arange(N)[None])
        assert (layer.text().key - turned_back).abs().max() < 1e-5
        assert (layer.text().value - plain.layers[0].values).abs().max() < 1e-5
    with LMInfinite(num_sink_tokens=S, window_length=L)(llama):
        small = ring_cache(llama)
        assert all(type(layer) is LambdaCacheLayer for layer in small.layers)
        logits(llama, ids, cache=small)
    with SETTINGS(llama), pytest.raises(ValueError, match="built without retrieval"):
        logits(llama, prompt(1), cache=small)
    with pytest.raises(ValueError, match="no longer is"):
        logits(llama, prompt(1), cache=cache)


@pytest.mark.parametrize("family", ["deepseek_v2", "gemma3n_text"])
def test_top_k_searches_keys_that_no_archive_holds(family):
    """They are made afresh from cached latents, or are those of an earlier layer."""
    model = model_of(family)
    ids = prompt(N)
    options = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [0]}
    with SETTINGS(model):
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    with LMInfinite(num_sink_tokens=S, window_length=L)(model):
        assert not torch.equal(cached, model.generate(ids, **options))


def test_blocks_are_refused_where_no_archive_can_be():
    with pytest.raises(ValueError, match="multi-head latent attention"):
        BLOCKS.attach(model_of("deepseek_v2"))
    model = model_of("gemma3n_text")
    with BLOCKS(model), pytest.raises(ValueError, match="or take TopK"):
        model.generate(prompt(N), max_new_tokens=3)


def test_gradients_are_the_references():
    ids = prompt(30)
    model = model_of("llama").double().requires_grad_(True)
    install(model, NaiveTopK(S, L, L, Rope(8), k=3, away=4))
    model(ids, labels=ids).loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model = model_of("llama").double().requires_grad_(True)
    with SETTINGS(model):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_detaching_leaves_no_trace(llama):
    ids = prompt(N)
    before = logits(llama, ids)
    with SETTINGS(llama):
        llama.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(logits(llama, ids), before)
    assert torch.equal(logits(copy.deepcopy(llama), ids), before)


# -- blocks ------------------------------------------------------------------------------------------------------------

VOTERS, ROWS = 3, 5
BLOCKS = LMInfinite(
    num_sink_tokens=S,
    window_length=L,
    retrieval=TopBlocks(blocks=2, block_size=4, distance=4, first_layer=0, voting_rows=VOTERS, rows=ROWS),
)
INTERFACE_FAMILIES = {
    "llama": Rope(8),
    "qwen3": Rope(8),
    "gpt_neox": Rope(4),
    "cohere": Rope(8, pairs=True, base=5e5),
}


@pytest.mark.parametrize(("first_voting_layer", "emphasis"), [(None, 4.0), (1, 1.0)])
@pytest.mark.parametrize("family", INTERFACE_FAMILIES)
def test_blocks_are_the_definition_and_decoding_goes_on_reading_them(family, first_voting_layer, emphasis):
    ids = prompt(N + 6)
    reference = model_of(family).double()
    naive = NaiveBlocks(S, L, L, INTERFACE_FAMILIES[family], size=4, away=4, rows=VOTERS, emphasis=emphasis)
    silent = replace(naive, paid={})  # reads, and has no say
    install(reference, naive, below=(first_voting_layer or 0, silent))
    logits(reference, ids[:, :N])
    naive.chosen = silent.chosen = naive.best(2)
    naive.rows = silent.rows = ROWS + 6  # what is decoded reads too
    expected = logits(reference, ids)
    model = model_of(family)
    with LMInfinite(num_sink_tokens=S, window_length=L)(model):
        without = logits(model, ids)
    retrieval = replace(BLOCKS.retrieval, first_voting_layer=first_voting_layer, emphasis=emphasis)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=retrieval)(model):
        cache = ring_cache(model)
        got = in_chunks(model, ids, [N, 1, 1, 2, 2], cache)
    assert sorted(cache.layers[0].selection.indices[0].tolist()) == sorted(naive.chosen)
    assert (got - expected).abs().max() < 3e-5 * max(1.0, float(expected.abs().max()))
    assert (got - without)[:, : N - ROWS].abs().max() < 2e-5
    assert (got - without)[:, N:].abs().max() > 1e-2


OPENING = (3, 4)


@pytest.mark.parametrize("least", [0.1, 1.2])
@pytest.mark.parametrize(
    ("contrast_rows", "ending", "margin", "question_rows", "turn"),
    [
        *((7, 0, 0, None, None), (9, 4, 3, None, None), (0, 2, 6, None, None)),
        *((6, 2, 0, 2 * VOTERS + 1, None), (6, 2, 0, 3 * VOTERS, VOTERS + 1), (0, 2, 1, 2 * VOTERS, 1)),
    ],
)
def test_blocks_in_contrast_are_the_definition(monkeypatch, contrast_rows, ending, margin, least, question_rows, turn):
    """Groups of rows note what each head pays; a block is worth what one stretch pays it beyond the rows before."""
    monkeypatch.setattr("hf_longtrunc.attention.lambda_attention._RETRIEVAL_BLOCK", 5)  # a layer's votes come in parts
    ids, rope = prompt(N), INTERFACE_FAMILIES["llama"]
    most = question_rows or VOTERS
    asking = min(most, turn or most)
    if turn is not None:
        ids[:, -ending - turn - len(OPENING) : -ending - turn] = torch.tensor(OPENING)
    stretches = [(min(VOTERS, asking - start), ending + start) for start in range(0, asking, VOTERS)]
    shares = []
    for rows, behind in (*stretches, (contrast_rows + most - asking, ending + asking)):
        naive = NaiveBlocks(S, L, L, rope, size=4, away=4, rows=rows, behind=behind)
        install(reference := model_of("llama").double(), naive)
        logits(reference, ids)
        shares.append({place: mass / rows for place, mass in naive.paid.items()})
    *votes, before = shares
    heads, blocks = {place[:2] for place in votes[0]}, {place[2] for vote in votes for place in vote}
    of_head = {head: [paid for place, paid in before.items() if place[:2] == head] for head in heads}
    usual = {head: sum(paid) / max(1, len(paid)) for head, paid in of_head.items()}
    common = sum(usual.values()) / len(heads)
    worth = dict.fromkeys(blocks, 0.0)
    for vote, block in itertools.product(votes, blocks):
        paid = {head: vote.get((*head, block), 0.0) for head in heads}
        if before:
            anyway = {head: before.get((*head, block), 0.0) + usual[head] + common for head in heads}
            found = math.sqrt(sum((paid[head] / anyway[head]) ** 2 for head in heads) / len(heads))
        else:
            found = sum(paid.values())
        worth[block] = max(worth[block], found)
    best = sorted(worth, key=worth.__getitem__, reverse=True)[:2]
    chosen = [block for block in best if not before or worth[block] >= least]
    most, top = min(2.5, max(1.0, worth[best[0]] ** 2)), worth[best[0]]
    emphases = {block: max(1.0, most * (worth[block] / top) ** 2) if before else 2.5 for block in chosen}
    naive = NaiveBlocks(S, L, L, rope, size=4, away=4, rows=ROWS + 4, margin=margin, chosen=chosen, emphases=emphases)
    install(reference := model_of("llama").double(), naive)
    expected = logits(reference, ids)
    options = {"contrast_rows": contrast_rows, "margin": margin, "least_contrast": least}
    options["ending_ids"] = ids[0, N - ending :].tolist()
    options |= {"question_rows": question_rows, "opening_ids": OPENING if turn is not None else ()}
    retrieval = replace(BLOCKS.retrieval, rows=ROWS + 4, emphasis=2.5, **options)
    model = model_of("llama")
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=retrieval)(model):
        cache = ring_cache(model)
        got = logits(model, ids, cache=cache)
    assert [block for block in cache.layers[0].selection.indices[0].tolist() if block >= 0] == chosen
    assert (got - expected).abs().max() < 3e-5 * max(1.0, float(expected.abs().max()))


def test_nothing_is_read_where_no_block_stands_out(llama):
    ids = prompt(N)
    with LMInfinite(num_sink_tokens=S, window_length=L)(llama):
        expected = logits(llama, ids, cache=ring_cache(llama))
    flat = replace(BLOCKS.retrieval, contrast_rows=9, least_contrast=50.0)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=flat)(llama):
        assert (logits(llama, ids, cache=ring_cache(llama)) - expected).abs().max() < 2e-5


class Letters:
    """A tokenizer whose tokens are letters."""

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        said = [f"[{message['role']}]{message['content']}[/{message['role']}]" for message in messages]
        return self.chat_template + "".join(said) + "[assistant]"

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})


def test_a_chat_template_says_where_a_question_begins_and_ends():
    settings = TopBlocks.for_chat(Letters("[system]Be kind.[/system]"), blocks=3)
    ending = "[/user][assistant]"
    assert (settings.ending_ids, settings.blocks) == (tuple(map(ord, ending)), 3)
    assert "".join(map(chr, settings.opening_ids)) in ("[user]", "][user]", "m][user]")
    assert (settings.contrast_rows, settings.question_rows, settings.least_contrast) == (64, 64, 3.0)
    plain = TopBlocks.for_chat(Letters(""))
    assert plain.opening_ids == plain.ending_ids == ()


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_each_row_of_a_batch_scores_with_its_own_last_turn(family):
    """Turns of different lengths, one that began before the forward, padding, and a cache that was filled before."""
    model, ending = model_of(family), (5, 6)
    ids = prompt(N, batch=3)
    for row, turn in enumerate([3, 9]):
        ids[row, -2 - turn - 2 : -2 - turn] = torch.tensor(OPENING)
    ids[:, -2:] = torch.tensor(ending)
    options = {"ending_ids": ending, "opening_ids": OPENING, "question_rows": 10, "contrast_rows": 5}
    retrieval = replace(BLOCKS.retrieval, rows=16, least_contrast=0.1, **options)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=retrieval)(model):
        cache = ring_cache(model)
        logits(model, ids, cache=cache)
        together = cache.layers[0].selection
        for row in range(3):
            for parts in ([N], [N - 17, 17]):
                alone = ring_cache(model)
                in_chunks(model, ids[row : row + 1], parts, alone)
                assert torch.equal(alone.layers[0].selection.indices[0], together.indices[row])
        padded = torch.nn.functional.pad(ids[:1], (5, 0))
        mask = torch.ones_like(padded)
        mask[:, :5] = 0
        cache = ring_cache(model)
        logits(model, padded, cache=cache, attention_mask=mask)
        assert torch.equal(cache.layers[0].selection.indices[0], together.indices[0])


@pytest.mark.parametrize("seed", range(20))
def test_a_block_counts_for_the_square_of_its_worth_in_proportion_to_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    vote, before = torch.rand(2, 1, 5, 7, dtype=torch.float64, generator=generator).pow(4).unbind(0)
    chosen = select_blocks(vote[:, :, None], before, 4, 8.0, 0.6, lambda x: x)
    usual = [sum(paid) / 7 for paid in before[0].tolist()]
    worth = []
    for block in range(7):
        ratios = [
            float(vote[0, head, block]) / (float(before[0, head, block]) + usual[head] + sum(usual) / 5)
            for head in range(5)
        ]
        worth.append(math.sqrt(sum(ratio**2 for ratio in ratios) / 5))
    best = sorted(range(7), key=worth.__getitem__, reverse=True)[:4]
    assert chosen.indices[0].tolist() == [block if worth[block] >= 0.6 else -1 for block in best]
    most = min(8.0, max(1.0, worth[best[0]] ** 2))
    expected = [max(1.0, most * worth[block] ** 2 / worth[best[0]] ** 2) for block in best]
    assert chosen.emphasis[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_ranks_that_share_heads_choose_as_one_that_holds_all():
    """Each rank adds its heads' part of every sum; here two ranks exchange them in turn, sum by sum."""
    generator = torch.Generator().manual_seed(3)
    for heads, blocks in [(2, 9), (6, 3), (4, 1), (4, 0)]:
        vote, before = torch.rand(2, 3, heads, blocks, generator=generator).square().unbind(0)
        before[1] = 0.0  # a row without rows before those that vote
        vote[2] = 0.0  # a row that pays nothing
        whole = select_blocks(vote[:, :, None], before, 4, 3.0, 0.4, lambda x: x)
        sums: list[list[torch.Tensor]] = [[], []]
        for _ in range(5):  # one more sum is known in every turn
            noted = [list(parts) for parts in sums]
            for rank, half in enumerate((slice(None, heads // 2), slice(heads // 2, None))):
                seen = iter(noted[1 - rank])
                sums[rank].clear()
                mine = sums[rank]

                def total(x, mine=mine, seen=seen):
                    mine.append(x)
                    return x + next(seen, 0.0)

                chosen = select_blocks(vote[:, half, None], before[:, half], 4, 3.0, 0.4, total)
        assert torch.equal(chosen.indices, whole.indices)
        assert torch.allclose(chosen.emphasis, whole.emphasis)
        assert torch.isfinite(whole.emphasis).all()
        assert (whole.indices[2] == -1).all()


def test_a_row_reads_blocks_from_the_first_key_that_it_has_lost(llama):
    """The last row but one stands at S + L: it has lost one key, and those before it none."""
    ids = prompt(S + L + 2)
    reference = model_of("llama").double()
    naive = NaiveBlocks(S, L, L, INTERFACE_FAMILIES["llama"], size=4, away=4, rows=VOTERS, emphasis=4.0)
    install(reference, naive)
    logits(reference, ids)
    naive.chosen, naive.rows = naive.best(2), ROWS
    expected = logits(reference, ids)
    with BLOCKS(llama):
        got = logits(llama, ids, cache=ring_cache(llama))
    assert (got - expected).abs().max() < 3e-5 * max(1.0, float(expected.abs().max()))


def test_the_later_layers_choose_otherwise():
    ids = prompt(N)
    choices: dict[int | None, list[list[int]]] = {None: [], 0: [], 1: []}
    for model in map(model_of, ("llama", "cohere")):
        for first_voting_layer, chosen in choices.items():
            with LMInfinite(
                num_sink_tokens=S,
                window_length=L,
                retrieval=replace(BLOCKS.retrieval, first_voting_layer=first_voting_layer),
            )(model):
                cache = ring_cache(model)
                logits(model, ids, cache=cache)
                chosen.append(sorted(cache.layers[0].selection.indices[0].tolist()))
    assert choices[None] == choices[0] != choices[1]


def test_what_blocks_take_where_nothing_is_given(llama):
    assert [TopBlocks().for_layers(layers).first_voting_layer for layers in (30, 16, 8)] == [12, 6, 4]
    assert TopBlocks(first_layer=0).for_layers(2).first_voting_layer == 0
    assert TopBlocks(first_voting_layer=2).for_layers(30).first_voting_layer == 2
    ids = prompt(N)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=replace(BLOCKS.retrieval, distance=L // 4))(llama):
        expected = logits(llama, ids, cache=ring_cache(llama))
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=replace(BLOCKS.retrieval, distance=None))(llama):
        assert torch.equal(logits(llama, ids, cache=ring_cache(llama)), expected)
    with BLOCKS(llama):
        assert not torch.equal(logits(llama, ids, cache=ring_cache(llama)), expected)


IN_CONTRAST = {"contrast_rows": 6, "ending_ids": (5,), "margin": 2, "least_contrast": 0.5}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"store": "cpu"}), ("llama", IN_CONTRAST), ("bloom", {}), ("gptj", IN_CONTRAST)],
)
def test_a_left_padded_row_chooses_for_itself(family, options):
    model = model_of(family)
    lengths = [1, VOTERS - 1, L, L + S + 1, 3 * L, N]
    texts = [prompt(n) for n in lengths]
    for text in texts:
        text[:, -1] = 5
    ids = torch.cat([torch.nn.functional.pad(text, (N - text.shape[1], 0)) for text in texts])
    mask = torch.tensor([[0] * (N - n) + [1] * n for n in lengths])
    retrieval = TopBlocks(blocks=2, block_size=4, distance=4, first_layer=0, voting_rows=VOTERS, rows=ROWS, **options)
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=retrieval)(model):
        options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0]}
        together = model.generate(ids, attention_mask=mask, **options)
        for index, text in enumerate(texts):
            alone = model.generate(text, **options)
            assert torch.equal(together[index, N:], alone[0, text.shape[1] :]), lengths[index]


def test_beams_keep_the_choice(llama):
    ids = prompt(N, batch=2)
    options = {"max_new_tokens": 30, "do_sample": False, "suppress_tokens": [0]}
    with BLOCKS(llama):
        beams = llama.generate(ids, num_beams=3, **options)
        assert torch.equal(llama.generate(ids[:1], num_beams=3, **options), beams[:1])
        cache = ring_cache(llama)
        logits(llama, prompt(N, batch=2), cache=cache)
        before = cache.layers[0].selection.indices.clone()
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[1].selection.indices, before.repeat_interleave(2, 0))


def test_a_chat_turn_chooses_anew(llama):
    with BLOCKS(llama):
        cache = ring_cache(llama)
        choices = []
        for turn in (prompt(N), prompt(2 * L), prompt(VOTERS - 1)):
            logits(llama, turn, cache=cache)
            choices.append(cache.layers[0].selection.indices.tolist())
        assert cache.get_seq_length() == N + 2 * L + VOTERS - 1
    assert choices[0] != choices[1] == choices[2]


def test_blocks_without_a_middle_change_nothing_to_the_bit(model):
    ids = prompt(L + S)
    with LMInfinite(num_sink_tokens=S, window_length=L)(model):
        expected = logits(model, ids)
    with BLOCKS(model):
        assert torch.equal(logits(model, ids), expected)


def test_blocks_are_refused_where_nothing_can_be_taken_back(llama):
    ids = prompt(N)
    gemma = model_of("gemma3_text")
    before = logits(llama, ids)
    with BLOCKS(llama), BLOCKS(gemma):
        with pytest.raises(ValueError, match="no cache"):
            logits(llama, ids, use_cache=False)
        with pytest.raises(ValueError, match="DynamicLayer"):
            logits(llama, ids, cache=DynamicCache(config=llama.config))
        with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
            gemma.generate(ids, max_new_tokens=2)
        with pytest.raises(ValueError, match="output_hidden_states"):
            logits(llama, ids, cache=ring_cache(llama), output_hidden_states=True)
        assert logits(llama, ids, cache=ring_cache(llama)).shape[1] == N
    assert torch.equal(logits(llama, ids), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": 0}, ValueError, "blocks must be a whole number of at least 1"),
        ({"rows": 65}, ValueError, "rows must lie between voting_rows and 64"),
        ({"voting_rows": 9, "rows": 8}, ValueError, "rows must lie between voting_rows and 64"),
        ({"rows": None}, TypeError, "rows must be a whole number"),
        ({"block_size": 0}, ValueError, "block_size must be a whole number of at least 1"),
        ({"first_voting_layer": -1}, ValueError, "first_voting_layer must be a whole number of at least 0"),
        ({"emphasis": 0}, ValueError, "emphasis must be a number above 0"),
        ({"emphasis": "4"}, TypeError, "emphasis must be a number"),
        ({"first_voting_layer": 1.0}, TypeError, "first_voting_layer must be a whole number"),
        ({"store": "gpu"}, ValueError, "TopBlocks: store must be one of"),
        ({"question_rows": 0}, ValueError, "question_rows must be a whole number of at least 1"),
        ({"opening_ids": 5}, TypeError, "opening_ids must be token ids, got 5"),
    ],
)
def test_bad_settings_of_blocks(arguments, error, message):
    with pytest.raises(error, match=message):
        TopBlocks(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be a whole number of at least 1"),
        ({"k": 2.0}, TypeError, "k must be a whole number"),
        ({"rows": 0}, ValueError, "rows must be a whole number of at least 1"),
        ({"distance": 0}, ValueError, "distance must be a whole number of at least 1"),
        ({"first_layer": -1}, ValueError, "first_layer must be a whole number of at least 0"),
        ({"first_layer": None}, TypeError, "first_layer must be a whole number"),
        ({"store": "disk"}, ValueError, "store must be one of 'device', 'cpu'"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        TopK(**arguments)


@pytest.mark.parametrize("strategy", [TopK, TopBlocks])
def test_a_model_without_a_layer_that_reads_is_refused(llama, strategy):
    ids = prompt(N)
    before = logits(llama, ids)
    with pytest.raises(ValueError, match="first_layer=2 leaves no layer that reads"):
        LMInfinite(num_sink_tokens=S, window_length=L, retrieval=strategy(first_layer=2)).attach(llama)
    assert torch.equal(logits(llama, ids), before)


def test_a_model_without_a_layer_that_chooses_is_refused(llama):
    ids = prompt(N)
    before = logits(llama, ids)
    with pytest.raises(ValueError, match="first_voting_layer=2 leaves no layer that scores"):
        LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopBlocks(first_layer=0, first_voting_layer=2)).attach(
            llama
        )
    assert torch.equal(logits(llama, ids), before)


def test_a_distance_beyond_the_ceiling_is_refused(llama):
    with pytest.raises(ValueError, match="distance must be at most max_distance"):
        LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(distance=L + 1, first_layer=0)).attach(llama)
