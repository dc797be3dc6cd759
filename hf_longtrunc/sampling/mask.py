r"""The kept set of each step, and log-probabilities of the truncated distribution.

A truncated sampler draws from q(x) = p(x) / p(K) on a kept set K. Reinforcement learning needs log q of the drawn
tokens, with its gradient; trainers score log p, lower by -log p(K) at every token. With z the logits over temperature:

    log q(x) = z_x - logsumexp(z over K)        d log q(x) / dz_j = [j = x] - [j in K] q(j)

The gradient takes K as constant: it changes only where a token crosses a threshold, on a set of measure zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_longtrunc.arguments import check_float, check_int, check_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from jaxtyping import Bool, Float, Int, UInt8

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]
    Ids = np.ndarray[Any, np.dtype[Any]]

_IGNORED = -100  # the label of a position that is not scored, as in transformers' losses
# The fp32 buffers of one part are 1,024 rows x 4,096 tokens, 16 MB each, whatever the batch.
_ROWS, _TOKENS = 1024, 4096
_Z_FLOOR = -200.0  # exp of it is 0 in fp32
_BIT = torch.arange(8, dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class SamplingMask:
    """The kept sets of consecutive steps. A step is stored as token ids or as one bit a token, whichever is smaller.

    Examples:
        >>> mask = SamplingMask.from_kept(torch.tensor([[True, False, True], [False, True, False]]))
        >>> mask.counts, mask.kept()[1]
        (tensor([2, 1]), tensor([False,  True, False]))

    A step takes 2 (V <= 65,536) or 4 bytes for each kept token, at most V / 8. Slices of steps are masks again.

    Attributes:
        vocab_size: V.
        offsets: int64 [steps + 1]; step i is data[offsets[i] : offsets[i + 1]].
        data: uint8; a step of ceil(V / 8) bytes is bits, lowest first, any other is ids in ascending order.
    """

    vocab_size: int
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    data: Bytes

    @classmethod
    def from_kept(cls, kept: Bool[Tensor, "steps vocab"]) -> SamplingMask:
        """Make a mask of a boolean tensor, packed on its device."""
        if kept.dtype != torch.bool or kept.ndim != 2:
            raise TypeError(f"kept must be a boolean tensor [steps, vocabulary], got {kept.dtype} {list(kept.shape)}")
        vocab_size = kept.shape[-1]
        dtype = _id_dtype(vocab_size)
        steps = []
        for row in pack_bits(kept).cpu().numpy():
            ids = np.flatnonzero(np.unpackbits(row, count=vocab_size, bitorder="little")).astype(dtype)
            steps.append(ids.view(np.uint8) if ids.nbytes < row.nbytes else row)
        return cls._joined(vocab_size, steps)

    @classmethod
    def from_ids(cls, ids: Iterable[Sequence[int]], vocab_size: int) -> SamplingMask:
        """Make a mask of lists of token ids, as in vLLM's `CompletionOutput.sampling_mask.token_ids`.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        check_int("vocab_size", vocab_size, minimum=1)
        steps = []
        for step, each in enumerate(ids):
            kept = np.unique(np.asarray(each, dtype=np.int64))
            if kept.size and not 0 <= kept[0] <= kept[-1] < vocab_size:
                raise ValueError(
                    f"ids[{step}] must lie in [0, {vocab_size}), got {kept[0]} to {kept[-1]}; pass the logits' own "
                    "vocab_size, padding included"
                )
            row = kept.astype(_id_dtype(vocab_size)).view(np.uint8)
            steps.append(row if row.size < _row_bytes(vocab_size) else _bits_of(kept, vocab_size))
        return cls._joined(vocab_size, steps)

    @classmethod
    def cat(cls, masks: Sequence[SamplingMask]) -> SamplingMask:
        """Return the steps of several masks, one after the other."""
        sizes = {mask.vocab_size for mask in masks}
        if len(sizes) != 1:
            raise ValueError(f"masks must be at least one, all of one vocabulary, got sizes {sorted(sizes)}")
        return cls._joined(sizes.pop(), [step for mask in masks for step in mask._steps()])

    @property
    def counts(self) -> Int[Tensor, " steps"]:
        """How many tokens each step kept."""
        return self.kept().sum(-1)

    @property
    def nbytes(self) -> int:
        """Memory in bytes, 8 for each step's offset included."""
        return self.data.nbytes + self.offsets.nbytes

    def kept(self) -> Bool[Tensor, "steps vocab"]:
        """Return the kept sets as booleans. Cost: a byte for each token of the vocabulary and step."""
        return unpack_bits(self.bits(), 0, self.vocab_size)

    def bits(self) -> UInt8[Tensor, "steps bytes"]:
        """Return the kept sets as one bit a token, lowest first, [steps, ceil(V / 8)]."""
        rows = np.zeros((len(self), _row_bytes(self.vocab_size)), np.uint8)
        for row, step in zip(rows, self._steps(), strict=True):
            ids = step if step.size == row.size else step.view(_id_dtype(self.vocab_size))
            row[:] = ids if ids is step else _bits_of(ids, self.vocab_size)
        return torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, steps: object) -> SamplingMask:
        if not isinstance(steps, slice):
            raise TypeError(f"a SamplingMask is indexed by a slice of steps, got {steps!r}; kept()[step] is one set")
        return self._joined(self.vocab_size, list(self._steps())[steps])

    def __repr__(self) -> str:
        each = f", {self.nbytes / len(self):.1f} bytes a step" if len(self) else ""
        return f"<SamplingMask of {len(self):,} steps over {self.vocab_size:,} tokens{each}>"

    @classmethod
    def _joined(cls, vocab_size: int, steps: Sequence[Bytes]) -> SamplingMask:
        offsets = np.cumsum([0, *(step.size for step in steps)], dtype=np.int64)
        return cls(vocab_size, offsets, np.concatenate([np.zeros(0, np.uint8), *steps]))

    def _steps(self) -> Iterator[Bytes]:
        return (self.data[start:end] for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True))


