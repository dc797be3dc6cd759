"""A self-test of a model, called as it will be called: does it keep packed documents apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.models import evaluating, parameters_of, unwrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_DOCUMENT = 8  # tokens of each of the two documents in a row of the test
_LEAK = 1e-2  # of the change in the first document's own logits


@torch.no_grad()
def check_packed(model: Any, batch: Mapping[str, Any]) -> None:
    """Raise if documents packed in one row see each other in `model(**batch)`.

    Two forwards on rows of two documents of 8 tokens, with the arguments that `batch` has (row count, layout, masks,
    `use_cache`): the first document's tokens change between them, the second one's logits must not. Whether documents
    are kept apart depends on the model, its attention and the call, and a leak is silent otherwise.

    Args:
        model: a causal language model, PEFT, `torch.compile`, DDP and FSDP wrappers included; it is run in eval mode
            and left as it was.
        batch: what the training loop will hand to the model, from `BestFitPackingCollator`. Trainer switches the cache
            off by itself: for it, check `{**batch, "use_cache": False}`.

    Raises:
        ValueError: the model takes no `position_ids`, the batch has none, or the second document's logits moved by more
            than 1 % of the first one's; the message names the probable cause.
    """
    inside = unwrapped(model)
    if "position_ids" not in parameters_of(inside):
        raise ValueError(f"{type(inside).__name__} takes no position_ids: documents packed for it would see each other")
    if batch.get("position_ids") is None:
        raise ValueError("the batch has no position_ids; collate it with BestFitPackingCollator")
    with evaluating(model):
        own, leaked = _influence(model, _probe(batch))
    if not leaked <= _LEAK * own:
        raise ValueError(
            f"documents packed in one row see each other in this {type(inside).__name__}: changing the first one's "
            f"tokens moved its own logits by {own:.3g} and the second one's by {leaked:.3g}. {_advice(inside, batch)}"
        )


def _influence(model: Any, probe: dict[str, Any]) -> tuple[float, float]:
    """Return how far new tokens in the first document of each row move its logits and the second one's."""
    first = probe["position_ids"].new_zeros(probe["position_ids"].shape, dtype=torch.bool)
    first.view(-1, 2, _DOCUMENT)[:, 0] = True
    ids = probe["input_ids"]
    changed = torch.where(first, (ids + 1) % unwrapped(model).get_input_embeddings().num_embeddings, ids)
    before, after = (model(**{**probe, "input_ids": tokens}).logits.float() for tokens in (ids, changed))
    moved: Tensor = (after - before).abs().amax(-1)
    return float(moved[first].max()), float(moved[~first].max())


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
    return (
        "Its attention ignores the boundaries (linear attention and recurrent layers do, and some models build their "
        "mask without position_ids); train it on padded batches, or try another attn_implementation or layout='flat'."
    )
