"""What a sampler cut at every step: entropy, threshold, tokens and mass kept, and the token that was drawn."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_longtrunc.arguments import check_int
from hf_longtrunc.extras import import_pyplot, missing
from hf_longtrunc.models import unwrapped
from hf_longtrunc.pieces import piece_by_token
from hf_longtrunc.sampling.attach import rebuild_processor_list
from hf_longtrunc.sampling.calls import WARPERS, neighbours
from hf_longtrunc.sampling.cutoffs import softmax_rows
from hf_longtrunc.sampling.page import write_page
from hf_longtrunc.sampling.trace_records import TruncationRecord, step_candidates, step_columns

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from torch import Tensor

    from hf_longtrunc.handles import Handle
    from hf_longtrunc.sampling.trace_records import Prove

# Speculative decoding asks about several positions ahead and may take them back; it runs at batch size 1 only.
_OPEN_STEPS_OF_ONE_ROW = 64


class _OpenStep(NamedTuple):
    """A step whose token is not known yet, or may still be taken back."""

    ids: Tensor  # [rows, position], on the CPU
    log_probs: Tensor  # [rows, vocab], where the scores are
    kept: Tensor  # bool, alike
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
        candidates: of every step so many of the most probable tokens are kept in the record, and where something was
            cut, half as many of the least probable tokens that were kept and of the most probable that were cut, each
            kept one below basis-aware truncation's threshold with its proof's margin; 0 keeps none.

    Cost: a softmax, three partial sorts and a host synchronisation a step; 1 to 2 ms for each margin; a whole kept set
    where basis-aware truncation draws itself. Memory: 150 bytes a record and 13 for each candidate, the last step's
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
        candidates: int = 20,
    ):
        self.processors = list(processors or [])
        self.critical_threshold = critical_threshold
        self.max_records = check_int("max_records", max_records, minimum=1)
        self.candidates = check_int("candidates", candidates, minimum=0)
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

    def to_frame(self, tokenizer: Any = None) -> pd.DataFrame:
        """Return the records as a pandas frame, a column per field of `TruncationRecord` but its candidates.

        With a tokenizer there is a column `text` behind `token`, a leading space included.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise missing("to_frame()", "pandas", "eval") from error
        columns = [name for name in TruncationRecord.__dataclass_fields__ if name != "candidates"]
        rows = [[getattr(record, name) for name in columns] for record in self.records]
        frame: pd.DataFrame = pd.DataFrame(rows, columns=columns)
        if tokenizer is not None:
            tokens = [record.token for record in self.records]
            texts = piece_by_token(tokenizer, {token for token in tokens if token is not None})
            column = [None if token is None else texts[token] for token in tokens]
            frame.insert(columns.index("token") + 1, "text", column)
        return frame

    def to_html(
        self,
        tokenizer: Any,
        path: str | os.PathLike[str],
        *,
        name: str = "sampled",
        beside: Mapping[str, TruncationTrace] | None = None,
        epsilon: float = 2e-3,
        prompt: str = "",
    ) -> Path:
        """Write one page that shows the drawn texts token by token, and for each token what was cut; return its path.

        The page holds everything that it needs, asks nothing of a network, and gives its numbers out as csv and json. A
        token's colour is its probability; what eta-sampling would have refused and what basis-aware truncation rescued
        are marked. Pointing at a token, tapping it or reaching it with the arrow keys shows its step: probability, bar,
        kept and cut tokens, and the margins of the proofs behind the rescued ones.

        Args:
            tokenizer: of the model that drew.
            path: a file, written anew.
            name: what this trace's texts are called.
            beside: further traces by name, shown in columns beside this one. Where all of them hold the same text, as
                `hf_longtrunc.evaluation.read_traces` makes them, the page is of that text: a strip of entropy and kept
                mass along it, and every sampler's bar and kept tokens at a token.
            epsilon: of the eta-sampling that marks what it would have refused.
            prompt: shown above the texts.

        Raises:
            ValueError: nothing was recorded, or epsilon is outside (0, 1).
            OSError: the file cannot be written.
        """
        traces = {name: self, **(beside or {})}
        if self is not traces[name]:
            raise ValueError(f"beside must not hold {name!r}, which is this trace's own name: pass name=...")
        return write_page(Path(path), traces, tokenizer, epsilon=epsilon, prompt=prompt)

    def __repr__(self) -> str:
        steps = len(self._records)
        watched = ", ".join(map(repr, self.processors)) or "no processors of its own"
        return f"<TruncationTrace of {watched}: {steps:,} records of {self._runs:,} runs>"

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
        before, drawable, threshold, prove = scores, scores, None, None
        for processor in processors:
            bar = getattr(processor, "threshold", None)
            if callable(bar):
                threshold, margins = bar(scores), getattr(processor, "margins", None)
                prove = None if margins is None else partial(_row_margins, margins, scores, threshold)
            result = processor(input_ids, scores)
            drawn_from = getattr(processor, "drawn_from", None)
            drawable = result if drawn_from is None else drawn_from(scores, result)
            scores = result
        warpers: list[Any] = [each for each in behind if isinstance(each, WARPERS)]
        for warper in warpers:
            drawable = warper(input_ids, drawable)
        self._record(input_ids.detach().cpu(), before, drawable, threshold, prove)
        return scores

    def _record(
        self, ids: Tensor, before: Tensor, after: Tensor, threshold: Tensor | None, prove: Prove | None
    ) -> None:
        rows = softmax_rows(before)
        log_probs = rows.z - rows.log_total
        # A token can still be drawn if the sampler's fp32 softmax gives it any probability, whatever the filter value.
        kept = (after.float() - after.amax(-1, keepdim=True).float()).exp() > 0
        probs = log_probs.exp()
        columns = step_columns(probs, rows.entropy, kept, threshold)
        candidates = step_candidates(probs, kept, threshold, self.candidates, prove)
        with _WRITING:
            reading = self._reading
            if not self._continues(ids):
                reading.run, self._runs = self._runs, self._runs + 1
                reading.open.clear()
            self._read_tokens(ids)
            self._take_back(ids.shape[1])
            keys = [(reading.run, row, ids.shape[1]) for row in range(ids.shape[0])]
            for key, values, near in zip(keys, zip(*columns, strict=True), candidates, strict=True):
                self._records[key] = replace(TruncationRecord(*key, *values), candidates=near)
            reading.open.append(_OpenStep(ids, log_probs, kept, keys))
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
        is_kept = step.kept.gather(1, tokens[:, None].to(step.kept.device))[:, 0]
        columns = tokens.tolist(), drawn.exp()[:, 0].tolist(), ranks.tolist(), is_kept.tolist()
        for key, is_known, *values in zip(step.keys, known.tolist(), *columns, strict=True):
            if is_known and key in self._records:
                named = dict(zip(("token", "probability", "rank", "is_kept"), values, strict=True))
                self._records[key] = replace(self._records[key], **named)
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


def _row_margins(
    margins: Callable[[Tensor, Tensor, Tensor], Tensor], scores: Tensor, threshold: Tensor, row: int, tokens: Any
) -> Any:
    wanted = torch.from_numpy(tokens.astype(np.int64)).to(scores.device)
    return margins(scores[row : row + 1], threshold[row : row + 1], wanted[None])[0].numpy()


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
    _, axes = import_pyplot("plot()").subplots(3, 1, sharex=True, figsize=(9, 6), layout="constrained")
    for panel, name in zip(axes, ("entropy (nats)", "threshold (line),\ndrawn (dots)", "kept mass"), strict=True):
        panel.set_ylabel(name)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("generated token")
    return list(axes)
