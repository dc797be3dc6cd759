"""TRL's GRPO and RLOO on truncated samples: the policy that is trained is the distribution that was drawn from."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.handles import Handle
from hf_longtrunc.models import unwrapped
from hf_longtrunc.sampling.attach import attach_processors
from hf_longtrunc.sampling.mask import TruncatedScores, truncated_scores
from hf_longtrunc.sampling.recorder import SamplingMaskRecorder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hf_longtrunc.sampling.attach import Processor
    from hf_longtrunc.sampling.mask import SamplingMask

_METHODS = (
    "_generate_single_turn",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
)
_MASKS = "sampling_masks"  # the trainer's batches are shuffled and split with everything in them


def attach_truncation(trainer: Any, processors: Sequence[Processor] = ()) -> Handle:
    """Let TRL's `GRPOTrainer` or `RLOOTrainer` generate through `processors` and score the truncated distribution.

    Examples:
        >>> trainer = GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=prompts)
        >>> with attach_truncation(trainer, [EtaLogitsProcessor(2e-3)]):
        ...     output = trainer.train()

    All log-probabilities of the trainer (new, old, reference) and its entropy are then taken over the kept sets that
    generation recorded, also those of `top_p`, `top_k` and `min_p` of its config. Metrics: the means over tokens of the
    ratio truncated / full (`truncation/importance_ratio`) and of its logarithm (`truncation/log_ratio`), and the masks'
    memory (`truncation/bytes_per_token`).

    Args:
        trainer: made, and not training yet. TRL 1.16.
        processors: callables (input_ids, scores) -> scores, run before the warpers as in `attach_processors`.

    Returns:
        A handle; `detach()` or the end of a `with` block gives trainer and model back as they were.

    Raises:
        TypeError: another kind of trainer.
        ValueError: generation by vLLM or continuous batching; tools, environments or a rollout function, which insert
            tokens that the model did not draw.

    Cost: the masks' memory, and the logits of one scoring batch, which TRL's fused head does not keep.
    """
    if missing := [name for name in _METHODS if not callable(getattr(trainer, name, None))]:
        raise TypeError(
            f"trainer must be TRL's GRPOTrainer or RLOOTrainer, got {type(trainer).__name__} without {missing}"
        )
    _refuse_other_sources(trainer)
    recorder = SamplingMaskRecorder()
    scorer = _Scorer(trainer, recorder)
    names = ", ".join(map(repr, processors)) or "the config's own samplers"
    handle = Handle("attach_truncation", trainer, f"draws through {names} and scores the kept sets")
    with handle.or_nothing():
        handle.undo(attach_processors(trainer.model, list(processors)).detach)
        handle.undo(recorder.attach(trainer.model).detach)
        for name in _METHODS:
            handle.set(trainer, name, getattr(scorer, name.lstrip("_")))
    return handle


class _Scorer:
    """The trainer's methods, replaced to carry the masks of the rows along."""

    def __init__(self, trainer: Any, recorder: SamplingMaskRecorder):
        self.trainer, self.recorder = trainer, recorder
        self.own = {name: getattr(trainer, name) for name in _METHODS}
        self.masks: list[SamplingMask] = []  # of the rows that are scored next
        self.is_reported = False
        forward = unwrapped(trainer.model).forward
        self.keeps_logits = "logits_to_keep" in inspect.signature(forward).parameters

    def generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        result = self.own["_generate_single_turn"](*args, **kwargs)
        completions = result[0] if isinstance(result, tuple) else result  # GRPO returns log-probabilities beside them
        masks = self.recorder.take()
        self.masks = [mask[: len(ids)] for mask, ids in zip(masks, completions, strict=True)]
        return result

    def generate_and_score_completions(self, inputs: Any) -> Any:
        output = self.own["_generate_and_score_completions"](inputs)
        output[_MASKS] = self.masks
        return output

    def compute_loss(self, model: Any, inputs: Any) -> Any:
        self.masks = inputs[_MASKS]
        self.is_reported = True
        try:
            return self.own["_compute_loss"](model, inputs)
        finally:
            self.is_reported = False

    def get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        if given := [name for name, value in others.items() if value is not None] + ["aux_loss"] * compute_aux_loss:
            raise ValueError(
                f"attach_truncation scores text alone, got {given}: train without images and router losses"
            )
        labels = input_ids[:, -logits_to_keep:].masked_fill(attention_mask[:, -logits_to_keep:] == 0, -100)
        keep = {"logits_to_keep": logits_to_keep + 1} if self.keeps_logits else {}
        parts = []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(start, start + (batch_size or len(input_ids)))
            with self.trainer.accelerator.autocast():
                output = model(input_ids=input_ids[rows], attention_mask=attention_mask[rows], use_cache=False, **keep)
            logits = output.logits[:, -logits_to_keep - 1 : -1]
            parts.append(truncated_scores(logits, labels[rows], self.masks[rows], temperature=self.trainer.temperature))
        scores = TruncatedScores(*(torch.cat(each) for each in zip(*parts, strict=True)))
        if self.is_reported:
            self._report(scores, labels != -100)
        return scores.log_probs, scores.entropy if compute_entropy else None, None

    def _report(self, scores: TruncatedScores, is_scored: Tensor) -> None:
        log_ratios = -scores.log_kept_mass.detach()[is_scored].double()
        steps = sum(map(len, self.masks))
        sums = [
            log_ratios.exp().sum(),
            log_ratios.sum(),
            log_ratios.new_tensor(sum(mask.nbytes for mask in self.masks)),
        ]
        counts = [is_scored.sum(), is_scored.sum(), log_ratios.new_tensor(steps)]
        values = torch.stack([*sums, *counts]).to(log_ratios.device)
        values = self.trainer.accelerator.gather(values[None]).sum(0).tolist()
        metrics = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
        for place, name in enumerate(("importance_ratio", "log_ratio", "bytes_per_token")):
            metrics[f"truncation/{name}"].append(values[place] / max(values[place + 3], 1))


def _refuse_other_sources(trainer: Any) -> None:
    for name, what in (
        ("use_vllm", "generation by vLLM"),
        ("use_transformers_continuous_batching", "continuous batching"),
        ("rollout_func", "a rollout function"),
        ("tools", "tools"),
        ("environment_factories", "environments"),
    ):
        if getattr(trainer, name, None):
            raise ValueError(
                f"attach_truncation records what model.generate() draws, and this trainer has {what} ({name}): leave "
                "it off, or score with truncated_log_probs in a loop of your own"
            )
