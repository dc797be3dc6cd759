"""PEMA on transformers models: memory, training, and the logits processor."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessor

from hf_longtrunc.arguments import check_fraction, check_int, check_kind
from hf_longtrunc.handles import Handle
from hf_longtrunc.head import LanguageModelHead, head_inputs
from hf_longtrunc.mixing.pema import (
    GradualUnrolling,
    PEMAAdapter,
    PEMAMemory,
    fit_adapter,
    interpolate,
)
from hf_longtrunc.models import attachable, evaluating, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

_IGNORE = -100


@torch.no_grad()
def build_pema_memory(
    model: Any,
    examples: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> PEMAMemory:
    """Run `model` over the examples and keep, for every target token, the state that predicts it.

    Examples:
        >>> build_pema_memory(model, [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}])
        PEMAMemory(2 rows of width 32, vocab_size=96)

    Args:
        model: a decoder-only transformers language model; it runs in eval mode and returns to its own mode.
        examples: a `datasets.Dataset` or any iterable of {"input_ids": [...], "labels": [...]}, equally long, with -100
            in `labels` at every token that is no target, such as the prompt. The first token of a row has no context
            and is never a target.
        batch_size: examples in a forward; they are padded on the right and sorted by length.
        progress: show a progress bar.

    Returns:
        The memory in the order of the examples, without padding, in the model's dtype on the CPU: rows * width numbers.

    Raises:
        TypeError: an example is no mapping.
        ValueError: columns are missing or differ in length, a label is not the token at its own place, or no label is
            a target.
    """
    batch_size = check_int("batch_size", batch_size, minimum=1)
    rows = [_checked_example(example, f"example {index}") for index, example in enumerate(examples)]
    head = _head_of(model)
    counts = [int((labels[1:] != _IGNORE).sum()) for _, labels in rows]
    ends = list(accumulate(counts))
    hidden = torch.empty(sum(counts), head.hidden_size, dtype=model.dtype)
    order = sorted((index for index, count in enumerate(counts) if count), key=lambda index: len(rows[index][0]))
    with evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="PEMA memory", leave=False, disable=not progress):
            batch = order[start : start + batch_size]
            states = _states(model, head, [rows[index][0] for index in batch])
            for index, row in zip(batch, states, strict=True):
                is_target = rows[index][1][1:] != _IGNORE
                hidden[ends[index] - counts[index] : ends[index]] = row[: len(is_target)][is_target].cpu()
    targets = [labels[1:][labels[1:] != _IGNORE] for _, labels in rows]
    return PEMAMemory(hidden, torch.cat([*targets, torch.empty(0, dtype=torch.int64)]), head.vocab_size)


def train_pema(
    model: Any,
    memory: PEMAMemory,
    *,
    rank: int | None = None,
    kappa: float = 0.2,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> PEMAAdapter:
    """Train an adapter on a memory of `model`, through the model's output embedding, which does not change.

    Examples:
        >>> memory = build_pema_memory(model, [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}])
        >>> train_pema(model, memory, rank=8, epochs=1)
        PEMAAdapter(hidden_size=32, rank=8, vocab_size=96)

    Args:
        model: the model that the memory was built with.
        memory: from `build_pema_memory` or `PEMAMemory.from_pretrained`.
        rank: of the bottleneck; None takes the paper's 512, or the width of the states if that is less.
        kappa: weight of the reconstruction in the loss of stage 2, in [0, 1]; the paper uses 0.2.
        epochs: passes of stage 2 over the memory. Stage 1 takes one pass and no steps.
        batch_size: rows in a step.
        learning_rate: of AdamW, falling linearly to zero.
        seed: for the adapter's start and the order of the rows; nothing else is random.
        progress: show a progress bar with the loss.

    Returns:
        The adapter, on the model's device, in eval mode.

    Raises:
        ValueError: a memory of another width or vocabulary, or an argument outside its range.

    Cost: a product with the output embedding, forward and backward, for every row and epoch.

    Source: Kim et al. 2024, arXiv 2311.08590, section 3. Deviation: stage 1 is solved, the paper takes gradient steps.
    """
    head = _head_of(model)
    check_kind("memory", memory, PEMAMemory, "build_pema_memory(model, examples) makes one")
    _check_sizes(head, memory.hidden.shape[1], memory.vocab_size, "memory")
    generator = torch.Generator().manual_seed(seed)
    rank = min(512, head.hidden_size) if rank is None else rank
    adapter = PEMAAdapter(head.hidden_size, rank, head.vocab_size, generator=generator)
    adapter.to(head.device)
    fit_adapter(
        adapter,
        memory,
        head,
        kappa=kappa,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        progress=progress,
    )
    return adapter.eval()


@dataclass(frozen=True)
class PEMA:
    """Plug-in external memory adaptation (PEMA): mix an adapter's distribution into a model's at every step.

    Examples:
        >>> adapter = PEMAAdapter(hidden_size=32, rank=8, vocab_size=96)
        >>> with PEMA(adapter)(model) as pema:
        ...     text = model.generate(ids, max_new_tokens=2, do_sample=False, logits_processor=[pema])

    P = lambda P_PEMA + (1 - lambda) P_LM; `PEMALogitsProcessor` says in which modes of generation, and at what cost.

    Args:
        adapter: from `train_pema` or `PEMAAdapter.from_pretrained`.
        interpolation: lambda, a constant in [0, 1], or `GradualUnrolling(...)`.

    Source: Kim et al. 2024, "PEMA: An Offsite-Tunable Plug-in External Memory Adaptation for Language Models",
    arXiv 2311.08590, section 3.
    """

    adapter: PEMAAdapter
    _: KW_ONLY
    interpolation: float | GradualUnrolling = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, PEMAAdapter):
            raise TypeError(f"adapter must be a PEMAAdapter, got {type(self.adapter).__name__}; see train_pema")
        if not isinstance(self.interpolation, GradualUnrolling):
            object.__setattr__(self, "interpolation", check_fraction("interpolation", self.interpolation))

    def attach(self, model: Any) -> PEMALogitsProcessor:
        """Attach the adapter to `model` and return the logits processor, which is the handle too.

        Raises:
            TypeError, ValueError: the model does not fit the adapter, or is compiled already.
        """
        return PEMALogitsProcessor(model, self.adapter, self.interpolation)

    __call__ = attach


class PEMALogitsProcessor(LogitsProcessor, Handle):
    """The logits processor and handle of `PEMA(adapter)(model)`: P = lambda P_PEMA + (1 - lambda) P_LM at every step.

    Examples:
        >>> adapter = PEMAAdapter(hidden_size=32, rank=8, vocab_size=96)
        >>> with PEMALogitsProcessor(model, adapter, interpolation=0.3) as pema:
        ...     text = model.generate(ids, max_new_tokens=2, do_sample=False, logits_processor=[pema])

    A hook reads the input of the model's output embedding until `detach()` or the end of the block. Its rows are those
    of the scores, also under beams. No state is kept from step to step, and each thread has its own. Greedy, sampling,
    beams, several returns, padded batches and several calls in one block work.

    Args:
        model: the model that the adapter was trained for, or a PEFT or DDP wrapper of it; dtype and device may differ.
        adapter: as for `PEMA`.
        interpolation: as for `PEMA`.

    Raises:
        ValueError: prompt lookup and assisted decoding, which score several positions of one forward; a second forward
            of the same model in a step (`guidance_scale`, `prefill_chunk_size`); continuous batching; `inputs_embeds`;
            an adapter of another width or vocabulary; an encoder-decoder; a head that cannot be applied from outside
            (see `LanguageModelHead`); a call while it is not attached.

    Cost a step: 2 * width * rank multiplications a row, and the output embedding a second time. Returns
    log-probabilities, fp32; tokens that an earlier processor removed stay removed.
    """

    # Declared unsupported, it would be left out there with a warning; so it is called, and refuses.
    supports_continuous_batching = True

    def __init__(self, model: Any, adapter: PEMAAdapter, interpolation: float | GradualUnrolling = 0.5) -> None:
        technique = PEMA(adapter, interpolation=interpolation)
        generating: Any = attachable(model, "PEMA")
        self.head = _head_of(model)
        _check_sizes(self.head, adapter.hidden_size, adapter.vocab_size, "adapter")
        build = generating._get_logits_processor
        Handle.__init__(self, f"PEMA({adapter!r})", generating, "the input of its output embedding is read")
        self.adapter, self.interpolation = adapter, technique.interpolation
        self._seen = _Seen()
        self.undo(self.head.module.register_forward_pre_hook(self._see).remove)
        self.undo(self._seen.clear)

        def begin(*args: Any, **kwargs: Any) -> Any:
            # A new generation: drop the states of another one, or of a forward in between.
            self._seen.clear()
            return build(*args, **kwargs)

        self.set(generating, "_get_logits_processor", begin)
        self.refuse_copies(generating, advice="detach first, copy or save it, and attach again")

    def _see(self, _: Any, arguments: tuple[Tensor, ...]) -> None:
        states = arguments[0]
        # A copy: compiled forwards write the next step into the same memory.
        self._seen.states = states[:, -1].detach().clone() if states.ndim == 3 else states.detach().clone()
        self._seen.forwards += 1

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log P [rows, vocabulary] of the next token, given `scores` [rows, vocabulary]."""
        states = self._taken()
        self._check_call(input_ids, states, scores)
        weight = self._weight(input_ids).to(scores.device)
        logits = self.head(self.adapter(states.to(self.adapter.A.device)))
        return interpolate(logits.to(scores.device), scores, weight)

    def _taken(self) -> Tensor:
        """Take the states of the one forward since the last step."""
        if not self.is_attached:
            raise ValueError(
                "PEMALogitsProcessor was called outside its block: with PEMA(adapter)(model) as pema: "
                "model.generate(..., logits_processor=[pema])"
            )
        forwards, states = self._seen.forwards, self._seen.states
        self._seen.clear()
        if forwards != 1 or states is None:
            raise ValueError(
                f"PEMALogitsProcessor needs one forward of the model for every step, and saw {forwards} since the "
                "last one. Prompt lookup and assisted decoding score several positions of one forward, "
                "guidance_scale and prefill_chunk_size take several forwards: generate without them, and with the "
                "model that PEMALogitsProcessor was given"
            )
        return states

    def _check_call(self, input_ids: Tensor, states: Tensor, scores: Tensor) -> None:
        if input_ids.ndim != 2:
            raise ValueError("PEMALogitsProcessor cannot be used in continuous batching: use generate()")
        if not input_ids.shape[1]:
            raise ValueError("PEMALogitsProcessor needs input_ids, got none: pass input_ids instead of inputs_embeds")
        if scores.shape != (len(states), self.head.vocab_size) or len(input_ids) != len(states):
            raise ValueError(
                f"scores must have shape {(len(states), self.head.vocab_size)}, the model's rows and vocabulary in "
                f"this step, got {tuple(scores.shape)} for {len(input_ids)} rows of input_ids"
            )

    def _weight(self, input_ids: Tensor) -> Tensor:
        if isinstance(self.interpolation, GradualUnrolling):
            return self.interpolation.shares(input_ids.shape[1], len(input_ids))
        return torch.full((len(input_ids),), self.interpolation)


