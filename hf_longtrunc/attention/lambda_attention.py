r"""The Λ-shaped mask with its distance ceiling, as attention over tensors.

With window L, S sinks and ceiling D >= L, for a query at position i and a key at position j <= i, both counted from
the row's first real token:

    visible(i, j)  = i - j < L  or  j < S          distance(i, j) = min(i - j, D)

and one softmax over all that is visible. Keys nearer than L form the *local* set; a sink that has left the window is
seen through the *far* set, where its score is <R(D) q, k>: R(D - i) turns a rotated query to distance D of every sink
at once, whatever i is, so the far set costs n S dot products and no per-pair rotation.

Invariants:
- O(n (S + L)) time. A query block meets the S sinks and the L - 1 + block keys before its end, never more, and no
  n x n tensor exists, of scores or of booleans. Under autograd every block is recomputed in the backward pass.
- a position below zero is padding: as a key it is invisible; as a query its output is finite and means nothing.
- positions are taken as differences only, so a row may start anywhere.

Sources: Han et al. 2024, "LM-Infinite", arXiv 2308.16137, section 3.2. Deviation: an old sink's distance is
min(i - j, D) for any D >= L; the paper has D = L.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_longtrunc.attention.joined import Part, joined_attention
from hf_longtrunc.attention.rotary import Rotation  # noqa: TC001  tests check it at run time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float, Int

    from hf_longtrunc.attention.joined import Sees

PATHS = ("auto", "joined", "sdpa", "eager", "flex", "varlen", "triton")
_WHOLE = {"flex": "flex", "varlen": "varlen", "triton": "fused"}  # one kernel call for all queries: the module of each
LONG_PROMPTS = "flex"  # on CUDA; the table of recipes/gpu.py decides which
_JOINED_BLOCK = 256  # queries that share kernel calls without masks
_READING_BLOCK = 64  # queries that read the middle together: their scores of every key exist at once


class Scoring(NamedTuple):
    """How a pair becomes a logit: scaling * <q, k>, soft-capped, minus slope * distance.

    Attributes:
        scaling: factor of the dot product.
        softcap: c in c * tanh(score / c), or None.
        slopes: ALiBi's slope of each query head [heads], or None.
        null_logits: a learned logit of each query head [heads] that joins the softmax and carries no value, or None.
        dropout: probability that an attention weight is dropped.
    """

    scaling: float
    softcap: float | None = None
    slopes: Tensor | None = None
    null_logits: Tensor | None = None
    dropout: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether an ordinary attention kernel computes it."""
        return self.softcap is None and self.slopes is None and self.null_logits is None


class Retrieved(NamedTuple):
    """Keys of their own for each head and query, as they join the softmax.

    Attributes:
        scores: logits [batch, heads, n, k]; the least number that there is for a key that is not to be seen.
        value: [batch, heads, n, k, value_dim], or [batch, heads, 1, k, value_dim] where all queries see the same.
    """

    scores: Tensor
    value: Tensor


def visible(
    query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"], num_sink_tokens: int, window: int
) -> Bool[Tensor, "... n m"]:
    """Return whether a query sees a key: j <= i and (i - j < window or j < num_sink_tokens), padding never."""
    i, j = query_positions[..., :, None], key_positions[..., None, :]
    return (j >= 0) & (j <= i) & ((i - j < window) | (j < num_sink_tokens))


def distance(
    query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"], max_distance: int
) -> Int[Tensor, "... n m"]:
    """Return min(i - j, max_distance)."""
    return (query_positions[..., :, None] - key_positions[..., None, :]).clamp_max(max_distance)