class TruncatedScores(NamedTuple):
    """The result of `truncated_scores`, in the shape of the labels; 0 where a label is -100."""

    log_probs: Float[Tensor, "*steps"]  # log q of the labels; gradients flow to the logits
    log_kept_mass: Float[Tensor, "*steps"]  # log p(K), no gradient; the importance ratio q / p is exp(-log_kept_mass)
    entropy: Float[Tensor, "*steps"]  # of q in nats; gradients flow to the logits


def truncated_log_probs(
    logits: Float[Tensor, "*steps vocab"],
    labels: Int[Tensor, "*drawn"],
    mask: SamplingMask | Sequence[SamplingMask],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*steps"]:
    """Return log q of the labels, q the softmax of `logits` / `temperature` over the kept sets alone.

    Examples:
        >>> recorder = SamplingMaskRecorder()
        >>> with recorder.attach(model):
        ...     sequences = model.generate(ids, **sampling_settings(model), max_new_tokens=3)
        >>> logits = model(sequences).logits[:, ids.shape[1] - 1 : -1]
        >>> labels = sequences[:, ids.shape[1] :]  # -100 in padding
        >>> log_probs = truncated_log_probs(logits, labels, recorder.take())  # a mask for each row

    Args:
        logits: any floating dtype. Sums are taken in fp32 (float64 for float64), in parts of 1,024 x 4,096.
        labels: the drawn tokens; -100 is not scored: log-probability 0, gradient 0.
        mask: of every step in order, or for logits [batch, time, vocab] one for each row of the batch; labels past the
            last step of a row's mask must be -100.
        temperature: the one at which the tokens were drawn.

    Raises:
        ValueError: shapes or vocabularies that do not fit; a label that its step did not keep.

    Cost: two passes over the logits forward and one backward, one host synchronisation; memory: V / 8 bytes a step on
    the logits' device, and backward the gradient in the logits' dtype.
    """
    return truncated_scores(logits, labels, mask, temperature=temperature).log_probs


def truncated_scores(
    logits: Float[Tensor, "*steps vocab"],
    labels: Int[Tensor, "*drawn"],
    mask: SamplingMask | Sequence[SamplingMask],
    *,
    temperature: float = 1.0,
) -> TruncatedScores:
    """Return log q of the labels with the kept mass and the entropy of each step, in one pass.

    Examples:
        >>> mask = SamplingMask.from_kept(torch.tensor([[True, True, False]]))
        >>> truncated_scores(torch.zeros(1, 3), torch.tensor([0]), mask).log_kept_mass.exp()
        tensor([0.6667])

    Arguments, errors and cost as for `truncated_log_probs`.
    """
    temperature = check_float("temperature", temperature, gt=0)
    for name, value in (("logits", logits), ("labels", labels)):
        check_tensor(name, value)
    bits = _checked_bits(logits, labels, mask)
    flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    is_scored = wanted != _IGNORED
    tokens = wanted.clamp(0, logits.shape[-1] - 1)[:, None]
    is_kept = bits.gather(1, tokens >> 3) >> (tokens & 7).to(torch.uint8) & 1
    wrong = is_scored & ((is_kept[:, 0] == 0) | (tokens[:, 0] != wanted))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels has token {int(wanted[first])} at step {first} (of the flattened steps), which its mask does not "
            "keep: the mask is of other tokens; give -100 to what was not drawn, padding after an end for instance"
        )
    results = _Scores.apply(flat, tokens, is_scored, bits, temperature)  # type: ignore[no-untyped-call]
    return TruncatedScores(*(each.reshape(labels.shape) for each in results))


