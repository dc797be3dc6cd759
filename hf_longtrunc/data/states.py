"""Reset the states of hybrid models at document boundaries, on packed rows without CUDA kernels.

Convolutions, linear attention and Mamba layers carry a state from token to token. Their CUDA kernels reset it at
document boundaries (`seq_idx`); the PyTorch code of transformers does not, so the state of one document leaks into the
next. Here such a layer gets each document as a row of its own, padded at the end, and its outputs go back to their
places in the packed rows. The layers are causal, so padding at the end changes nothing before it. The rest of the
model, attention included, runs once on the packed rows.

Documents of similar length (the same power of two) form one batch: at most half of it is padding.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_causal_mask

from hf_longtrunc.handles import Handle
from hf_longtrunc.models import CACHE_NAMES, attachable, bound, decoder_of

if TYPE_CHECKING:
    from collections.abc import Callable

# Arguments of a flat batch: where its documents begin.
BOUNDARIES = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_CACHES = (*CACHE_NAMES, "cache_params")
# Decoders that make the attention mask without positions: documents would see each other in attention too.
_MASKS_WITHOUT_POSITIONS = ("granitemoehybrid",)
# Lengths of the documents in all rows of the decoder's call, row by row; [] if every row is one document.
_LENGTHS: ContextVar[list[int] | None] = ContextVar("lengths", default=None)


def reset_states(model: Any) -> Handle:
    """Reset the states of a hybrid model's layers at restarts of `position_ids`, in pure PyTorch.

    In a packed row, each document then gets the logits and gradients that it has alone, on a CPU too. For Qwen3-Next
    and 3.5, Falcon-H1, LFM2, Granite 4, Bamba, Jamba, Nemotron-H, and other models with convolutions over tokens or
    Mamba's `A_log`. Calls with a cache or an attention mask are unchanged. Kernels that read `seq_idx` are faster:
    `BestFitPackingCollator(layout="flat")`.

    Args:
        model: a causal language model, or a PEFT or DDP wrapper of one.

    Returns:
        A handle: `with reset_states(model): ...`, or `handle.detach()`.

    Raises:
        TypeError: no transformers model.
        ValueError: a compiled model, or a model without such layers, which needs no resets.
        RuntimeError: while training, if gradient checkpointing runs a layer again.

    Cost: such a layer runs once for each power of two among the documents' lengths.

    Examples:
        >>> from transformers import Lfm2Config, Lfm2ForCausalLM
        >>> sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
        >>> layers = {"num_attention_heads": 4, "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
        >>> hybrid = Lfm2ForCausalLM(Lfm2Config(**sizes, **layers))
        >>> batch = BestFitPackingCollator(seq_length=5)([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
        >>> with reset_states(hybrid):
        ...     check_packed(hybrid, {**batch, "use_cache": False})
    """
    inside = attachable(model, "reset_states")
    decoder = decoder_of(inside)
    mixers = [part for part in decoder.modules() if carries_state(part)]
    if not mixers:
        raise ValueError(f"reset_states: {type(inside).__name__} has no layers with states; documents need no resets")
    handle = Handle("reset_states", inside, f"{len(mixers)} layers begin anew where position_ids restart")
    with handle.or_nothing():
        handle.set(decoder, "forward", _noting(decoder, decoder.forward))
        for part in mixers:
            handle.set(part, "forward", _apart(part, part.forward))
        handle.refuse_copies(inside, decoder, *mixers, advice="detach it first, and attach to the copy")
    return handle


def carries_state(part: nn.Module) -> bool:
    """Return whether a module carries a state over tokens: it has a convolution over them, or Mamba's decay."""
    return "A_log" in part._parameters or any(isinstance(child, nn.Conv1d) for child in part.children())


def _noting(decoder: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a decoder's forward: record the lengths of the documents while it runs."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = bound(decoder, args, kwargs)
        positions = given.get("position_ids")
        lengths = None if positions is None else _lengths(positions)
        is_plain = all(given.get(name) is None for name in (*_CACHES, "attention_mask"))
        if lengths and is_plain and decoder.config.model_type in _MASKS_WITHOUT_POSITIONS:
            args, kwargs = (), {**given, "attention_mask": _masks(decoder, given)}
        token = _LENGTHS.set(lengths or [])
        try:
            return forward(*args, **kwargs)
        finally:
            _LENGTHS.reset(token)

    return run


def _masks(decoder: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the masks that a decoder would make if it passed its positions to transformers' masks."""
    states = given.get("inputs_embeds")
    if states is None:
        states = decoder.get_input_embeddings()(given["input_ids"])
    mask = create_causal_mask(decoder.config, states, None, None, position_ids=given["position_ids"])
    return {"full_attention": mask, "linear_attention": None}


def _lengths(position_ids: Tensor) -> list[int] | None:
    """Return the lengths of the documents of all rows [rows, tokens]; None if every row is one document."""
    positions = position_ids[0] if position_ids.ndim == 3 else position_ids  # multimodal: the text's come first
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    firsts = begins.flatten().nonzero()[:, 0]
    if len(firsts) == len(positions):
        return None
    return torch.diff(firsts, append=firsts.new_tensor([positions.numel()])).tolist()


def _apart(part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a layer's forward: run it with each document as a row of its own."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        lengths, given = _LENGTHS.get(), bound(part, args, kwargs)
        if lengths is None:
            raise RuntimeError(
                f"reset_states: {type(part).__name__} runs outside of its decoder, where nothing says where documents "
                "begin, as gradient checkpointing lets it: train without activation checkpointing"
            )
        if not lengths or any(given.get(name) is not None for name in (*_CACHES, "attention_mask")):
            return forward(*args, **kwargs)
        states = given.pop("hidden_states")
        rest = {name: value for name, value in given.items() if name not in BOUNDARIES}
        if sum(lengths) < states.shape[0] * states.shape[1]:  # positions of one row, for all
            lengths = lengths * (states.shape[0] * states.shape[1] // sum(lengths))
        pieces = states.flatten(0, 1).split(lengths)
        outputs: list[Tensor] = [*pieces]
        for power in {length.bit_length() for length in lengths}:
            alike = [index for index, length in enumerate(lengths) if length.bit_length() == power]
            ran = forward(pad_sequence([pieces[index] for index in alike], batch_first=True), **rest)
            for index, row in zip(alike, ran, strict=True):
                outputs[index] = row[: lengths[index]]
        return torch.cat(outputs).view(*states.shape[:2], -1)

    return run
