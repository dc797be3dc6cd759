"""Top-k search by inner product over the states of one text: exact in torch, through FAISS, or over several shards.

A store has two methods: `search(queries, k)` returns the states that score highest, and `weighted_sum(ids, weights)`
their sum. States are not copied. Scores are computed block by block, and the best k so far are merged with each
block's.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hf_longtrunc.arguments import check_int, check_kind, check_tensor
from hf_longtrunc.extras import missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

# Scores that exist at one time, and the states that they are made over.
_SCORES = 2**24
_BLOCK = 2**16
# FAISS asks for so many states per centroid.
_STATES_PER_CENTROID = 39


class Store(Protocol):
    """What every store offers; `device` is where its states lie."""

    @property
    def device(self) -> torch.device:
        """Where queries go and answers come from."""

    def __len__(self) -> int:
        """Return the number of states."""

    def search(
        self, queries: Float[Tensor, "queries width"], k: int
    ) -> tuple[Float[Tensor, "queries found"], Int[Tensor, "queries found"]]:
        """Return scores and ids of the best min(k, n) states of every query, best first; -inf and -1 where none is."""

    def weighted_sum(
        self, ids: Int[Tensor, "queries found"], weights: Float[Tensor, "queries found"]
    ) -> Float[Tensor, "queries width"]:
        """Return sum_j weights[:, j] states[ids[:, j]]; an id of -1 adds nothing."""


class Datastore:
    """Exact search over `states` [n, width], of any dtype and on any device.

    Examples:
        >>> store = Datastore(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
        >>> scores, ids = store.search(torch.tensor([[1.0, 0.5]]), k=2)
        >>> ids.tolist(), scores.tolist()
        ([[2, 0]], [[2.0, 1.0]])

    `search` costs queries * n * width multiplications and 64 MB in addition to the states, which are read once for some
    hundred queries. Both methods carry gradients to states, queries and weights.
    """

    def __init__(self, states: Float[Tensor, "n width"]):
        check_tensor("states", states)
        if not len(states):
            raise ValueError("a datastore needs at least one state, got none")
        self.states = states

    @property
    def device(self) -> torch.device:
        """Where the states lie."""
        return self.states.device

    def __len__(self) -> int:
        return self.states.shape[0]

    def search(
        self, queries: Float[Tensor, "queries width"], k: int
    ) -> tuple[Float[Tensor, "queries found"], Int[Tensor, "queries found"]]:
        """Return scores and ids of the min(k, n) states with the largest inner product, best first."""
        k = check_int("k", k, minimum=1)
        together = max(1, _SCORES // min(_BLOCK, len(self)))
        found = [self._search(some, k) for some in torch.split(queries, together)]
        return torch.cat([scores for scores, _ in found]), torch.cat([ids for _, ids in found])

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(self), _BLOCK):
            scores = queries @ self.states[start : start + _BLOCK].T
            top, ids = scores.topk(min(k, scores.shape[1]))
            best = [merge_top_k([*best, (top, ids + start)], k)] if best else [(top, ids)]
        return best[0]

    def weighted_sum(
        self, ids: Int[Tensor, "queries found"], weights: Float[Tensor, "queries found"]
    ) -> Float[Tensor, "queries width"]:
        """Return sum_j weights[:, j] states[ids[:, j]]; an id of -1 adds nothing."""
        weights = weights.masked_fill(ids < 0, 0).to(self.states.dtype)
        return F.embedding_bag(ids.clamp_min(0), self.states, mode="sum", per_sample_weights=weights)


class FaissDatastore(Datastore):
    """Search over `states` [n, width] through a FAISS index by inner product; needs the extra `faiss`.

    Args:
        states: any floating dtype; the index holds them again, on the CPU, in fp32 or as small as its kind stores them.
        index: a kind of `faiss.index_factory`, "Flat", "HNSW32", "IVF1024,Flat"; search parameters follow a colon,
            "IVF1024,Flat:nprobe=64".

    Examples:
        >>> store = FaissDatastore(torch.eye(3), "Flat")  # doctest: +SKIP
        >>> store.search(torch.tensor([[1.0, 3.0, 2.0]]), k=2)[1].tolist()  # doctest: +SKIP
        [[1, 2]]

    Scores are those of the states themselves in their own dtype: an index only decides which states are found. A text
    too short to train the index on is searched exactly, and so is a query that the index finds nothing for; HNSW looks
    at 2 k states at least. `recall` says how much of the exact answer an index finds.
    """

    def __init__(self, states: Float[Tensor, "n width"], index: str):
        super().__init__(states)
        check_kind("index", index, str, "a kind of faiss.index_factory, such as 'HNSW32'")
        faiss = _faiss()
        kind, _, parameters = index.partition(":")
        try:
            self._index = faiss.index_factory(states.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(f"index must be a kind that faiss.index_factory knows, got {kind!r}: {error}") from error
        vectors = states.detach().float().cpu().contiguous().numpy()
        self.is_exact = not self._index.is_trained and len(vectors) < _states_to_train(self._index, kind)
        if not self.is_exact:
            self._index.train(vectors)
            self._index.add(vectors)
            if parameters:
                faiss.ParameterSpace().set_index_parameters(self._index, parameters)

    def search(
        self, queries: Float[Tensor, "queries width"], k: int
    ) -> tuple[Float[Tensor, "queries found"], Int[Tensor, "queries found"]]:
        """Return scores and ids of the min(k, n) states that the index finds, best first; -inf and -1 for the rest."""
        k = check_int("k", k, minimum=1)
        if self.is_exact:
            return super().search(queries, k)
        graph = getattr(self._index, "hnsw", None)
        if graph is not None:  # a graph that looks at little more than k states stays among a few neighbours
            graph.efSearch = max(graph.efSearch, 2 * k)
        _, found = self._index.search(queries.detach().float().cpu().contiguous().numpy(), min(k, len(self)))
        ids = torch.from_numpy(found).to(queries.device)
        if (ids[:, 0] < 0).any():
            return super().search(queries, k)
        scores = torch.einsum("qw,qkw->qk", queries, self.states[ids.clamp_min(0)])
        scores, order = scores.masked_fill(ids < 0, -torch.inf).sort(dim=-1, descending=True, stable=True)
        return scores, ids.gather(1, order)

    def recall(self, queries: Float[Tensor, "queries width"], k: int) -> float:
        """Return the share of the exact best k states of `queries` that the index finds."""
        _, exact = super().search(queries, k)
        _, found = self.search(queries, k)
        return float((exact[:, :, None] == found[:, None]).any(-1).double().mean())


class ShardedDatastore:
    """Search over states that lie in several stores: each store's own best k, merged.

    Args:
        shards: stores of consecutive parts of the text, each on its device; queries and answers are on the first's.
        group: a torch.distributed process group: every rank holds a part of the text, in the order of ranks. All ranks
            ask the same questions together and get the same answers; gradients stay within a rank.

    Examples:
        >>> states = torch.eye(4)
        >>> store = ShardedDatastore([Datastore(states[:2]), Datastore(states[2:])])
        >>> store.search(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), k=2)[1].tolist()
        [[3, 2]]

    Ids count through the whole text. What moves between stores is k scores and ids a query, and one weighted sum.
    """

    def __init__(self, shards: Sequence[Store], group: dist.ProcessGroup | None = None):
        if not isinstance(shards, (list, tuple)) or not shards or not all(hasattr(each, "search") for each in shards):
            raise TypeError(
                f"shards must be a list of at least one datastore, such as Datastore(states), got {shards!r}"
            )
        self.shards: list[Store] = list(shards)
        self._group = group
        lengths = [sum(map(len, self.shards))]
        if group is not None:
            mine = torch.tensor(lengths, device=self.device)
            lengths = torch.cat(_gathered(mine, group)).tolist()
        before = sum(lengths[: dist.get_rank(group)]) if group is not None else 0
        self._offsets = [before + n for n in accumulate(map(len, self.shards), initial=0)][:-1]
        self._length = sum(lengths)

    @property
    def device(self) -> torch.device:
        """The first shard's."""
        return self.shards[0].device

    def __len__(self) -> int:
        return self._length

    def search(
        self, queries: Float[Tensor, "queries width"], k: int
    ) -> tuple[Float[Tensor, "queries found"], Int[Tensor, "queries found"]]:
        """Return scores and ids of the best min(k, n) states of all shards, best first."""
        k = check_int("k", k, minimum=1)
        k = min(k, len(self))
        parts = []
        for shard, offset in zip(self.shards, self._offsets, strict=True):
            scores, ids = shard.search(queries.to(shard.device), k)
            parts.append((scores.to(queries.device), torch.where(ids < 0, ids, ids + offset).to(queries.device)))
        scores, ids = merge_top_k(parts, k)
        if self._group is None:
            return scores, ids
        missing = 0, k - ids.shape[1]  # every rank sends k, however little it holds
        all_scores = _gathered(F.pad(scores, missing, value=-torch.inf), self._group)
        all_ids = _gathered(F.pad(ids, missing, value=-1), self._group)
        return merge_top_k(list(zip(all_scores, all_ids, strict=True)), k)

    def weighted_sum(
        self, ids: Int[Tensor, "queries found"], weights: Float[Tensor, "queries found"]
    ) -> Float[Tensor, "queries width"]:
        """Return sum_j weights[:, j] states[ids[:, j]]; each shard adds up its own states."""
        total: Any = 0
        for shard, offset in zip(self.shards, self._offsets, strict=True):
            inside = (ids >= offset) & (ids < offset + len(shard))
            own = torch.where(inside, ids - offset, -1)
            total = total + shard.weighted_sum(own.to(shard.device), weights.to(shard.device)).to(ids.device)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total  # type: ignore[no-any-return]


def merge_top_k(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Return the best k of several answers of scores and ids [queries, any] each, best first."""
    scores, ids = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    top, places = scores.topk(min(k, scores.shape[1]))
    return top, ids.gather(1, places)


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _states_to_train(index: Any, kind: str) -> int:
    """Return how many states an untrained index needs: FAISS's own least number for its centroids."""
    inverted = _faiss().try_extract_index_ivf(index)
    return _STATES_PER_CENTROID * max(256 if "PQ" in kind else 1, inverted.nlist if inverted else 1)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise missing("a FAISS index", "faiss", "faiss") from error
    return faiss