def pack_bits(kept: Bool[Tensor, "steps vocab"]) -> UInt8[Tensor, "steps bytes"]:
    """Return one bit a token, lowest first, on the device of `kept`."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 8)).to(torch.uint8)
    return (padded.view(len(kept), -1, 8) << _BIT.to(kept.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: UInt8[Tensor, "steps bytes"], start: int, end: int) -> Bool[Tensor, "steps tokens"]:
    """Return tokens `start` (a multiple of 8) to `end` of packed bits as booleans."""
    part = bits[:, start // 8 : (end + 7) // 8, None] >> _BIT.to(bits.device) & 1
    return part.flatten(-2)[:, : end - start].bool()


class _Scores(torch.autograd.Function):
    """Log q, log p(K) and the entropy of q for rows of logits [n, V], without a copy of them in another dtype."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, is_scored: Tensor, bits: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        drawn = logits.gather(1, tokens)[:, 0].to(dtype) / temperature
        parts = [_sums(logits[rows], bits[rows], temperature, dtype) for rows in _parts(len(logits), _ROWS)]
        log_kept, log_all, mean = (torch.cat(each) for each in zip(*parts, strict=True)) if parts else (drawn,) * 3
        log_probs = (drawn - log_kept).masked_fill(~is_scored, 0)
        log_kept_mass = (log_kept - log_all).clamp_max(0).masked_fill(~is_scored, 0)
        entropy = (log_kept - mean).masked_fill(~is_scored, 0)
        ctx.save_for_backward(logits, tokens, is_scored, bits, log_kept.masked_fill(~is_scored, 0), entropy)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(log_kept_mass)
        return log_probs, log_kept_mass, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, is_scored, bits, log_kept, entropy = ctx.saved_tensors
        weight, slope = ((each * is_scored / ctx.temperature)[:, None] for each in (gradient, of_entropy))
        result = torch.empty_like(logits)
        for rows in _parts(len(logits), _ROWS):
            for part, z, kept in _token_parts(logits[rows], bits[rows], ctx.temperature, weight.dtype):
                result[rows, part] = _slope(z, kept, log_kept[rows], entropy[rows], weight[rows], slope[rows])
            # The label's entry is rounded once: where q is near 1, 1 - q is near 0.
            z = logits[rows].gather(1, tokens[rows]).to(weight.dtype) / ctx.temperature
            own = weight[rows] + _slope(z, True, log_kept[rows], entropy[rows], weight[rows], slope[rows])
            result[rows] = result[rows].scatter(1, tokens[rows], own.to(result.dtype))
        return result, None, None, None, None


