"""A self-test of a model, called as it will be called: does it keep packed documents apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_longtrunc.models import decoder_of, evaluating, parameters_of, unwrapped

if TYPE_CHECKING:
    from torch import Tensor

_DOCUMENT = 8  # tokens of each of the two documents in a row of the test
_ROUNDING = 1e-5  # what it may move, as a share of the change in the first document's own logits
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@torch.no_grad()
def check_packed(model: Any, batch: Mapping[str, Any]) -> None:
    """Raise if documents packed in one row see each other in `model(**batch)`.

    Two forwards on rows of two documents of 8 tokens, with the arguments that `batch` has (row count, layout, masks,
    `use_cache`): the first document's tokens change between them, the second one's logits must not. Two more forwards,
    on the same documents in rows of their own, measure how far rounding alone moves them (experts that get other
    tokens, scales of a whole batch). Whether documents are kept apart depends on the model, its attention, its kernels
    and the call, and a leak is silent otherwise.

    Args:
        model: a causal language model, PEFT, `torch.compile`, DDP and FSDP wrappers included; it is run in eval mode
            and left as it was.
        batch: what the training loop will hand to the model, from `BestFitPackingCollator`. Trainer switches the cache
            off by itself: for it, check `{**batch, "use_cache": False}`.

    Raises:
        TypeError: no model, or no batch.
        ValueError: the model takes no `position_ids`, the batch has none, or the second document's logits moved by more
            than rounding: 4 times what they move in a row of their own, and 0.001 % of what the first one's move; the
            message names the probable cause.
    """
    inside = unwrapped(model)
    if not isinstance(inside, nn.Module) or not isinstance(batch, Mapping):
        raise TypeError(
            "check_packed wants a causal language model and the batch that it will be called with, got "
            f"{type(model).__name__} and {type(batch).__name__}"
        )
    if "position_ids" not in parameters_of(inside):
        raise ValueError(f"{type(inside).__name__} takes no position_ids: documents packed for it would see each other")
    if batch.get("position_ids") is None:
        raise ValueError("the batch has no position_ids; collate it with BestFitPackingCollator")
    probe = _probe(batch)
    with evaluating(model):
        own, leaked = _influence(model, probe)
        _, rounding = _influence(model, _apart(probe))
    if not leaked <= max(4 * rounding, _ROUNDING * own):
        raise ValueError(
            f"documents packed in one row see each other in this {type(inside).__name__}: changing the first one's "
            f"tokens moved its own logits by {own:.3g} and the second one's by {leaked:.3g}, in a row of their own by "
            f"{rounding:.3g}. {_advice(inside, batch)}"
        )


def carries_states(model: Any) -> bool:
    """Return whether a model has convolutions, linear attention or other recurrent layers beside its attention.

    Their states run over document boundaries, unless their kernels are told of them.
    """
    inside = unwrapped(model)
    kinds = getattr(inside.config.get_text_config(), "layer_types", None) or []
    is_recurrent = any(kind == "linear_attention" or "attention" not in kind for kind in kinds)
    parts = decoder_of(inside).modules()
    return is_recurrent or any(isinstance(part, nn.Conv1d) or hasattr(part, "A_log") for part in parts)


def _influence(model: Any, probe: dict[str, Any]) -> tuple[float, float]:
    """Return how far new tokens in every other document move its logits and the next one's."""
    ids = probe["input_ids"]
    changed = ids.clone()
    documents = changed.view(-1, 2, _DOCUMENT)
    documents[:, 0] = (documents[:, 0] + 1) % unwrapped(model).get_input_embeddings().num_embeddings
    before, after = (model(**{**probe, "input_ids": tokens}).logits for tokens in (ids, changed))
    moved: Tensor = (after.float() - before.float()).abs().amax(-1).view(-1, 2, _DOCUMENT)
    return float(moved[:, 0].max()), float(moved[:, 1].max())


def _apart(probe: dict[str, Any]) -> dict[str, Any]:
    """Return the same documents, each in a row of its own."""
    alone = {name: value for name, value in probe.items() if name not in _BOUNDARIES}
    rows = ("input_ids", "position_ids", "attention_mask")
    return alone | {name: alone[name].reshape(-1, _DOCUMENT) for name in rows if name in alone}


def _probe(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink `batch` to rows of two documents, with the same arguments."""
    ids = batch["input_ids"]
    rows, device = min(len(ids), 2), ids.device
    size = rows * 2 * _DOCUMENT
    probe = {name: value for name, value in batch.items() if name not in ("labels", "input_ids", "position_ids")}
    probe["input_ids"] = ids.reshape(-1).repeat(-(-size // ids.numel()))[:size].view(rows, -1)
    positions = torch.arange(_DOCUMENT, device=device)
    probe["position_ids"] = positions.repeat(rows, 2)
    mask = batch.get("attention_mask")
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError(
                f"the batch's attention_mask has {mask.ndim} dimensions: a ready-made block mask replaces a model's "
                "own (a sliding window is lost); leave it out, restarting position_ids say the same"
            )
        probe["attention_mask"] = mask.new_ones(rows, 2 * _DOCUMENT)
    bounds = torch.arange(rows * 2 + 1, device=device, dtype=torch.int32) * _DOCUMENT
    flat = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": _DOCUMENT, "max_length_k": _DOCUMENT}
    flat["seq_idx"] = (
        torch.arange(rows * 2, device=device, dtype=torch.int32).repeat_interleave(_DOCUMENT).view(rows, -1)
    )
    return {**probe, **{name: value for name, value in flat.items() if name in batch}}


def _advice(model: Any, batch: Mapping[str, Any]) -> str:
    if batch.get("attention_mask") is not None:
        return "The batch has an attention_mask: transformers ignores document boundaries then; leave it out."
    if batch.get("use_cache", getattr(model.config, "use_cache", False)):
        return "A cache is in use, and transformers ignores document boundaries then; pass use_cache=False."
    if "flash" in (model.config._attn_implementation or "") and "cu_seq_lens_q" not in batch:
        return "Flash attention reads boundaries of several rows from cu_seq_lens only; use layout='flat'."
    if carries_states(model):
        return (
            "Its convolutions, linear attention or Mamba layers carry their states over the boundaries. Use "
            "layout='flat', on a GPU, with the packages whose kernels read seq_idx and cu_seq_lens: causal-conv1d, and "
            "flash-linear-attention (linear attention) or mamba-ssm (Mamba). transformers' own fallbacks read neither, "
            "nor do all architectures pass them on: if this stays, train it on padded batches."
        )
    return (
        "Its attention ignores the boundaries (some models build their mask without position_ids); train it on padded "
        "batches, or try another attn_implementation or layout='flat'."
    )
