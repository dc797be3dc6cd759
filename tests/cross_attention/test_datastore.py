"""The datastores against loops, against each other, and over two processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hf_longtrunc.cross_attention import datastore
from hf_longtrunc.cross_attention.datastore import Datastore, FaissDatastore, ShardedDatastore
from tests.launch import two_ranks

ROOT = Path(__file__).parents[2]


def naive_search(states, queries, k):
    """Return, for each query, the ids of its best k states, best first."""
    found = []
    for query in queries.tolist():
        scores = [sum(a * b for a, b in zip(query, state, strict=True)) for state in states.tolist()]
        found.append(sorted(range(len(scores)), key=lambda j: -scores[j])[:k])
    return found


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("k", [1, 3, 7, 23, 40])
@pytest.mark.parametrize("block", [5, 8, 1000])
def test_exact_search_is_the_naive_one_in_blocks_of_any_size(monkeypatch, k, block):
    monkeypatch.setattr(datastore, "_BLOCK", block)
    monkeypatch.setattr(datastore, "_SCORES", 2 * block)
    states, queries = normal(23, 6), normal(5, 6)
    scores, ids = Datastore(states).search(queries, k)
    assert ids.tolist() == naive_search(states, queries, k)
    torch.testing.assert_close(scores, (queries @ states.T).gather(1, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_states_are_searched_as_they_are(dtype):
    states, queries = normal(300, 8).to(dtype), normal(4, 8).to(dtype)
    scores, ids = Datastore(states).search(queries, 10)
    exact = (queries.float() @ states.float().T).gather(1, ids)
    torch.testing.assert_close(scores.float(), exact, rtol=1e-2, atol=2e-2)
    total = Datastore(states).weighted_sum(ids, scores.softmax(-1))
    torch.testing.assert_close(total, torch.einsum("qk,qkw->qw", scores.softmax(-1), states[ids]), rtol=2e-2, atol=2e-2)


def test_an_id_of_minus_one_adds_nothing():
    states = normal(4, 3)
    states[0] = 1e9
    ids, weights = torch.tensor([[2, -1], [-1, -1]]), normal(2, 2)
    total = Datastore(states).weighted_sum(ids, weights)
    torch.testing.assert_close(total, torch.stack([weights[0, 0] * states[2], torch.zeros(3, dtype=torch.float64)]))


def test_gradients_are_those_of_the_definition():
    states, queries = normal(9, 4).requires_grad_(), normal(3, 4).requires_grad_()

    def attended(states, queries):
        store = Datastore(states)
        scores, ids = store.search(queries, 4)
        return store.weighted_sum(ids, scores.softmax(-1))

    assert torch.autograd.gradcheck(attended, (states, queries))


@pytest.mark.parametrize("sizes", [[23], [9, 14], [1, 20, 2]])
@pytest.mark.parametrize("k", [1, 4, 23, 30])
def test_shards_find_what_one_store_finds(sizes, k):
    states, queries = normal(23, 6), normal(5, 6)
    sharded = ShardedDatastore([Datastore(part) for part in states.split(sizes)])
    scores, ids = sharded.search(queries, k)
    expected, expected_ids = Datastore(states).search(queries, k)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(scores, expected)
    weights = scores.softmax(-1)
    torch.testing.assert_close(sharded.weighted_sum(ids, weights), Datastore(states).weighted_sum(ids, weights))
    assert len(sharded) == 23


@pytest.mark.xdist_group("two_ranks")
def test_shards_over_two_processes(tmp_path):
    two_ranks(Path(__file__).with_name("two_shards.py"), tmp_path)
    expected = torch.load(tmp_path / "whole.pt")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=f"rank {rank}, {name}")


class TestFaiss:
    @pytest.fixture(autouse=True)
    def installed(self):
        # FAISS's own bindings warn on import.
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pytest.importorskip("faiss")

    def test_flat_is_torch(self):
        states, queries = normal(500, 16), normal(20, 16)
        store = FaissDatastore(states, "Flat")
        scores, ids = store.search(queries, 30)
        expected, expected_ids = Datastore(states).search(queries, 30)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
        assert store.recall(queries, 30) == 1

    def test_states_of_unlike_length_are_ranked_by_inner_product(self):
        """By distance the short state would be the nearest; by inner product the long one is the best."""
        states = torch.tensor([[0.1, 0.0], [9.0, 0.0]])
        for kind in ("Flat", "HNSW4", "IVF1,Flat"):
            _, ids = FaissDatastore(states.repeat(30, 1), kind).search(torch.tensor([[0.2, 0.0]]), 3)
            assert (ids % 2 == 1).all(), kind

    @pytest.mark.parametrize("kind", ["HNSW32:efSearch=256", "IVF16,Flat:nprobe=12", "IVF4,PQ8x4:nprobe=4"])
    def test_approximate_indexes_find_most_and_say_how_much(self, kind):
        clusters = normal(40, 16).repeat_interleave(270, 0) + 0.3 * normal(10_800, 16)
        store, queries = FaissDatastore(clusters, kind), normal(30, 16)
        recall = store.recall(queries, 10)
        assert not store.is_exact
        assert (0.1 if "PQ" in kind else 0.8) < recall <= 1
        scores, ids = store.search(queries, 10)
        torch.testing.assert_close(scores, (queries @ clusters.T).gather(1, ids))
        assert (scores.diff(dim=1) <= 0).all()

    def test_a_text_too_short_to_train_on_is_searched_exactly(self):
        states, queries = normal(100, 8), normal(5, 8)
        store = FaissDatastore(states, "IVF64,Flat")
        assert store.is_exact
        assert torch.equal(store.search(queries, 7)[1], Datastore(states).search(queries, 7)[1])

    def test_what_is_not_found_is_minus_one_and_never_attended(self):
        """One list of four is probed: it holds fewer than k states."""
        states = torch.cat([normal(50, 4) + 20 * torch.eye(4, dtype=torch.float64)[i] for i in range(4)])
        store = FaissDatastore(states, "IVF4,Flat:nprobe=1")
        queries = torch.eye(4, dtype=torch.float64)
        scores, ids = store.search(queries, 120)
        assert (ids == -1).any(dim=1).all()
        assert torch.equal(scores == -torch.inf, ids == -1)
        weights = scores.softmax(-1)
        real = ids >= 0
        expected = torch.stack([w[r] @ states[i[r]] for w, i, r in zip(weights, ids, real, strict=True)])
        torch.testing.assert_close(store.weighted_sum(ids, weights), expected)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=torch.float64))

    def test_an_unknown_kind_is_named(self):
        with pytest.raises(ValueError, match=r"index must be a kind that faiss\.index_factory knows, got 'Flatt'"):
            FaissDatastore(normal(5, 4), "Flatt")

    def test_gradients_flow_through_the_scores(self):
        states, queries = normal(40, 4).requires_grad_(), normal(3, 4).requires_grad_()
        for store in (FaissDatastore(states, "Flat"), Datastore(states)):
            scores, ids = store.search(queries, 5)
            store.weighted_sum(ids, scores.softmax(-1)).square().sum().backward()
        states_grad, queries_grad = states.grad.clone(), queries.grad.clone()
        states.grad = queries.grad = None
        store = Datastore(states)
        scores, ids = store.search(queries, 5)
        store.weighted_sum(ids, scores.softmax(-1)).square().sum().backward()
        torch.testing.assert_close(states_grad, 2 * states.grad)
        torch.testing.assert_close(queries_grad, 2 * queries.grad)


def test_without_faiss_the_error_names_the_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[faiss\]"'):
        FaissDatastore(normal(5, 4), "Flat")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="at least one state"):
        Datastore(normal(0, 4))
    for store in (Datastore(normal(5, 4)), ShardedDatastore([Datastore(normal(5, 4))])):
        with pytest.raises(ValueError, match="k must be a whole number of at least 1, got 0"):
            store.search(normal(2, 4), 0)