def _slope(z: Tensor, kept: Tensor | bool, log_kept: Tensor, entropy: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """Return -q (weight + slope (log q + H)): each token's share of the gradient through the sums over K."""
    log_q = (z - log_kept[:, None]).clamp_(_Z_FLOOR, 0)  # 0 bounds the rows that are not scored
    return log_q.exp() * kept * -(weight + slope * (log_q + entropy[:, None]))


def _sums(logits: Tensor, bits: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logsumexp of z over the kept set, over all tokens, and the mean of z under q, each [rows]."""
    highest = logits.amax(-1, keepdim=True).to(dtype) / temperature
    highest_kept = torch.full_like(highest, -torch.inf)
    for _, z, kept in _token_parts(logits, bits, temperature, dtype):
        torch.maximum(highest_kept, z.masked_fill(~kept, -torch.inf).amax(-1, keepdim=True), out=highest_kept)
    highest_kept = highest_kept.nan_to_num(neginf=0.0)  # of rows that keep nothing, which are not scored
    total, total_kept, weighted = (torch.zeros_like(highest) for _ in range(3))
    for _, z, kept in _token_parts(logits, bits, temperature, dtype):
        total += (z - highest).exp_().sum(-1, keepdim=True)
        z = z.sub_(highest_kept).clamp_(_Z_FLOOR, 0)
        q = z.exp().mul_(kept)
        total_kept += q.sum(-1, keepdim=True)
        weighted += q.mul_(z).sum(-1, keepdim=True)
    mean = highest_kept + weighted / total_kept
    return (highest_kept + total_kept.log())[:, 0], (highest + total.log())[:, 0], mean[:, 0]


def _token_parts(
    logits: Tensor, bits: Tensor, temperature: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield parts of the vocabulary: a slice, its z [rows, tokens] as a new tensor, and its kept tokens."""
    for part in _parts(logits.shape[-1], _TOKENS):
        yield part, logits[:, part].to(dtype) / temperature, unpack_bits(bits, part.start, part.stop)


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _checked_bits(logits: Tensor, labels: Tensor, mask: SamplingMask | Sequence[SamplingMask]) -> Tensor:
    """Return the kept sets of the flattened steps, as bits on the logits' device."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of logits without the vocabulary, {list(logits.shape[:-1])}, got "
            f"{list(labels.shape)}; logits of the step before a token are its own: logits[:, :-1] for ids[:, 1:]"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 token ids, got {labels.dtype}")
    masks = [mask] if isinstance(mask, SamplingMask) else list(mask)
    if not all(isinstance(each, SamplingMask) for each in masks):
        raise TypeError(f"mask must be a SamplingMask, or one for each row, got {type(mask).__name__}")
    if other := {each.vocab_size for each in masks} - {logits.shape[-1]}:
        raise ValueError(f"mask is of {other.pop():,} tokens and logits are of {logits.shape[-1]:,}: one model's both")
    if isinstance(mask, SamplingMask):
        if len(mask) != labels.numel():
            raise ValueError(f"mask must have one step for each of {labels.numel()} labels, got {len(mask)}")
        return mask.bits().to(logits.device)
    if labels.ndim != 2 or len(masks) != len(labels):
        raise ValueError(
            f"mask must be one SamplingMask for each row of labels [batch, time], got {len(masks)} for "
            f"{list(labels.shape)}"
        )
    bits = torch.zeros(*labels.shape, _row_bytes(logits.shape[-1]), dtype=torch.uint8)
    for row, each in zip(bits, masks, strict=True):
        row[: len(each)] = each.bits()[: len(row)]
    return bits.flatten(0, 1).to(logits.device)


def _bits_of(ids: Ids, vocab_size: int) -> Bytes:
    kept = np.zeros(vocab_size, np.uint8)
    kept[ids] = 1
    return np.packbits(kept, bitorder="little")


def _row_bytes(vocab_size: int) -> int:
    return (vocab_size + 7) // 8


def _id_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
