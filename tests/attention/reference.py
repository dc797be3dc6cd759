"""What LM-Infinite is, pair by pair in fp64: the judge of every fast path."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hf_longtrunc.attention.lambda_attention import LambdaAttention, SinkWindowLaw


def lambda_attention(
    query,
    key,
    value,
    i,
    j,
    *,
    sinks,
    window,
    max_distance,
    scoring,
    rotation,
    spacing=0,
    path="auto",
    block_size=512,
    **call,
):
    """Attention of LM-Infinite (spacing 0) or StreamingLLM (1) over tensors, by one of its paths."""
    law = SinkWindowLaw(0 if sinks is None else sinks[0].shape[2], window, max_distance, spacing)
    scoring = scoring._replace(rotation=rotation)
    return LambdaAttention(query, key, value, i, j, sinks, law, scoring, **call).attend(path, block_size)


def is_visible(i: int, j: int, sinks: int, window: int) -> bool:
    return 0 <= j <= i and (i - j < window or j < sinks)


@dataclass
class Rope:
    """A layout of rotary positions as a test knows it, written down independently of the package."""

    dim: int  # rotated dimensions, the first of a head
    pairs: bool = False  # neighbours instead of halves
    base: float = 10000.0
    frequencies: Tensor | None = None  # [dim / 2], in place of those of `base`

    def turn(self, x: Tensor, steps: Tensor) -> Tensor:
        """x [..., dim_of_head] by steps, any shape that broadcasts against x's leading ones."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim
        w = self.base**-exponent if self.frequencies is None else self.frequencies.double()
        phase = torch.polar(torch.ones_like(steps[..., None] * w), steps[..., None].double() * w)
        x = x.double()
        part, rest = x[..., : self.dim], x[..., self.dim :]
        if self.pairs:
            plane = torch.complex(part[..., ::2], part[..., 1::2]) * phase
            part = torch.stack([plane.real, plane.imag], dim=-1).flatten(-2)
        else:
            half = self.dim // 2
            plane = torch.complex(part[..., :half], part[..., half:]) * phase
            part = torch.cat([plane.real, plane.imag], dim=-1)
        return torch.cat([part, rest.expand(*part.shape[:-1], -1)], dim=-1)