def lambda_attention(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    value: Float[Tensor, "batch kv_heads m value_dim"],
    query_positions: Int[Tensor, "rows n"],
    key_positions: Int[Tensor, "rows m"],
    *,
    sinks: tuple[Tensor, Tensor] | None,
    window: int,
    max_distance: int,
    scoring: Scoring,
    rotation: Rotation | None = None,
    path: str = "auto",
    block_size: int = 512,
    read: Callable[[Tensor, Tensor, Tensor], Retrieved | None] | None = None,
    reading_rows: int = 0,
    is_padded: bool = False,
) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend over a window of keys and the row's first keys.

    Args:
        query: rotated at its own positions.
        key: rotated at its own positions, in the order of the text and ending with the n queries' own keys.
        value: of the keys; its dimension may differ from theirs.
        query_positions: counted from each row's first real token; `rows` is the batch, or 1 where all rows agree.
        key_positions: likewise, one step apart; negative is padding.
        sinks: keys [batch, kv_heads, S, dim] and values of positions 0..S-1, rotated there; None where no query has
            a position of `window` or more. What they hold at positions that do not exist yet is not read.
        window: L, at least 1.
        max_distance: D, at least L.
        scoring: scale, cap, slopes.
        rotation: of queries and keys; None leaves them, as layers without rotary positions want it.
        path: "joined" (CPU; several kernel calls without masks for each block of up to 256 queries), "sdpa" (any
            device; one call with a mask, which "joined" falls back to for padded rows, dropout, a value dimension of
            its own and the few queries that some of the sinks are near to), "eager" (any device and any scoring; the
            only one for soft-capping, slopes and null logits), "flex" (CUDA; FlexAttention), "varlen" (CUDA, half
            precision; PyTorch's kernel for rows of unlike length), "triton" (CUDA; a kernel of our own), these two
            without gradients and never chosen by themselves, or "auto".
        block_size: queries taken together by the blockwise paths.
        read: `read(query, query_positions, logits)`, given the logits of window and sinks [batch, heads, n, S + m],
            returns what else some of the queries see; None: nothing.
        reading_rows: how many of the last queries do; they take the "eager" path.
        is_padded: whether positions below zero may occur in a row; one that has none needs fewer masks.

    Returns:
        [batch, heads, n, value_dim] in the dtype of `query`.
    """
    task = _Task(
        query, key, value, query_positions, key_positions, sinks, window, max_distance, scoring, rotation, read
    )
    path = choose_path(path, scoring, query)
    if read is not None:
        return _with_reading_rows(task, max(0, query.shape[2] - reading_rows), path, block_size, is_padded)
    if path in _WHOLE:
        return _in_one_call(task, path, is_padded)
    remember = torch.is_grad_enabled() and query.requires_grad and query.shape[2] > block_size
    blocks = []
    for start, stop, is_joined in _spans(task, path, block_size):
        if is_joined:
            blocks.append(_attend_joined(task, start, stop))
        elif remember:
            blocks.append(checkpoint(_attend_block, task, start, stop, path, use_reentrant=False))
        else:
            blocks.append(_attend_block(task, start, stop, path))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _in_one_call(task: _Task, path: str, is_padded: bool) -> Tensor:
    """`lambda_attention` by one kernel for all queries."""
    kernel = _kernel(path)
    if path == "triton":
        return kernel(
            *task[:3],
            task.key_positions,
            task.sinks,
            task.window,
            task.max_distance,
            task.scoring.scaling,
            task.rotation,
        )
    far = None
    if task.sinks is not None:
        sink_positions = torch.arange(task.sinks[0].shape[2], device=task.key.device)[None]
        far = _far_scores(task, task.query, task.query_positions, sink_positions), task.sinks[1]
    options = {"is_padded": is_padded} if path == "flex" else {}
    return kernel(*task[:5], far, task.window, task.scoring.scaling, **options)


def _kernel(path: str) -> Callable[..., Tensor]:
    """Return the function of a path of one kernel, whose package is asked for here.

    Raises:
        ImportError: it is not installed, or too old.
    """
    name = _WHOLE[path]
    try:
        module = import_module(f"hf_longtrunc.attention.{name}")
    except ImportError as error:
        raise ImportError(f"path {path!r} cannot be had here ({error}): use 'auto'", name=error.name) from error
    kernel: Callable[..., Tensor] = getattr(module, f"{name}_lambda_attention")
    return kernel


def _with_reading_rows(task: _Task, first: int, path: str, block_size: int, is_padded: bool) -> Tensor:
    """`lambda_attention` of the queries before `first`, and of the others with what they read."""
    n = task.query.shape[2]
    spans = [(start, min(start + _READING_BLOCK, n)) for start in range(first, n, _READING_BLOCK)]
    parts = [_attend_block(task, start, stop, "eager") for start, stop in spans]
    if first:
        keys = task.key.shape[2] - (n - first)
        before = lambda_attention(
            task.query[:, :, :first],
            task.key[:, :, :keys],
            task.value[:, :, :keys],
            task.query_positions[:, :first],
            task.key_positions[:, :keys],
            sinks=task.sinks,
            window=task.window,
            max_distance=task.max_distance,
            scoring=task.scoring,
            rotation=task.rotation,
            path=path,
            block_size=block_size,
            is_padded=is_padded,
        )
        parts.insert(0, before)
    return torch.cat(parts, dim=2)


def single_query_attention(
    query: Float[Tensor, "batch heads 1 dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    value: Float[Tensor, "batch kv_heads m value_dim"],
    distances: Int[Tensor, "rows m"],
    seen: Bool[Tensor, "rows m"] | None,
    scoring: Scoring,
    read: Callable[[Tensor], Retrieved | None] | None = None,
) -> Float[Tensor, "batch heads 1 value_dim"]:
    """Attend with one query a row over keys in any order that already stand at the right distance.

    One ordinary attention call: the heads of a group become the queries of their key head. Every query must see a key;
    `seen` is None where it sees them all, which lets any kernel serve.
    """
    seen = None if seen is None else seen[:, None]
    if read is None and scoring.softcap is None and scoring.slopes is None and scoring.null_logits is None:
        batch, heads, _, dim = query.shape
        wide = max(dim, value.shape[-1])
        mask = None if seen is None else seen[:, None]
        grouped = query.reshape(batch, key.shape[1], -1, dim)
        # `pad` copies even where there is nothing to pad: the whole cache for every token that is decoded.
        width = value.shape[-1]
        if dim != wide:
            grouped, key = F.pad(grouped, (0, wide - dim)), F.pad(key, (0, wide - dim))
        if width != wide:
            value = F.pad(value, (0, wide - width))
        dropout, scale = scoring.dropout, scoring.scaling
        output = F.scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scale)
        return output[..., :width].reshape(batch, heads, 1, -1)
    bias = None if scoring.slopes is None else _bias(scoring.slopes, distances[:, None], query)
    return _eager_attend(query, key, value, seen, scoring, None, bias, read)


def choose_path(path: str, scoring: Scoring, query: Tensor | None = None) -> str:
    """Return the path that `path` names, "auto" resolved."""
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if path == "auto":
        # FlexAttention takes sinks' logits as a constant of its kernel: a good one for inference on long prompts.
        long_prompt = query is not None and query.is_cuda and query.shape[2] >= 1024 and not query.requires_grad
        if scoring.is_plain and long_prompt and not scoring.dropout:
            return LONG_PROMPTS
        on_cpu = query is not None and query.device.type == "cpu"
        return "eager" if not scoring.is_plain else "joined" if on_cpu else "sdpa"
    if path != "eager" and not scoring.is_plain:
        raise ValueError(f"path {path!r} has no soft-capping, ALiBi slopes or null logits: use 'eager' or 'auto'")
    if path == "joined" and query is not None and query.device.type != "cpu":
        raise ValueError(f"path 'joined' is for the CPU, got queries on {query.device}: use 'sdpa' or 'auto'")
    if path in _WHOLE and scoring.dropout:
        raise ValueError(f"path {path!r} has no attention dropout: use 'sdpa', 'eager' or 'auto'")
    if path in ("varlen", "triton") and query is not None:
        if query.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"path {path!r} has no gradients: train with 'auto'")
        if not query.is_cuda:
            raise ValueError(f"path {path!r} is for CUDA, got queries on {query.device}: use 'auto'")
    return path


class _Task(NamedTuple):
    """The arguments of `lambda_attention`, as its blocks share them."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_positions: Tensor
    key_positions: Tensor
    sinks: tuple[Tensor, Tensor] | None
    window: int
    max_distance: int
    scoring: Scoring
    rotation: Rotation | None
    read: Callable[[Tensor, Tensor, Tensor], Retrieved | None] | None


def _spans(task: _Task, path: str, block_size: int) -> Iterator[tuple[int, int, bool]]:
    """Cut the queries into blocks start..stop; the third value says whether kernel calls without masks serve one."""
    n, window, ahead = task.query.shape[2], task.window, task.key.shape[2] - task.query.shape[2]
    if path != "joined" or not _can_join(task):
        yield from ((start, min(start + block_size, n), False) for start in range(0, n, block_size))
        return
    first = int(task.query_positions[0, 0])
    # All sinks are near before the first of these, at the ceiling from the second on.
    edges = (n, n) if task.sinks is None else (window, task.max_distance + task.sinks[0].shape[2] - 1)
    mixed = [min(n, max(0, edge - first)) for edge in edges]
    for begin, end, is_joined in ((0, mixed[0], True), (mixed[0], mixed[1], False), (mixed[1], n, True)):
        start = begin
        while start < end:
            stop = min(end, start + (min(_JOINED_BLOCK, block_size, window - 1) if is_joined else block_size))
            # Windows begin to leave keys behind at the query in column `window`: a block ends there.
            stop = window - ahead if start < window - ahead < stop else stop
            yield start, stop, is_joined
            start = stop


def _can_join(task: _Task) -> bool:
    """Whether all rows are without padding and one position each, and an ordinary kernel computes the scores."""
    is_plain = task.scoring.is_plain and not task.scoring.dropout and task.query.device.type == "cpu"
    is_square = task.query.shape[-1] == task.value.shape[-1] and task.query.shape[2] > 1 and task.window > 1
    is_square &= task.query.dtype == task.key.dtype == task.value.dtype  # under autocast they differ
    one_row = len(task.query_positions) == len(task.key_positions) == 1
    return is_plain and is_square and one_row and int(task.key_positions[0, 0]) >= 0


def _attend_joined(task: _Task, start: int, stop: int) -> Tensor:
    """Attention of queries start..stop, fewer than `window`, in kernel calls without masks.

    Every query sees its block's keys before it, all keys between the block and the last query's window, and of the
    keys that windows of this block leave one after another those that its own has not left.
    """
    ahead = task.key.shape[2] - task.query.shape[2]
    first, last = ahead + start, ahead + stop  # columns of the block's own keys
    reach = max(0, last - task.window + 1)  # from here on every query sees the keys before the block
    query = task.query[:, :, start:stop]

    def part(first: int, last: int, sees: Sees) -> Part:
        return Part(query, task.key[:, :, first:last], task.value[:, :, first:last], sees)

    parts = [part(first, last, "up_to")]
    left = max(0, first - task.window + 1)  # the first key that the first query sees
    if left < reach:
        parts.append(part(left, reach, "from"))
    if reach < first:
        parts.append(part(reach, first, "all"))
    if task.sinks is not None and int(task.query_positions[0, start]) >= task.window:
        key, value = task.sinks
        if task.rotation is not None:
            query = task.rotation.rotate(query, task.max_distance - task.query_positions[:, start:stop])
            key = task.rotation.rotate(key, -torch.arange(key.shape[2], device=key.device)[None])
        parts.append(Part(query, key, value))
    return joined_attention(parts, task.scoring.scaling)


def _attend_block(task: _Task, start: int, stop: int, path: str) -> Tensor:
    """Attention of queries start..stop over the keys that their windows span, and the sinks."""
    ahead = task.key.shape[2] - task.query.shape[2]  # keys before the first query
    keys = slice(max(0, ahead + start - task.window + 1), ahead + stop)
    query, i = task.query[:, :, start:stop], task.query_positions[:, start:stop]
    key, value, j = task.key[:, :, keys], task.value[:, :, keys], task.key_positions[:, keys]
    seen, slopes, far = visible(i, j, 0, task.window), task.scoring.slopes, None
    bias = None if slopes is None else _bias(slopes, distance(i, j, task.max_distance), query)
    if task.sinks is not None:
        sink_positions = torch.arange(task.sinks[0].shape[2], device=key.device)[None]
        far = _far_scores(task, query, i, sink_positions)
        seen = torch.cat([i[:, :, None] - sink_positions[:, None] >= task.window, seen], dim=-1)
        value = torch.cat([task.sinks[1], value], dim=2)
    read = None if task.read is None else partial(task.read, query, i)
    return _attend(query, key, value, seen, task.scoring, path, far, bias, read)


def _far_scores(task: _Task, query: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Logits [batch, heads, n, S] of queries at i [rows, n] with the sinks at distance min(i - j, D)."""
    assert task.sinks is not None
    key = task.sinks[0]
    if task.rotation is None:
        scores = grouped_scores(query, key)
    else:
        scores = grouped_scores(task.rotation.rotate(query, task.max_distance - i), task.rotation.rotate(key, -j))
        if task.max_distance > task.window:
            near = (i[:, :, None] - j[:, None] < task.max_distance)[:, None]
            scores = torch.where(near, grouped_scores(query, key), scores)
    scores = _capped(scores * task.scoring.scaling, task.scoring.softcap)
    if task.scoring.slopes is not None:
        scores = scores + _bias(task.scoring.slopes, distance(i, j, task.max_distance), query)
    return scores


def constant_scores(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    away: int,
    scoring: Scoring,
) -> Float[Tensor, "batch heads n m"]:
    """Logits of queries that are turned to one distance `away` with un-rotated keys."""
    scores = _capped(grouped_scores(query, key) * scoring.scaling, scoring.softcap)
    if scoring.slopes is None:
        return scores
    return scores - scoring.slopes.to(scores.device, scores.dtype)[:, None, None] * away


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scoring: Scoring,
    path: str,
    far: Tensor | None = None,
    bias: Tensor | None = None,
    read: Callable[[Tensor], Retrieved | None] | None = None,
) -> Tensor:
    """One softmax over S far logits [batch, heads, n, S], where there are any, m keys, and what is read besides.

    `value` [batch, kv_heads, S + m, value_dim] and `seen` [rows, n, S + m] begin with the far set; `bias` joins the
    scores of the m keys.
    """
    if path == "eager":
        return _eager_attend(query, key, value, seen, scoring, far, bias, read)
    # A padding query sees everything rather than nothing: its output is finite, and nobody reads it.
    return _sdpa_attend(query, key, value, seen | ~seen.any(-1, keepdim=True), scoring, far)


def _eager_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scoring: Scoring,
    far: Tensor | None,
    bias: Tensor | None,
    read: Callable[[Tensor], Retrieved | None] | None,
) -> Tensor:
    scores = _capped(grouped_scores(query, key) * scoring.scaling, scoring.softcap)
    scores = scores if bias is None else scores + bias
    scores = scores if far is None else torch.cat([far, scores], dim=-1)
    scores = scores if seen is None else scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    retrieved = None if read is None else read(scores)
    if retrieved is not None:
        scores = torch.cat([scores, retrieved.scores], dim=-1)
    count = scores.shape[-1]
    if scoring.null_logits is not None:
        null = scoring.null_logits.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, null], dim=-1)
    weights = scores.softmax(-1)[..., :count].to(value.dtype)
    weights = F.dropout(weights, scoring.dropout) if scoring.dropout else weights
    batch, heads, n, _ = weights.shape
    m = value.shape[2]
    output = (weights[..., :m].reshape(batch, value.shape[1], -1, m) @ value).view(batch, heads, n, -1)
    if retrieved is not None:
        output = output + (weights[..., None, m:] @ retrieved.value.to(weights.dtype))[..., 0, :]
    return output


def _sdpa_attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scoring: Scoring, far: Tensor | None
) -> Tensor:
    batch, heads, n, value_dim = *query.shape[:3], value.shape[-1]
    if far is not None:
        query, key = _with_far_dimensions(query, key, far / scoring.scaling)
    dim = max(query.shape[-1], value_dim)
    query, key, value = (F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if seen is None else seen[:, None],
        dropout_p=scoring.dropout,
        scale=scoring.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[..., :value_dim].reshape(batch, heads, n, value_dim)


def _with_far_dimensions(query: Tensor, key: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """Let any attention kernel add the far logits: as dot products over dimensions of their own.

    Query [q, far] meets key [k, 0] of the local set and key [0, identity] of the far set, so the mask stays a boolean
    that all heads share. In half precision the logits are held as a rounded value and its remainder, 16 bits or more.
    """
    parts = [far.to(query.dtype)]
    if query.dtype in (torch.float16, torch.bfloat16):
        parts.append((far - parts[0]).to(query.dtype))
    sinks = far.shape[-1]
    identity = torch.eye(sinks, dtype=key.dtype, device=key.device).repeat(1, len(parts))  # [S, parts * S]
    far_key = F.pad(identity, (key.shape[-1], 0)).expand(*key.shape[:2], -1, -1)
    return torch.cat([query, *parts], dim=-1), torch.cat([far_key, F.pad(key, (0, identity.shape[-1]))], dim=2)


def _bias(slopes: Tensor, distances: Tensor, query: Tensor) -> Tensor:
    """ALiBi's part of the logits [rows, heads, n, m] at distances [rows, n, m]."""
    return -slopes.to(query.device, torch.promote_types(query.dtype, torch.float32))[:, None, None] * distances[:, None]


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def grouped_scores(
    query: Float[Tensor, "batch heads n dim"], key: Float[Tensor, "batch kv_heads m dim"]
) -> Float[Tensor, "batch heads n m"]:
    """Return the dot products, in fp32 or better, of each query head with its group's key head."""
    batch, heads, n, dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, key.shape[1], -1, dim)
    return (grouped @ key.to(wide).transpose(-1, -2)).view(batch, heads, n, key.shape[2])
