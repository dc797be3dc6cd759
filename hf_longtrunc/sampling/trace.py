"""What a sampler cut at every step: entropy, threshold, tokens and mass kept, and the token that was drawn."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_longtrunc.arguments import whole
from hf_longtrunc.extras import missing
from hf_longtrunc.models import unwrapped
from hf_longtrunc.sampling.attach import rebuild_processor_list
from hf_longtrunc.sampling.calls import WARPERS, neighbours
from hf_longtrunc.sampling.cutoffs import softmax_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from torch import Tensor

    from hf_longtrunc.handles import Handle

# Speculative decoding asks about several positions ahead and may take them back; it runs at batch size 1 only.
_OPEN_STEPS_OF_ONE_ROW = 64


@dataclass(frozen=True)
class TruncationRecord:
    """One row of scores as a truncation sampler met it; probabilities are those before the first processor.

    Attributes:
        run: which generation, counted from 0; a new prompt starts a new one.
        row: row of the batch (under beam search: the beam's slot).
        position: tokens before this one, padding included.
        entropy: of the full distribution, in nats.
        threshold: probability that the last processor with a `threshold` method held the tokens against, or None.
        lowest_kept: the smallest probability that was kept.
        kept: how many tokens can still be drawn.
        kept_mass: their probability.
        kept_below: how many of them lie below the threshold, None without one: what basis-aware truncation rescued.
        cut_above: how many tokens at or above the threshold were cut, None without one. A processor that draws itself
            (basis-aware truncation in sample mode) leaves one token and cuts every other in this count.
        token, probability, rank: the token that was drawn (1 = the most probable), None while it is unknown.
        critical_threshold: that token's basis-aware probability, where the trace was asked for it.
    """

    run: int
    row: int
    position: int
    entropy: float
    threshold: float | None
    lowest_kept: float
    kept: int
    kept_mass: float
    kept_below: int | None = None
    cut_above: int | None = None
    token: int | None = None
    probability: float | None = None
    rank: int | None = None
    critical_threshold: float | None = None


class _OpenStep(NamedTuple):
    """A step whose token is not known yet, or may still be taken back."""

    ids: Tensor  # [rows, position], on the CPU
    log_probs: Tensor  # [rows, vocab], where the scores are
    keys: list[tuple[int, int, int]]


class _Reading(threading.local):
    """The generation that one thread is in: its run's number, and the steps whose tokens are not known yet."""

    def __init__(self) -> None:
        self.run = -1
        self.open: deque[_OpenStep] = deque()

    def __reduce__(self) -> tuple[type[_Reading], tuple[()]]:
        """Copy and pickle without the generation, which stays in its thread."""
        return _Reading, ()


# Records of several threads go into one trace.
_WRITING = threading.Lock()


class TruncationTrace(LogitsProcessor):
    """Applies processors and records, per step and row, what they cut.

    Two ways in. `generate(logits_processor=[TruncationTrace([EtaLogitsProcessor(...)])])` watches the processors that
    it is given. `with trace.observe(model): model.generate(..., top_p=0.9)` watches the whole list that `generate`
    builds, transformers' own warpers included. Scores and results are never changed by the watching.

    A drawn token is read off the next call's `input_ids` by matching prefixes, so permuted beams, speculative
    decoding and calls that are taken back are followed. `finish(sequences)` supplies the last one: call it after each
    generation, in its thread, then read `records`, `to_frame()` or `plot()`. Threads that generate at once each have
    runs of their own.

    Args:
        processors: applied in this order; None to watch plain sampling or to `observe`.
        critical_threshold: how to find tau* of drawn tokens: `SupportChecker(basis).critical_threshold`, some ten
            milliseconds a token; None leaves that column empty.
        eos_token_id: a row is not recorded past this token (`observe` takes the model's own).
        max_records: the oldest records beyond so many are dropped, and counted in `dropped`.

    Cost: a softmax and a host synchronisation a step. Memory: 150 bytes or so a record, the last step's
    log-probabilities [rows, vocab], and those of up to 64 steps at batch size 1. Not for continuous batching, whose
    calls do not say which request a row belongs to: it raises ValueError there.
    """

    # Declared unsupported, it would be left out there, and what it watches with it; this way it is called, and refuses.
    supports_continuous_batching = True

    def __init__(
        self,
        processors: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
        *,
        critical_threshold: Callable[[Tensor, Tensor], Tensor] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        max_records: int = 1_000_000,
    ):
        self.processors = list(processors or [])
        self.critical_threshold = critical_threshold
        self.max_records = whole("max_records", max_records, least=1)
        self._eos = _as_set(eos_token_id)
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded."""
        self.dropped = 0
        self._runs = 0
        self._records: dict[tuple[int, int, int], TruncationRecord] = {}
        self._reading = _Reading()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Apply the processors to `scores` [rows, vocab] and record the step.

        What transformers' own warpers cut behind the trace is no longer drawable, and recorded so.
        """
        return self._watched(self.processors, input_ids, scores, neighbours(self)[1])

    def observe(self, model: Any) -> Handle:
        """Watch the whole processor list of everything that `model` generates, from now until the handle is detached.

        `with trace.observe(model):` detaches it at the end of the block. `model` is a transformers model that
        generates, or a wrapper of one, as for `attach_processors`.
        """

        def watch(build: Callable[..., LogitsProcessorList], *args: Any, **kwargs: Any) -> LogitsProcessorList:
            return LogitsProcessorList([_Watched(self, build(*args, **kwargs))])

        handle = rebuild_processor_list(model, watch, "TruncationTrace", "every processor list is watched")
        self._eos = self._eos or _as_set(unwrapped(model).generation_config.eos_token_id)
        return handle

    def finish(self, sequences: Tensor) -> TruncationTrace:
        """Read the last drawn tokens off `sequences` [rows, length], what `generate` returned in this thread."""
        ids = sequences.detach().cpu()
        with _WRITING:
            self._read_tokens(ids)
            self._take_back(ids.shape[1])
            self._reading.open.clear()
        return self

    @property
    def records(self) -> list[TruncationRecord]:
        """The records in order of run, row and position, each row up to its end-of-sequence token."""
        ended: set[tuple[int, int]] = set()
        kept = []
        for key in sorted(self._records):
            record = self._records[key]
            if key[:2] not in ended:
                kept.append(record)
            if record.token in self._eos:
                ended.add(key[:2])
        return kept

    def to_frame(self) -> pd.DataFrame:
        """Return the records as a pandas frame, a column per field of `TruncationRecord`."""
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise missing("to_frame()", "pandas", "eval") from error
        columns = list(TruncationRecord.__dataclass_fields__)
        frame: pd.DataFrame = pd.DataFrame([asdict(record) for record in self.records], columns=columns)
        return frame

    def plot(self, *, row: int = 0, run: int = 0, axes: Sequence[Axes] | None = None, label: str = "") -> list[Axes]:
        """Draw one row along its text: entropy; threshold and the drawn tokens' probabilities; kept mass.

        Where no processor declares a threshold the smallest kept probability is drawn, and nothing where nothing was
        cut. `axes`: three Axes to draw into, as an earlier call returned them, to lay several samplers over each
        other; None makes a figure of three panels.
        """
        records = [record for record in self.records if record.row == row and record.run == run]
        if not records:
            raise ValueError(f"nothing recorded for row={row}, run={run}: generate with this trace first")
        top, middle, bottom = axes = _three_axes() if axes is None else list(axes)
        steps = [record.position - records[0].position + 1 for record in records]
        (line,) = top.plot(steps, [record.entropy for record in records], label=label, linewidth=1.2)
        color = line.get_color()
        middle.plot(steps, [_bar(record) for record in records], color=color, linewidth=1.2)
        drawn = [math.nan if record.probability is None else record.probability for record in records]
        middle.plot(steps, drawn, ".", color=color, markersize=3)
        bottom.plot(steps, [record.kept_mass for record in records], color=color, linewidth=1.2)
        middle.set_yscale("log")
        if label:
            top.legend(loc="upper left", ncols=4, frameon=False, fontsize="small")
        return axes

    def _watched(
        self, processors: Sequence[Any], input_ids: Tensor, scores: Tensor, behind: Sequence[Any] = ()
    ) -> Tensor:
        if input_ids.ndim == 1:
            raise ValueError(
                "TruncationTrace cannot follow continuous batching (generate_batch() and serving), whose calls do not "
                "say which request a row belongs to: use generate()"
            )
        before, threshold = scores, None
        for processor in processors:
            bar = getattr(processor, "threshold", None)
            threshold = bar(scores) if callable(bar) else threshold
            scores = processor(input_ids, scores)
        drawable = scores
        warpers: list[Any] = [each for each in behind if isinstance(each, WARPERS)]
        for warper in warpers:
            drawable = warper(input_ids, drawable)
        self._record(input_ids.detach().cpu(), before, drawable, threshold)
        return scores

    def _record(self, ids: Tensor, before: Tensor, after: Tensor, threshold: Tensor | None) -> None:
        rows = softmax_rows(before)
        log_probs = rows.z - rows.log_total
        columns = _columns(log_probs, rows.entropy, after, threshold)
        with _WRITING:
            reading = self._reading
            if not self._continues(ids):
                reading.run, self._runs = self._runs, self._runs + 1
                reading.open.clear()
            self._read_tokens(ids)
            self._take_back(ids.shape[1])
            keys = [(reading.run, row, ids.shape[1]) for row in range(ids.shape[0])]
            for key, values in zip(keys, zip(*columns, strict=True), strict=True):
                self._records[key] = TruncationRecord(*key, *values)
            reading.open.append(_OpenStep(ids, log_probs, keys))
            if len(reading.open) > (_OPEN_STEPS_OF_ONE_ROW if ids.shape[0] == 1 else 1):
                reading.open.popleft()
            self._forget_oldest()

    def _continues(self, ids: Tensor) -> bool:
        """Whether some row of `ids` goes on from an open step; a lone row may also go back into one (speculation)."""
        for step in self._reading.open:
            shared = min(step.ids.shape[1], ids.shape[1])
            goes_on = ids.shape[0] == 1 or ids.shape[1] > step.ids.shape[1]
            if goes_on and _same_rows(ids[:, :shared], step.ids[:, :shared]).any():
                return True
        return False

    def _read_tokens(self, ids: Tensor) -> None:
        """Fill in the token of every open step that `ids` reaches past, from a row that goes on from it."""
        for step in self._reading.open:
            position = step.ids.shape[1]
            if position < ids.shape[1]:
                same = _same_rows(ids[:, :position], step.ids)
                # Rows with equal text (several returns of one prompt) each go on from themselves: weigh them first.
                source = (same.int() + torch.eye(*same.shape, dtype=torch.int) * same).argmax(0)
                self._fill_in(step, ids[source, position], same.any(0))

    def _fill_in(self, step: _OpenStep, tokens: Tensor, known: Tensor) -> None:
        """Write tokens [rows] with their probability and rank into the records of `step`, where they are known."""
        drawn = step.log_probs.gather(1, tokens[:, None].to(step.log_probs.device))
        ranks = (step.log_probs > drawn).sum(1) + 1
        columns = known.tolist(), tokens.tolist(), drawn.exp()[:, 0].tolist(), ranks.tolist()
        for key, is_known, token, probability, rank in zip(step.keys, *columns, strict=True):
            if is_known and key in self._records:
                self._records[key] = replace(self._records[key], token=token, probability=probability, rank=rank)
                if self.critical_threshold is not None:
                    self._fill_in_critical(key, step.log_probs[key[1]])

    def _fill_in_critical(self, key: tuple[int, int, int], log_probs: Tensor) -> None:
        record = self._records[key]
        if self.critical_threshold is not None and record.token is not None:
            value = self.critical_threshold(log_probs, torch.tensor([record.token], device=log_probs.device))
            self._records[key] = replace(record, critical_threshold=float(value[0]))

    def _take_back(self, length: int) -> None:
        """Drop what this run recorded at `length` or later: those positions were proposed and not accepted."""
        while self._reading.open and self._reading.open[-1].ids.shape[1] >= length:
            for key in self._reading.open.pop().keys:
                self._records.pop(key, None)

    def _forget_oldest(self) -> None:
        while len(self._records) > self.max_records:
            del self._records[next(iter(self._records))]
            self.dropped += 1


class _Watched(LogitsProcessor):
    """The list that `generate` built, under a trace's eyes."""

    supports_continuous_batching = True

    def __init__(self, trace: TruncationTrace, processors: LogitsProcessorList):
        self.trace, self.processors = trace, processors

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.trace._watched(self.processors, input_ids, scores)


def _columns(log_probs: Tensor, entropy: Tensor, after: Tensor, threshold: Tensor | None) -> list[list[Any]]:
    """Entropy, threshold, lowest kept, number and mass kept, number kept below and cut above: lists over rows."""
    # A token can still be drawn if the sampler's fp32 softmax gives it any probability, whatever the filter value was.
    kept = (after.float() - after.amax(-1, keepdim=True).float()).exp() > 0
    probs = log_probs.exp()
    lowest = probs.masked_fill(~kept, torch.inf).amin(-1)
    mass = probs.masked_fill(~kept, 0).sum(-1).clamp_max(1)
    columns = [entropy[:, 0].tolist(), lowest.tolist(), kept.sum(-1).tolist(), mass.tolist()]
    unknown = [None] * len(lowest)
    if threshold is None:
        return [columns[0], unknown, *columns[1:], unknown, unknown]
    # A token on the bar to fp32 rounding counts as neither.
    below = (kept & (probs < threshold * (1 - 1e-5))).sum(-1).tolist()
    above = (~kept & (probs > threshold * (1 + 1e-5))).sum(-1).tolist()
    return [columns[0], threshold[:, 0].tolist(), *columns[1:], below, above]


def _same_rows(left: Tensor, right: Tensor) -> Tensor:
    """[m, n]: whether row m of `left` [m, length] equals row n of `right` [n, length]."""
    return (left[:, None] == right[None]).all(-1)


def _as_set(token_ids: int | Sequence[int] | None) -> set[int]:
    if token_ids is None:
        return set()
    return {token_ids} if isinstance(token_ids, int) else set(token_ids)


def _bar(record: TruncationRecord) -> float:
    if record.threshold is not None:
        return record.threshold
    return record.lowest_kept if record.kept_mass < 1 - 1e-5 else math.nan


def _three_axes() -> list[Axes]:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise missing("plot()", "matplotlib", "eval") from error
    _, axes = plt.subplots(3, 1, sharex=True, figsize=(9, 6), layout="constrained")
    for panel, name in zip(axes, ("entropy (nats)", "threshold (line),\ndrawn (dots)", "kept mass"), strict=True):
        panel.set_ylabel(name)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("generated token")
    return list(axes)
