"""PEMA on transformers models: memory, training, and `with PEMALogitsProcessor(model, adapter) as pema:`."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessor

from hf_longtrunc.mixing.head import LanguageModelHead, head_inputs
from hf_longtrunc.mixing.pema import (
    GradualUnrolling,
    PEMAAdapter,
    PEMAMemory,
    checked_share,
    fit_adapter,
    interpolate,
)
from hf_longtrunc.models import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    """Run `model` over the examples and keep, for every target token, the state it is predicted from.

    Args:
        model: a decoder-only transformers language model; it runs in eval mode and is left in the mode it was in.
        examples: a `datasets.Dataset` or any iterable of {"input_ids": [...], "labels": [...]}, equally long, with -100
            in `labels` at every token that is no target: the prompt. The first token of a row has no context and is
            never a target.
        batch_size: examples in a forward; they are padded on the right and sorted by length.
        progress: show a bar.

    Returns:
        The memory, its rows in the order of the examples; the states in the model's dtype, on the CPU: rows * width
        numbers. Padding is not in it, and changes nothing of it beyond rounding.

    Raises:
        ValueError: columns are missing or differ in length, a label is not the token at its place (labels are not
            shifted here: the model's own convention), or no label is a target.
    """
    rows = [_checked_example(example, f"example {index}") for index, example in enumerate(examples)]
    head = LanguageModelHead(model)
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
    rank: int = 512,
    kappa: float = 0.2,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    layer_norm: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> PEMAAdapter:
    """Train an adapter on a memory of `model`, whose output embedding is used and not changed.

    Args:
        model: the model that the memory was built with.
        memory: from `build_pema_memory` or `PEMAMemory.load`.
        rank: of the bottleneck, at most the width of the states; the paper uses 512.
        kappa: weight of the reconstruction in the loss of stage 2, in [0, 1]; the paper uses 0.2.
        epochs: passes of stage 2 over the memory. Stage 1 takes one pass and no steps.
        batch_size: rows in a step.
        learning_rate: of AdamW, falling linearly to zero.
        layer_norm: see `PEMAAdapter`.
        seed: of the adapter's start and of the order of the rows. The run depends on nothing else that is random.
        progress: show a bar with the loss.

    Returns:
        The adapter, on the model's device, in eval mode.

    Raises:
        ValueError: a memory of another width or vocabulary, or an argument outside its range.

    Cost: a product with the output embedding, forward and backward, for every row and epoch. Source: Kim et al. 2024,
    arXiv 2311.08590, section 3. Deviations: stage 1 is solved, not iterated; see `reconstruction_basis`.
    """
    head = LanguageModelHead(model)
    _check_sizes(head, memory.hidden.shape[1], memory.vocab_size, "memory")
    checked_share("kappa", kappa)
    if epochs < 1 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"epochs and batch_size must be at least 1 and learning_rate positive, got {epochs}, {batch_size}, "
            f"{learning_rate}"
        )
    generator = torch.Generator().manual_seed(seed)
    adapter = PEMAAdapter(head.hidden_size, rank, head.vocab_size, layer_norm=layer_norm, generator=generator)
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


class PEMALogitsProcessor(LogitsProcessor):
    """Mix a PEMA adapter into what a model generates: P = lambda P_PEMA + (1 - lambda) P_LM, at every step.

        with PEMALogitsProcessor(model, adapter) as pema:
            model.generate(**inputs, logits_processor=[pema])

    The adapter reads the state that the model has just put into its output embedding, through a hook that stands for
    the block and is removed after it, an exception included. Row by row it belongs to the scores whatever beams and
    returns do, so nothing is cached and nothing counted.

    Args:
        model: the model that the adapter was trained for. It may differ in dtype and device.
        adapter: from `train_pema` or `PEMAAdapter.load`.
        interpolation: lambda, a constant in [0, 1], or `GradualUnrolling(...)`.

    Greedy, sampling, beams and several returns, padded batches and several calls in one block work. Refused, each with
    the reason: prompt lookup and assisted decoding, which score several positions of one forward; a processor that runs
    the same model a second time (`guidance_scale`), `prefill_chunk_size`, continuous batching, `inputs_embeds`.

    Raises:
        ValueError: an adapter of another width or vocabulary, an encoder-decoder, a head that cannot be applied from
            outside (see `LanguageModelHead`), any of the modes above, a call outside the block.

    Cost a step: 2 * width * rank multiplications a row, and the output embedding a second time. Returns
    log-probabilities, fp32; tokens that an earlier processor removed stay removed.
    Source: Kim et al. 2024, "PEMA: An Offsite-Tunable Plug-in External Memory Adaptation for Language Models",
    arXiv 2311.08590, section 3.
    """

    # Declared unsupported, it would be left out there with a warning; this way it is called, and refuses.
    supports_continuous_batching = True

    def __init__(self, model: Any, adapter: PEMAAdapter, interpolation: float | GradualUnrolling = 0.5) -> None:
        self.head = LanguageModelHead(model)
        _check_sizes(self.head, adapter.hidden_size, adapter.vocab_size, "adapter")
        self.adapter = adapter
        self.interpolation = interpolation
        if not isinstance(interpolation, GradualUnrolling):
            self.interpolation = checked_share("interpolation", interpolation)
        self._block: ExitStack | None = None
        self._states: list[Tensor] = []

    def __enter__(self) -> PEMALogitsProcessor:
        """Start listening to the model's output embedding."""
        if self._block is not None:
            raise ValueError("this PEMALogitsProcessor is in use already: leave its block first, or make a second one")
        self._block = ExitStack()
        self._block.enter_context(head_inputs(self.head.module, self._see))
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop listening: the model is as it was."""
        if self._block is not None:
            self._block.close()
        self._block = None
        self._states.clear()

    def _see(self, states: Tensor) -> None:
        # A copy: compiled forwards write the next step into the same memory.
        self._states.append(states[:, -1].detach().clone() if states.ndim == 3 else states.detach())

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log P [rows, vocabulary] of the next token, given `scores` [rows, vocabulary]."""
        states = self._taken()
        self._check_call(input_ids, states, scores)
        share = self._share(input_ids).to(scores.device)
        logits = self.head(self.adapter(states.to(self.adapter.A.device)))
        return interpolate(logits.to(scores.device), scores, share)

    def _taken(self) -> Tensor:
        """Take the states of the one forward since the last step; each serves once."""
        if self._block is None:
            raise ValueError(
                "PEMALogitsProcessor was called outside its block: with PEMALogitsProcessor(...) as pema: "
                "model.generate(..., logits_processor=[pema])"
            )
        states, self._states = self._states, []
        if len(states) != 1:
            raise ValueError(
                f"PEMALogitsProcessor needs one forward of the model for every step, and saw {len(states)} since the "
                "last one. Prompt lookup and assisted decoding score several positions of one forward, "
                "guidance_scale and prefill_chunk_size take several forwards: generate without them, and with the "
                "model that PEMALogitsProcessor was given"
            )
        return states[0]

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

    def _share(self, input_ids: Tensor) -> Tensor:
        if isinstance(self.interpolation, GradualUnrolling):
            return self.interpolation.shares(input_ids.shape[1], len(input_ids))
        return torch.full((len(input_ids),), self.interpolation)

    def __repr__(self) -> str:
        return f"PEMALogitsProcessor({self.adapter!r}, interpolation={self.interpolation!r})"


def _states(model: Any, head: LanguageModelHead, rows: Sequence[Tensor]) -> Tensor:
    """Return the states [rows, longest, width] that go into the output embedding, for rows padded on the right."""
    seen: list[Tensor] = []

    def see(states: Tensor) -> Tensor:
        seen.append(states)
        return states[:, -1:]  # the logits are not wanted: a column of them is enough

    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    device = model.get_input_embeddings().weight.device
    with head_inputs(head.module, see):
        model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return seen[-1]


def _checked_example(example: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
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


def _check_sizes(head: LanguageModelHead, hidden_size: int, vocab_size: int, name: str) -> None:
    if (hidden_size, vocab_size) != (head.hidden_size, head.vocab_size):
        raise ValueError(
            f"the {name} was made for states of width {hidden_size} and a vocabulary of {vocab_size}, this model has "
            f"{head.hidden_size} and {head.vocab_size}: use the model that it was made with, or make it again"
        )
