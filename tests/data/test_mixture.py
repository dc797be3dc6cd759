"""Sources mixed to shares of tokens."""

from __future__ import annotations

import random

import pytest
from datasets import Dataset
from datasets.distributed import split_dataset_by_node

from hf_longtrunc import TokenMixture, pack


def documents_of(rng, token, number):
    return [{"input_ids": [token] * rng.randint(1, 40)} for _ in range(number)]


def mixed_naively(sources, shares, until):
    """Every document is looked at for the source that lags most, in exact fractions of tokens to shares."""
    places, tokens, order = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0), []
    left = list(sources)
    while left:
        name = sorted(left, key=lambda each: (tokens[each] / shares[each], left.index(each)))[0]
        if places[name] == len(sources[name]):
            if until == "first":
                break
            left.remove(name)
            continue
        document = sources[name][places[name]]
        places[name] += 1
        tokens[name] += len(document["input_ids"])
        order.append(document)
    return order, {name: {"documents": places[name], "tokens": tokens[name]} for name in sources}


@pytest.mark.parametrize("until", ["first", "all"])
@pytest.mark.parametrize("seed", range(20))
def test_shares_hold_at_every_point(seed, until):
    rng = random.Random(seed)
    names = ["a", "b", "c"][: rng.randint(1, 3)]
    sources = {name: documents_of(rng, number, rng.randint(0, 60)) for number, name in enumerate(names)}
    shares = {name: rng.choice([1, 2.5, 7, 0.1]) for name in names}
    mixture = TokenMixture(sources, shares, until=until)
    order, counts = mixed_naively(sources, shares, until)
    assert list(mixture) == order
    assert mixture.counts == counts
    assert list(mixture) == order, "a second reading is the same"
    if until == "all":
        assert len(order) == sum(map(len, sources.values()))
        return
    total, tokens = 0, dict.fromkeys(names, 0)
    for document in order:
        name = names[document["input_ids"][0]]
        tokens[name] += len(document["input_ids"])
        total += len(document["input_ids"])
        for each in names:
            assert tokens[each] <= shares[each] / sum(shares.values()) * total + 40


def test_packed_mixtures_resume_exactly():
    rng = random.Random(3)
    streams = {
        name: Dataset.from_list(documents_of(rng, n + 1, 80)).to_iterable_dataset() for n, name in enumerate("ab")
    }
    streams["a"] = streams["a"].shuffle(seed=5, buffer_size=16)

    def stream():
        return pack(TokenMixture(streams, {"a": 1, "b": 3}), 64, pool_size=12)

    whole = [row["input_ids"].tolist() for row in stream()]
    first = stream()
    rows = iter(first)
    head = [next(rows)["input_ids"].tolist() for _ in range(5)]
    again = stream()
    again.load_state_dict(first.state_dict())
    assert head + [row["input_ids"].tolist() for row in again] == whole
    other = stream()
    other.set_epoch(1)
    assert [row["input_ids"].tolist() for row in other] != whole, "the shuffled source has another order"


def test_the_share_of_one_process_is_seen_through_a_mixture():
    stream = Dataset.from_list(documents_of(random.Random(0), 1, 8)).to_iterable_dataset(num_shards=2)
    mixture = TokenMixture({"all": stream, "part": split_dataset_by_node(stream, 0, 2)}, {"all": 1, "part": 1})
    assert mixture._distributed.world_size == 2


@pytest.mark.parametrize(
    ("sources", "shares", "error", "words"),
    [
        ({}, {}, TypeError, "at least one"),
        ([[{"input_ids": [1]}]], {"a": 1}, TypeError, "mappings from names"),
        ({"a": []}, {"b": 1}, ValueError, r"must name the sources \['a'\], got \['b'\]"),
        ({"a": []}, {"a": 0}, ValueError, r"shares\['a'\]"),
        ({"a": iter([])}, {"a": 1}, TypeError, "read again"),
        ({"a": "text"}, {"a": 1}, TypeError, "read again"),
    ],
)
def test_bad_input(sources, shares, error, words):
    with pytest.raises(error, match=words):
        TokenMixture(sources, shares)


def test_a_document_that_is_none_is_named():
    mixture = TokenMixture({"good": [{"input_ids": [1]}] * 5, "bad": [{"text": "x"}]}, {"good": 1, "bad": 2})
    with pytest.raises((TypeError, ValueError), match="document 0 of 'bad'"):
        list(mixture)
    with pytest.raises(ValueError, match="until"):
        TokenMixture({"a": []}, {"a": 1}, until="never")