class _Seen(threading.local):
    """A thread's inputs of the output embedding since the last step."""

    states: Tensor | None = None
    forwards = 0

    def clear(self) -> None:
        self.states, self.forwards = None, 0


def _states(model: Any, head: LanguageModelHead, rows: Sequence[Tensor]) -> Tensor:
    """Return the inputs [rows, longest, width] of the output embedding, for rows padded on the right."""
    seen: list[Tensor] = []

    def see(states: Tensor) -> Tensor:
        seen.append(states)
        return states[:, -1:]  # the logits are not used: compute one column

    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    device = model.get_input_embeddings().weight.device
    with head_inputs(head.module, see):
        model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return seen[-1]


def _checked_example(example: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(example, Mapping):
        raise TypeError(
            f"{name} must be a mapping {{'input_ids': [...], 'labels': [...]}}, got {type(example).__name__}: tokenize "
            "texts first"
        )
    try:
        ids, labels = (torch.as_tensor(example[column], dtype=torch.int64) for column in ("input_ids", "labels"))
    except KeyError as error:
        raise ValueError(
            f"{name} has no column {error}: an example is {{'input_ids': [...], 'labels': [...]}}"
        ) from None
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise ValueError(
            f"{name}: input_ids and labels must be equally long lists, got shapes {tuple(ids.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if ((labels != ids) & (labels != _IGNORE)).any():
        raise ValueError(
            f"{name}: every label must be the token at its own place, or -100; labels that are shifted by one are not"
        )
    return ids, labels


def _head_of(model: Any) -> LanguageModelHead:
    inside = unwrapped(model)
    if getattr(getattr(inside, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(inside).__name__} is an encoder-decoder: its logits depend on a source that input_ids do not "
            "hold; take a decoder-only model"
        )
    return LanguageModelHead(model)


def _check_sizes(head: LanguageModelHead, hidden_size: int, vocab_size: int, name: str) -> None:
    if (hidden_size, vocab_size) != (head.hidden_size, head.vocab_size):
        raise ValueError(
            f"the {name} was made for states of width {hidden_size} and a vocabulary of {vocab_size}, this model has "
            f"{head.hidden_size} and {head.vocab_size}: use the model that it was made with, or make it again"
        )