@dataclass
class Naive:
    """Λ-attention of one row, every pair on its own."""

    sinks: int
    window: int
    max_distance: int
    rope: Rope | None = None
    slopes: Tensor | None = None
    spacing: int = 0  # 1: sinks keep their order before the window, as StreamingLLM's positions within the cache do
    extra: dict[str, float] = field(default_factory=dict)

    def distance(self, i: int, j: int) -> int:
        most = self.max_distance - self.spacing * j if j < self.sinks else max(self.max_distance, i - j)
        return max(0, min(i - j, most))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None = None,
        null_logits: Tensor | None = None,
    ) -> Tensor:
        """[heads, n, dim] each (kv_heads for key and value), unrotated -> [heads, n, value_dim], fp64."""
        heads, n, _ = query.shape
        group = heads // key.shape[0]
        key, value = (x.double().repeat_interleave(group, dim=0) for x in (key, value))
        away = torch.tensor([[self.distance(a, b) for b in range(n)] for a in range(n)])
        seen = torch.tensor([[is_visible(a, b, self.sinks, self.window) for b in range(n)] for a in range(n)])
        turned = query.double()[:, :, None, :].expand(-1, -1, n, -1)
        turned = turned if self.rope is None else self.rope.turn(turned, away)
        scores = (turned * key[:, None]).sum(-1) * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if self.slopes is None else scores - self.slopes.double()[:, None, None] * away
        scores = scores.masked_fill(~seen, -math.inf)
        scores = self.reading(query.double(), key, scores, scaling, softcap)
        if null_logits is not None:
            null = null_logits.detach().double()[:, None, None].expand(heads, n, 1)
            return torch.cat([scores, null], dim=-1).softmax(-1)[..., :-1] @ value
        return scores.softmax(-1) @ value

    def reading(self, query: Tensor, key: Tensor, scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """What more than window and sinks is seen: nothing here."""
        return scores


@dataclass
class NaiveTopK(Naive):
    """The last `rows` rows see, one by one, each head's k best keys that window and sinks have lost."""

    k: int = 0
    away: int = 1
    rows: int = 10**9

    def reading(self, query: Tensor, key: Tensor, scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
        heads, n, _ = query.shape
        scores = scores.clone()
        for i in range(max(0, n - self.rows), n):
            candidates = range(self.sinks, i - self.window + 1)
            for head in range(heads if candidates else 0):
                q = query[head, i] if self.rope is None else self.rope.turn(query[head, i], torch.tensor(self.away))
                found = torch.stack([(q * key[head, j]).sum() * scaling for j in candidates])
                found = found if softcap is None else softcap * torch.tanh(found / softcap)
                found = found if self.slopes is None else found - self.slopes[head].double() * self.away
                for index in found.argsort(descending=True)[: self.k].tolist():
                    scores[head, i, candidates[index]] = found[index]
        return scores


@dataclass
class NaiveBlocks(Naive):
    """The last `rows` rows see the `chosen` blocks; while there are none, they note what they would pay to each.

    A row that has lost a key may choose among all that are `away` or farther. What it still holds, it sees twice. The
    rows are those before the last `behind`. `margin` keys on either side belong to a chosen block; `emphases` are the
    blocks' own.
    """

    size: int = 1
    away: int = 1
    emphasis: float = 1.0
    rows: int = 1
    behind: int = 0
    margin: int = 0
    chosen: list[int] | None = None
    emphases: dict[int, float] = field(default_factory=dict)
    paid: dict[tuple[int, int, int], float] = field(default_factory=dict)  # by layer, head and block
    layer: int = -1

    def best(self, count: int) -> list[int]:
        """Return the blocks that are paid most, by all layers and heads together."""
        together: dict[int, float] = {}
        for (_, _, block), paid in self.paid.items():
            together[block] = together.get(block, 0.0) + paid
        return sorted(together, key=together.__getitem__)[-count:]

    def reading(self, query: Tensor, key: Tensor, scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
        n = query.shape[1]
        scores = scores.clone()
        self.layer += 1
        for i in range(max(0, n - self.behind - self.rows), n - self.behind):
            candidates = range(self.sinks, i - self.away + 1) if i >= self.sinks + self.window else range(0)
            q = query[:, i] if self.rope is None else self.rope.turn(query[:, i], torch.tensor(self.away))
            found = {j: (q * key[:, j]).sum(-1) * scaling for j in candidates}
            if self.chosen is not None:
                for j in candidates:
                    if emphasis := max(
                        (self.emphases.get(b, self.emphasis) for b in self.chosen if self.holds(b, j)), default=0
                    ):
                        scores[:, i, j] = torch.logaddexp(scores[:, i, j], found[j] + math.log(emphasis))
            elif candidates:
                weights = torch.cat([scores[:, i], torch.stack(list(found.values()), -1)], dim=-1).softmax(-1)
                for index, j in enumerate(candidates):
                    block = (j - self.sinks) // self.size
                    for head, paid in enumerate(weights[:, n + index].tolist()):
                        place = self.layer, head, block
                        self.paid[place] = self.paid.get(place, 0.0) + paid
        return scores

    def holds(self, block: int, j: int) -> bool:
        """Whether a key is read with a block."""
        first = self.sinks + block * self.size
        return first - self.margin <= j < first + self.size + self.margin


def install(model, naive: Naive, name: str = "naive_lambda", below: tuple[int, Naive] | None = None) -> None:
    """Let an unpatched interface model compute its full-attention layers by `naive` (one row, no cache).

    `below` = (layer, other): the layers before that one take `other`.
    """

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        if attention_mask is not None:  # a layer with a window of its own
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            if s_aux is not None:
                eager = sys.modules[type(module).__module__].eager_attention_forward
                added = torch.zeros(attention_mask.shape).masked_fill(~attention_mask, -math.inf)
                return eager(module, query, key, value, added, scaling=scaling, s_aux=s_aux)
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        positions = torch.arange(query.shape[2])
        mine = below[1] if below is not None and module.layer_idx < below[0] else naive
        rows = []
        for q, k, v in zip(query, key, value, strict=True):
            q, k = (x if mine.rope is None else mine.rope.turn(x, -positions) for x in (q, k))
            rows.append(mine(q, k, v, scaling or query.shape[-1] ** -0.5, softcap, s_aux))
        return torch.stack(rows).to(query.dtype).transpose(1, 2).contiguous(), None

    def mask(*args, local_size=None, **kwargs):
        return (
            None
            if local_size is None
            else sdpa_mask(*args, local_size=local_size, **{**kwargs, "allow_is_causal_skip": False})
        )

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
