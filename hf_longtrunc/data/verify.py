"""A self-test of a model with a batch of the training loop: it must keep packed documents apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_longtrunc.data.states import BOUNDARIES, carries_state
from hf_longtrunc.errors import LeakingRowsError
from hf_longtrunc.models import check_model, decoder_of, evaluating, parameters_of, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_DOCUMENT = 8  # tokens of each of the two documents in a row of the test
_ROUNDING = 1e-5  # allowed change, as a share of the change in the first document's own logits
_PLACE = 1e-3  # allowed difference between a place in a long row and a row of its own: kernels round differently
_HALF = 4  # the same in half precision, in units of its epsilon


@torch.no_grad()
def check_packed(model: Any, batch: Mapping[str, Any]) -> None:
    """Raise if documents packed in one row see each other in `model(**batch)`, or depend on their place in the row.

    A leak depends on the model, its attention, its kernels and the arguments of the call, and nothing else reports it.

    Two forwards on rows of two documents of 8 tokens, with the arguments of `batch`: only the first document's tokens
    differ, so the second one's logits must be equal, but for the rounding that two more forwards measure. One more, on
    the first row of `batch`, finds attention scaled by the index in the row (Llama 4 from token 8,191 on), and chunks
    counted from the row's beginning.

    Args:
        model: a causal language model, or a PEFT, `torch.compile`, DDP or FSDP wrapper; run in eval mode and left
            unchanged.
        batch: of the training loop, from `BestFitPackingCollator` or the collator of any other trainer. Trainer
            disables the cache: for it, check `{**batch, "use_cache": False}`.

    Raises:
        TypeError: no model, or no batch.
        LeakingRowsError: a ValueError: the second document's logits changed by more than rounding, or a document's
            logits differ by 0.1 % (3 % in bfloat16) between the row and a row of its own. It names the probable cause.
        ValueError: the model takes no `position_ids`, or the batch has none.

    Examples:
        >>> collator = BestFitPackingCollator(seq_length=5)
        >>> batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
        >>> check_packed(model, {**batch, "use_cache": False})
        >>> check_packed(model, {**batch, "use_cache": True})
        Traceback (most recent call last):
        hf_longtrunc.errors.LeakingRowsError: ...
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
        raise LeakingRowsError(
            f"documents packed in one row see each other in this {type(inside).__name__}: changing the first one's "
            f"tokens moved its own logits by {own:.3g} and the second one's by {leaked:.3g}, in a row of their own by "
            f"{rounding:.3g}. {_advice(inside, batch)}"
        )
    allowed = max(_PLACE, _HALF * torch.finfo(next(p.dtype for p in inside.parameters() if p.is_floating_point())).eps)
    with evaluating(model):
        for place, difference in _differences(model, batch):
            if not difference <= allowed:
                raise LeakingRowsError(
                    f"a document of a row sees where in the row it lies in this {type(inside).__name__}: from token "
                    f"{place} on its logits differ by {difference:.1%} of their size from those that it has alone. "
                    "Attention is scaled (attn_temperature_tuning), or cut into chunks, by the index in the row; pack "
                    "shorter rows, or switch the scaling off"
                )


