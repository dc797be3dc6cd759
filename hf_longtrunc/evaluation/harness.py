"""Patched models in EleutherAI's lm-evaluation-harness, through a small subclass of its `HFLM`.

HFLM truncates a long prompt on the left to `max_position_embeddings` and logs it. For an encoder-decoder it adds the
prompt's length to the number of new tokens, and searches for stop strings after that length. Here a prompt that does
not fit raises an error, and an encoder-decoder's new tokens count from the decoder's start.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_longtrunc.arguments import check_int
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.records import ArmRecord, Journal, arm_fields
from hf_longtrunc.extras import missing

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise missing("lm-eval", error.name, "lm-eval") from error

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from rich.table import Table
    from torch import Tensor

    from hf_longtrunc.evaluation.records import Arm

_NO_LIMIT = 2**31 - 1


class PatchedLM(HFLM):  # type: ignore[misc]
    """The harness' `HFLM` with a patched model; it never truncates a prompt.

    Args:
        pretrained: see `HFLM`: a name, a folder or a model.
        arm: callable (model) -> context manager, such as `LMInfinite()`, left by `close()` or at the end of
            `with PatchedLM(...) as lm:`. None leaves the model unchanged.
        max_length: tokens of prompt and answer together (encoder-decoder: of each). None: the model's own limit
            without an arm, no limit with one.
        **kwargs: for `HFLM`.

    Raises:
        ValueError: while evaluating, a prompt longer than `max_length`.
    """

    def __init__(self, pretrained: Any, *, arm: Arm | None = None, max_length: int | None = None, **kwargs: Any):
        super().__init__(pretrained, max_length=max_length or (_NO_LIMIT if arm else None), **kwargs)
        self._patch = ExitStack()
        if arm is not None:
            self._patch.enter_context(arm(self.model))

    def close(self) -> None:
        """Remove the patch from the model."""
        self._patch.close()

    def __enter__(self) -> PatchedLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Encode and pad prompts to generate from; one longer than `left_truncate_len` is refused, not cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side=padding_side)
        if left_truncate_len is not None:
            self._check(ids.shape[1], left_truncate_len)
        return ids, mask

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if self.backend == "causal":
                self._check(len(context) + len(continuation) - 1, self.max_length)
            else:
                self._check(max(len(context), len(continuation)), self.max_length)
        scored: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return scored

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        if self.backend == "seq2seq":
            return self._decode(context, max_length - context.shape[1], stop, **kwargs)
        made: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        return made

    def _decode(self, context: Tensor, new_tokens: int, stop: list[str], **kwargs: Any) -> Tensor:
        if not kwargs.get("temperature"):
            kwargs = {"do_sample": False, **kwargs, "temperature": None}
        made: Tensor = self.model.generate(
            input_ids=context,
            max_new_tokens=new_tokens,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, 1, context.shape[0]),
            pad_token_id=self.tokenizer.pad_token_id,
            **kwargs,
        )
        return made

    def _check(self, length: int, limit: int) -> None:
        if length > limit:
            raise ValueError(
                f"a prompt has {length} tokens and {limit} fit in max_length={self.max_length}: pass a larger "
                "max_length (--max-length) to have it read whole, an arm that reads any length, or shorter prompts"
            )


@dataclass(frozen=True)
class HarnessRecord(ArmRecord):
    """The harness' metrics of one task under one arm, with the number of samples."""

    task: str
    limit: int | None
    max_length: int | None
    lengths: list[int] | None
    samples: int
    metrics: dict[str, float]


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    arms: Mapping[str, Arm],
    *,
    limit: int | None = None,
    max_length: int | None = None,
    lengths: Sequence[int] | None = None,
    batch_size: int = 1,
    path: str | os.PathLike[str] | None = None,
) -> list[HarnessRecord]:
    """Run tasks of lm-evaluation-harness once per arm.

    Args:
        model: a transformers model, causal or encoder-decoder.
        tokenizer: its tokenizer.
        tasks: the harness' names of tasks.
        arms: name -> callable (model) -> context manager under which the model answers.
        limit: so many samples a task; None takes all.
        max_length: see `PatchedLM`; None takes the model's own under `nullcontext`, and no limit under other arms.
        lengths: of the prompts that RULER's tasks make up, powers of two from 4096 to 131072; None takes 4096.
        batch_size: prompts at a time.
        path: a JSON-lines file; a task that it holds for the same arm, model and settings is not run again.

    Returns:
        One record per arm and task, in that order.

    Raises:
        ValueError: a task that the harness does not know; a prompt longer than `max_length`.
    """
    journal = Journal(path, HarnessRecord, ("samples", "metrics"))
    limit, max_length = (
        None if value is None else check_int(name, value, minimum=1)
        for name, value in (("limit", limit), ("max_length", max_length))
    )
    chosen = None if lengths is None else [check_int("lengths", length, minimum=1) for length in lengths]
    batch_size = check_int("batch_size", batch_size, minimum=1)
    manager = TaskManager(
        metadata={"tokenizer": tokenizer.name_or_path, **({} if chosen is None else {"max_seq_lengths": chosen})}
    )
    _check_names(tasks, manager)
    records = []
    for name, arm in arms.items():
        cell: dict[str, Any] = {"limit": limit, "max_length": max_length, "lengths": chosen}
        cell |= arm_fields(name, arm, model)
        patch = None if arm is nullcontext else arm
        with PatchedLM(model, tokenizer=tokenizer, arm=patch, max_length=max_length, batch_size=batch_size) as lm:
            for task in tasks:
                records.append(journal.once({"task": task, **cell}, partial(_evaluated, lm, task, manager, limit)))
    return records


def harness_table(records: Sequence[HarnessRecord]) -> Table:
    """Lay records out as a rich table: a row per task and metric, a column per arm."""
    arms = list(dict.fromkeys(record.arm for record in records))
    table = new_table("task", "metric", title="lm-evaluation-harness")
    for heading in [*arms, "samples"]:
        table.add_column(heading, justify="right")
    values = {(r.task, metric, r.arm): value for r in records for metric, value in r.metrics.items()}
    samples = {record.task: record.samples for record in records}
    for task, metric in dict.fromkeys((task, metric) for task, metric, _ in values):
        cells = [f"{values[task, metric, arm]:.4g}" if (task, metric, arm) in values else "" for arm in arms]
        table.add_row(task, metric, *cells, str(samples[task]))
    return table


def _check_names(tasks: Sequence[str], manager: Any) -> None:
    """Refuse tasks that are neither known to the harness nor files of one."""
    unknown = [task for task in tasks if task not in manager.task_index and not Path(task).is_file()]
    if unknown:
        close = get_close_matches(unknown[0], list(manager.task_index), 3)
        meant = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"lm-evaluation-harness has no task named {', '.join(unknown)}{meant}")


def _evaluated(lm: PatchedLM, task: str, manager: Any, limit: int | None) -> dict[str, Any]:
    """Return the task's sample count and its metrics; those of lengths that were not asked for (-1) are left out."""
    output = lm_eval.simple_evaluate(
        model=lm, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    values = {key.removesuffix(",none"): value for key, value in output["results"][task].items()}
    metrics = {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and value != -1 and not key.startswith("sample_")
    }
    return {"samples": output["n-samples"][task]["effective"], "metrics": metrics}
