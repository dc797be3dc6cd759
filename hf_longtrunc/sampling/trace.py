"""A record of each sampling step: entropy, threshold, tokens and mass kept, and the drawn token."""

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
from hf_longtrunc.sampling.attach import checked_processors, rebuild_processor_list
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

# Speculative decoding proposes several positions and may take them back; it runs at batch size 1 only.
_OPEN_STEPS_OF_ONE_ROW = 64


class _OpenStep(NamedTuple):
    """A step without a known token, or one that may still be taken back."""

    ids: Tensor  # [rows, position], on the CPU
    log_probs: Tensor  # [rows, vocab], where the scores are
    kept: Tensor  # bool [rows, vocab], on the same device
    keys: list[tuple[int, int, int]]


class _Generation(threading.local):
    """One thread's generation: the number of its run, and its open steps."""

    def __init__(self) -> None:
        self.run = -1
        self.open: deque[_OpenStep] = deque()

    def __reduce__(self) -> tuple[type[_Generation], tuple[()]]:
        """Copy and pickle as empty: a generation belongs to its thread."""
        return _Generation, ()


# Several threads write to one trace.
_WRITING = threading.Lock()


class TruncationTrace(LogitsProcessor):
    """Applies processors and records for each step and row which tokens they cut.

    Examples:
        >>> trace = TruncationTrace([EtaLogitsProcessor(0.02)])
        >>> text = model.generate(ids, **sampling_settings(model), max_new_tokens=2, logits_processor=[trace])
        >>> trace.finish(text).records[0].is_kept
        True

    In `generate`'s list it records the processors that it was given. `with trace.observe(model):` records the whole
    list that `generate` builds, transformers' own warpers included. Scores and results do not change.

    Drawn tokens are read from the next call's `input_ids`, also under beams and speculative decoding. The last one
    comes by `finish(sequences)`: call it after each generation, in its thread, then read `records` or `to_frame()`.

    Args:
        processors: applied in this order; None records plain sampling, or is for `observe`.
        critical_threshold: computes tau* of drawn tokens: `SupportChecker(basis).critical_threshold`, some ten
            milliseconds a token; None leaves that field empty.
        eos_token_id: a row is not recorded past this token (`observe` takes the model's own).
        max_records: the oldest records beyond this number are dropped and counted in `dropped`.
        candidates: how many of the most probable tokens to keep in each record. Where tokens were cut, half as many
            of the least probable kept ones and of the most probable cut ones join, and a kept token below basis-aware
            truncation's threshold has its proof's margin. 0 keeps none.

    Raises:
        ValueError: continuous batching, which does not tell which request a row belongs to.

    Cost: a softmax, three partial sorts and a host synchronisation a step; 1 to 2 ms for each margin. Memory: 150 bytes
    a record and 13 for each candidate, and the last step's log-probabilities (of up to 64 steps at batch size 1).
    """

    # Declared unsupported, it would be left out there with its processors; so it is called, and refuses.
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
        self.processors = checked_processors([] if processors is None else processors)
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
        self._generation = _Generation()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Apply the processors to `scores` [rows, vocab] and record the step, transformers' later warpers included."""
        return self._apply_and_record(self.processors, input_ids, scores, neighbours(self)[1])

    def observe(self, model: Any) -> Handle:
        """Record the whole processor list of everything that `model` generates until the handle is detached.

        `model` is a transformers model that generates, or a wrapper of one, as for `attach_processors`.
        """

        def watch(build: Callable[..., LogitsProcessorList], *args: Any, **kwargs: Any) -> LogitsProcessorList:
            return LogitsProcessorList([_RecordedList(self, build(*args, **kwargs))])

        handle = rebuild_processor_list(model, watch, "TruncationTrace", "every processor list is watched")
        self._eos = self._eos or _as_set(unwrapped(model).generation_config.eos_token_id)
        return handle

    def finish(self, sequences: Tensor) -> TruncationTrace:
        """Read the last drawn tokens from `sequences` [rows, length], the output of `generate` in this thread."""
        ids = sequences.detach().cpu()
        with _WRITING:
            self._fill_in_tokens(ids)
            self._take_back(ids.shape[1])
            self._generation.open.clear()
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
        """Return the records as a pandas frame, a column for each field of `TruncationRecord` but its candidates.

        With a tokenizer the column `text` follows `token`, leading spaces included.
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
        """Write a self-contained html page that shows the texts token by token; return its path.

        A token's colour is its probability; tokens that eta-sampling would refuse or basis-aware truncation rescued are
        marked. A click shows a token's step. Numbers export as csv and json.

        Args:
            tokenizer: of the model that drew.
            path: a file; an existing one is replaced.
            name: title of this trace's texts.
            beside: further traces by name, shown in columns; those of `hf_longtrunc.evaluation.read_traces`, which hold
                one text, are compared on it.
            epsilon: eta-sampling's, for the marks.
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
        """Plot one row along its text: entropy; threshold and drawn tokens' probabilities; kept mass.

        Without a processor that declares a threshold, the line is the smallest kept probability, with gaps where no
        token was cut. `axes` are three Axes of an earlier call, to compare samplers; None makes a new figure.
        """
        records = [record for record in self.records if record.row == row and record.run == run]
        if not records:
            raise ValueError(f"nothing recorded for row={row}, run={run}: generate with this trace first")
        top, middle, bottom = axes = _three_axes() if axes is None else list(axes)
        steps = [record.position - records[0].position + 1 for record in records]
        (line,) = top.plot(steps, [record.entropy for record in records], label=label, linewidth=1.2)
        color = line.get_color()
        middle.plot(steps, [_line(record) for record in records], color=color, linewidth=1.2)
        drawn = [math.nan if record.probability is None else record.probability for record in records]
        middle.plot(steps, drawn, ".", color=color, markersize=3)
        bottom.plot(steps, [record.kept_mass for record in records], color=color, linewidth=1.2)
        middle.set_yscale("log")
        if label:
            top.legend(loc="upper left", ncols=4, frameon=False, fontsize="small")
        return axes

    def _apply_and_record(
        self, processors: Sequence[Any], input_ids: Tensor, scores: Tensor, behind: Sequence[Any] = ()
    ) -> Tensor:
        if input_ids.ndim == 1:
            raise ValueError(
                "TruncationTrace cannot follow continuous batching (generate_batch() and serving), whose calls do not "
                "say which request a row belongs to: use generate()"
            )
        before, drawable, threshold, prove = scores, scores, None, None
        for processor in processors:
            threshold_of = getattr(processor, "threshold", None)
            if callable(threshold_of):
                threshold, margins = threshold_of(scores), getattr(processor, "margins", None)
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
        # A token can be drawn if its fp32 probability is not zero, for any filter value.
        kept = (after.float() - after.amax(-1, keepdim=True).float()).exp() > 0
        probs = log_probs.exp()
        columns = step_columns(probs, rows.entropy, kept, threshold)
        candidates = step_candidates(probs, kept, threshold, self.candidates, prove)
        with _WRITING:
            generation = self._generation
            if not self._continues(ids):
                generation.run, self._runs = self._runs, self._runs + 1
                generation.open.clear()
            self._fill_in_tokens(ids)
            self._take_back(ids.shape[1])
            keys = [(generation.run, row, ids.shape[1]) for row in range(ids.shape[0])]
            for key, values, near in zip(keys, zip(*columns, strict=True), candidates, strict=True):
                self._records[key] = replace(TruncationRecord(*key, *values), candidates=near)
            generation.open.append(_OpenStep(ids, log_probs, kept, keys))
            if len(generation.open) > (_OPEN_STEPS_OF_ONE_ROW if ids.shape[0] == 1 else 1):
                generation.open.popleft()
            self._forget_oldest()

    def _continues(self, ids: Tensor) -> bool:
        """Return whether a row of `ids` continues an open step; a single row may also go back to one (speculation)."""
        for step in self._generation.open:
            shared = min(step.ids.shape[1], ids.shape[1])
            goes_on = ids.shape[0] == 1 or ids.shape[1] > step.ids.shape[1]
            if goes_on and _same_rows(ids[:, :shared], step.ids[:, :shared]).any():
                return True
        return False

    def _fill_in_tokens(self, ids: Tensor) -> None:
        """Fill in the token of every open step that a row of `ids` continues."""
        for step in self._generation.open:
            position = step.ids.shape[1]
            if position < ids.shape[1]:
                same = _same_rows(ids[:, :position], step.ids)
                # Rows with equal text (several returns of one prompt) each continue themselves: the diagonal wins.
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
                if self.critical_threshold is not None:
                    log_probs, token = step.log_probs[key[1]], torch.tensor(values[:1], device=step.log_probs.device)
                    named["critical_threshold"] = float(self.critical_threshold(log_probs, token)[0])
                self._records[key] = replace(self._records[key], **named)

    def _take_back(self, length: int) -> None:
        """Drop this run's records at `length` or later: those positions were proposed and not accepted."""
        while self._generation.open and self._generation.open[-1].ids.shape[1] >= length:
            for key in self._generation.open.pop().keys:
                self._records.pop(key, None)

    def _forget_oldest(self) -> None:
        while len(self._records) > self.max_records:
            del self._records[next(iter(self._records))]
            self.dropped += 1


class _RecordedList(LogitsProcessor):
    """The list that `generate` built, recorded by a trace."""

    supports_continuous_batching = True

    def __init__(self, trace: TruncationTrace, processors: LogitsProcessorList):
        self.trace, self.processors = trace, processors

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.trace._apply_and_record(self.processors, input_ids, scores)


def _row_margins(
    margins: Callable[[Tensor, Tensor, Tensor], Tensor], scores: Tensor, threshold: Tensor, row: int, tokens: Any
) -> Any:
    wanted = torch.from_numpy(tokens.astype(np.int64)).to(scores.device)
    return margins(scores[row : row + 1], threshold[row : row + 1], wanted[None])[0].numpy()


def _same_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return whether row m of `left` [m, length] equals row n of `right` [n, length]: [m, n]."""
    return (left[:, None] == right[None]).all(-1)


def _as_set(token_ids: int | Sequence[int] | None) -> set[int]:
    if token_ids is None:
        return set()
    return {token_ids} if isinstance(token_ids, int) else set(token_ids)


def _line(record: TruncationRecord) -> float:
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