def try_packed(model: Any, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Run `check_packed` for two implementations of attention and five kinds of batches.

    Args:
        model: a causal language model; its attention implementation is changed, and restored.
        rows: packed rows of one length: `[tokens]` tensors of `input_ids` and `position_ids`.

    Returns:
        A verdict for each implementation and kind: "apart", "leaks", or "refused" with the type of the model's error.

    Examples:
        >>> verdicts = try_packed(model, pack([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}], 5))
        >>> verdicts["sdpa", "position_ids"], verdicts["sdpa", "and a cache"]
        ('apart', 'leaks')
    """
    check_model(model)
    names = ("input_ids", "position_ids")
    rows_of = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
    plain = {name: value.to(model.device) for name, value in rows_of.items()}
    flat = {name: value.reshape(1, -1) for name, value in plain.items()}
    bounds = _bounds(flat["position_ids"])
    kinds = {
        "position_ids": plain | {"use_cache": False},
        "flat": flat | {"use_cache": False},
        "flat, cu_seq_lens, seq_idx": flat | bounds | {"use_cache": False},
        "and a 2D mask": plain | {"attention_mask": torch.ones_like(plain["input_ids"]), "use_cache": False},
        "and a cache": plain | {"use_cache": True},
    }
    before, found = model.config._attn_implementation, {}
    try:
        for attention in ("eager", "sdpa"):
            for kind, batch in kinds.items():
                found[attention, kind] = _verdict(model, attention, batch)
    finally:
        model.set_attn_implementation(before)
    return found


def _verdict(model: Any, attention: str, batch: dict[str, Any]) -> str:
    try:
        model.set_attn_implementation(attention)
        check_packed(model, batch)
    except LeakingRowsError:
        return "leaks"
    except Exception as error:
        return f"refused ({type(error).__name__})"
    return "apart"


def carries_states(model: Any) -> bool:
    """Return whether a model has convolutions, linear attention or other recurrent layers."""
    inside = unwrapped(model)
    kinds = getattr(inside.config.get_text_config(), "layer_types", None) or []
    is_recurrent = any(kind == "linear_attention" or "attention" not in kind for kind in kinds)
    return is_recurrent or any(map(carries_state, decoder_of(inside).modules()))


def _differences(model: Any, batch: Mapping[str, Any]) -> Iterator[tuple[int, float]]:
    """Yield places in the batch's first row, with the relative difference of a document's logits there and alone."""
    inside = unwrapped(model)
    ids, positions = batch["input_ids"][:1].clone(), batch["position_ids"][:1].clone()
    chunk = getattr(inside.config.get_text_config(), "attention_chunk_size", None) or 0
    end, border = ids.shape[1] - _DOCUMENT, chunk - _DOCUMENT // 2
    if positions.ndim != 2 or end < 2 * _DOCUMENT:
        return  # no longer than the rows of the probe above, or positions of pictures
    places = [border, end] if _DOCUMENT <= border <= end - _DOCUMENT else [end]
    document = torch.arange(_DOCUMENT, device=ids.device)
    for place in places:
        ids[:, place : place + _DOCUMENT], positions[:, place : place + _DOCUMENT] = ids[:, :_DOCUMENT], document
        rest = positions[0, place + _DOCUMENT :]  # the rest of the overwritten document starts at position 0
        stop = int(torch.cat([rest, rest.new_zeros(1)]).eq(0).int().argmax())
        rest[:stop] = torch.arange(stop, device=ids.device)
    given = {"use_cache": batch["use_cache"]} if "use_cache" in batch else {}
    first = model(**given, input_ids=ids[:, :_DOCUMENT], position_ids=document[None]).logits.float()
    bounds = {name: value for name, value in _bounds(positions).items() if name in batch}
    call = given | bounds | {"input_ids": ids, "position_ids": positions}
    kept = torch.cat([document + place for place in places])
    has_choice = "logits_to_keep" in parameters_of(inside)
    logits = model(**call, **({"logits_to_keep": kept} if has_choice else {})).logits.float()
    rows = (logits if has_choice else logits[:, kept]).split(_DOCUMENT, dim=1)
    for place, row in zip(places, rows, strict=True):
        yield place, float((row - first).norm() / first.norm())


def _bounds(positions: Tensor) -> dict[str, Any]:
    """Return the boundary arguments of a flat batch, for positions [1, tokens]."""
    is_first = positions[0] == 0
    bounds = torch.cat([is_first.nonzero()[:, 0], is_first.new_tensor([len(is_first)], dtype=torch.long)]).int()
    longest = int(bounds.diff().max())
    flat = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {**flat, "seq_idx": (is_first.cumsum(0) - 1).int()[None]}


def _influence(model: Any, probe: dict[str, Any]) -> tuple[float, float]:
    """Return the largest changes that new tokens in every other document cause in its logits and in the next one's."""
    ids = probe["input_ids"]
    changed = ids.clone()
    documents = changed.view(-1, 2, _DOCUMENT)
    documents[:, 0] = (documents[:, 0] + 1) % unwrapped(model).get_input_embeddings().num_embeddings
    before, after = (model(**{**probe, "input_ids": tokens}).logits for tokens in (ids, changed))
    moved: Tensor = (after.float() - before.float()).abs().amax(-1).view(-1, 2, _DOCUMENT)
    return float(moved[:, 0].max()), float(moved[:, 1].max())


def _apart(probe: dict[str, Any]) -> dict[str, Any]:
    """Return the same documents, each in a row of its own."""
    alone = {name: value for name, value in probe.items() if name not in BOUNDARIES}
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
    flat = _bounds(probe["position_ids"].reshape(1, -1))
    flat["seq_idx"] = flat["seq_idx"].view(rows, -1)
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
            "Its convolutions, linear attention or Mamba layers carry their states over the boundaries. Attach "
            "hf_longtrunc.reset_states(model), or use layout='flat', on a GPU, with the packages whose kernels read "
            "seq_idx and cu_seq_lens: causal-conv1d, and flash-linear-attention (linear attention) or mamba-ssm "
            "(Mamba). Not all architectures pass them on."
        )
    return (
        "Its attention ignores the boundaries (some models build their mask without position_ids); train it on padded "
        "batches, or try another attn_implementation or layout='flat'."
    )
