"""Batches in which no document sees another: from packed rows, or from documents packed within the batch."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from hf_longtrunc.arguments import check_choice, check_int
from hf_longtrunc.data.documents import BOUNDARIES, IGNORE, LOSS_MASKS, join, read_document, read_packed_row
from hf_longtrunc.data.packing import best_fit_decreasing
from hf_longtrunc.data.verify import carries_states
from hf_longtrunc.models import unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_longtrunc.data.documents import Tokens

Row = dict[str, "Tokens"]

logger = logging.getLogger(__name__)

_POOR_FILL = 0.9


class BestFitPackingCollator:
    """Collate examples into rows of `seq_length` tokens for Trainer, with document boundaries in `position_ids`.

    Packed rows from `pack()` (with `position_ids` or `seq_lengths`) are padded. Documents are packed within the batch:
    the same loss and gradients as with padding, in fewer tokens. The first token of each piece and the padding have
    label -100; padding is a segment of its own. The batch has no `attention_mask`: transformers separates documents
    only without one, and only without a cache (Trainer disables it; in your own loop pass `use_cache=False`).

    Args:
        seq_length: tokens in a row.
        tokenizer: for its padding token.
        pad_token_id: None takes the tokenizer's or its EOS; without a tokenizer 0, which is logged: no document sees
            the padding, and it is never learned.
        layout: "rows" gives [rows, seq_length], for eager, sdpa and flex attention. "flat" gives one row of all tokens
            without padding, [1, tokens], with cu_seq_lens_q/k, max_length_q/k and seq_idx: for flash attention, and for
            the kernels of convolutions, linear attention and Mamba. "auto" takes "flat" if `model` has such layers or
            flash attention. `check_packed` tests a model with a batch.
        model: read once for its layers and its longest position; not kept.

    Raises:
        TypeError, ValueError: a bad argument; rows in which Llama 4 would scale attention by the place in the row
            (`attn_temperature_tuning`); an example that is no document or packed row (the message names its place and
            column); a packed row longer than `seq_length`; packed rows and documents in one batch; an empty batch;
            `layout="flat"` with accelerate's dispatcher, which would split the single row.

    Examples:
        >>> collator = BestFitPackingCollator(seq_length=6, pad_token_id=0)
        >>> batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [4]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7, 8, 9, 4]], [[-100, 6, 7, -100, 9, -100]])
    """

    def __init__(
        self,
        seq_length: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        pad_token_id: int | None = None,
        layout: Literal["auto", "rows", "flat"] = "auto",
        model: PreTrainedModel | None = None,
    ) -> None:
        self.seq_length = check_int("seq_length", seq_length, minimum=1)
        check_choice("layout", layout, ("auto", "rows", "flat"))
        check_tokenizer(tokenizer)
        padding = padding_token(tokenizer) if pad_token_id is None else pad_token_id
        self.pad_token_id = check_int("pad_token_id", padding, minimum=0)
        if model is not None and not hasattr(unwrapped(model), "config"):
            raise TypeError(f"model must be a transformers model or None, got {type(model).__name__}")
        vocabulary = None if model is None else getattr(unwrapped(model).config.get_text_config(), "vocab_size", None)
        if vocabulary is not None and self.pad_token_id >= vocabulary:
            raise ValueError(
                f"pad_token_id must be below the model's vocabulary of {vocabulary}, got {self.pad_token_id}: pass "
                "another one, or the model's own tokenizer"
            )
        self.layout = _layout_for(model) if layout == "auto" else layout
        if tokenizer is None and pad_token_id is None and self.layout == "rows":
            logger.warning(
                "BestFitPackingCollator has neither a tokenizer nor a pad_token_id and pads rows with token 0, which "
                "no document sees and no model learns: pass the tokenizer, or pad_token_id=0, to choose it yourself"
            )
        if model is not None:
            warn_beyond_window(
                self.seq_length, getattr(unwrapped(model).config, "max_position_embeddings", None), "model"
            )
        self._reach = None if model is None else _tokens_before_temperature(model)
        if self._reach is not None and self.seq_length > self._reach:
            raise ValueError(_by_place(self._reach, f"seq_length = {self.seq_length}"))
        self._warned = self._warned_of_columns = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples; tensors are int64, cu_seq_lens and seq_idx int32."""
        examples = list(examples)
        if not examples:
            raise ValueError("the batch holds no documents: give the collator a list of at least one example")
        packed = [_is_packed(example) for example in examples]
        if any(packed) and not all(packed):
            raise ValueError("a batch holds packed rows (with position_ids) and raw documents: use one kind")
        rows = self._packed_rows(examples) if any(packed) else self._best_fit(examples)
        return self._flat_batch(rows) if self.layout == "flat" else self._row_batch(rows)

    def _packed_rows(self, examples: Sequence[Mapping[str, Any]]) -> list[Row]:
        rows = [read_packed_row(row, f"row {i} of the batch") for i, row in enumerate(examples)]
        longest = max(len(row["input_ids"]) for row in rows)
        if longest > self.seq_length:
            raise ValueError(
                f"a packed row has {longest} tokens, more than the collator's seq_length = {self.seq_length}; "
                "give both the seq_length of pack()"
            )
        return rows

    def _best_fit(self, examples: Sequence[Mapping[str, Any]]) -> list[Row]:
        documents = [read_document(example, f"example {i} of the batch") for i, example in enumerate(examples)]
        self._warn_of_dropped_columns(examples)
        if not any(len(document.input_ids) for document in documents):
            return [join([])]  # a row of padding: its loss is NaN, as every mean of nothing, and its gradients are 0
        plan = best_fit_decreasing([len(d.input_ids) for d in documents], self.seq_length, min_piece=1)
        self._warn_if_poor(plan.stats()["efficiency"])
        return [
            join([documents[plan.document[p]].cut(plan.start[p], plan.length[p]) for p in plan.row(row)])
            for row in range(len(plan))
        ]

    def _row_batch(self, rows: list[Row]) -> dict[str, Any]:
        shape = len(rows), self.seq_length
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, np.int64),
            "position_ids": np.zeros(shape, np.int64),
            "labels": np.full(shape, IGNORE, np.int64),
        }
        for index, row in enumerate(rows):
            fill = len(row["input_ids"])
            for name in _ROW_COLUMNS:
                batch[name][index, :fill] = row[name]
            batch["position_ids"][index, fill:] = np.arange(self.seq_length - fill)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _flat_batch(self, rows: list[Row]) -> dict[str, Any]:
        _refuse_dispatcher()
        flat = {name: np.concatenate([row[name] for row in rows]) for name in _ROW_COLUMNS}
        if not len(flat["input_ids"]):  # models take no row of no tokens
            alone = {"input_ids": self.pad_token_id, "position_ids": 0, "labels": IGNORE}
            flat = {name: np.array([value], np.int64) for name, value in alone.items()}
        if self._reach is not None and len(flat["input_ids"]) > self._reach:
            raise ValueError(_by_place(self._reach, f"a flat batch of {len(flat['input_ids'])}"))
        is_first = flat["position_ids"] == 0
        bounds = np.append(np.flatnonzero(is_first), len(is_first)).astype(np.int32)
        longest = int(np.diff(bounds).max(initial=0))
        cu_seq_lens = torch.from_numpy(bounds)
        return {
            **{name: torch.from_numpy(array)[None] for name, array in flat.items()},
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens.clone(),
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": torch.from_numpy((np.cumsum(is_first) - 1).astype(np.int32))[None],
        }

    def _warn_of_dropped_columns(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Warn once if a trainer may have dropped masks or boundaries: the rest would look like a plain document."""
        left = {name for example in examples for name in example if example[name] is not None}
        if self._warned_of_columns or left - {"input_ids", "attention_mask"} or accelerates_loader() is None:
            return
        self._warned_of_columns = True
        warnings.warn(
            "the collator got documents without labels: every token of them is learned. Trainer drops the columns that "
            f"a model's forward does not name, such as {', '.join(LOSS_MASKS)} and the seq_lengths of packed rows: if "
            "the dataset has one of them, pass TrainingArguments(remove_unused_columns=False), or train on "
            "hf_longtrunc.pack(dataset, seq_length), whose rows keep what they say",
            stacklevel=4,
        )

    def _warn_if_poor(self, efficiency: float) -> None:
        if self.layout == "rows" and efficiency < _POOR_FILL and not self._warned:
            self._warned = True
            warnings.warn(
                f"packing within this batch fills {efficiency:.0%} of its rows: a batch of few documents cannot be "
                "packed well. Larger batches are packed better; hf_longtrunc.pack(dataset, seq_length) packs the whole "
                "dataset",
                stacklevel=4,
            )


_ROW_COLUMNS = ("input_ids", "position_ids", "labels")


def _is_packed(example: Any) -> bool:
    return isinstance(example, Mapping) and any(example.get(name) is not None for name in BOUNDARIES)


def padding_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return a tokenizer's padding token, or its EOS, else raise ValueError; 0 without a tokenizer."""
    check_tokenizer(tokenizer)
    if tokenizer is None:
        return 0
    for token in (getattr(tokenizer, "pad_token_id", None), tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        f"tokenizer has neither a padding token nor an EOS ({type(tokenizer).__name__}): set tokenizer.pad_token, or "
        "pass the collator pad_token_id=0, as padding is never learned"
    )


def check_tokenizer(tokenizer: object) -> None:
    """Raise TypeError for anything but a tokenizer or None."""
    eos = getattr(tokenizer, "eos_token_id", ...)
    is_tokenizer = (eos is None or isinstance(eos, int)) and not hasattr(tokenizer, "model_type")  # no model's config
    if tokenizer is not None and not is_tokenizer:
        raise TypeError(
            f"tokenizer must be a tokenizer with an eos_token_id, or None, got {type(tokenizer).__name__}; load one by "
            "AutoTokenizer.from_pretrained(name)"
        )


def _layout_for(model: PreTrainedModel | None) -> str:
    if model is None:
        return "rows"
    is_flash = "flash" in (unwrapped(model).config._attn_implementation or "")
    return "flat" if is_flash or carries_states(model) else "rows"


def _tokens_before_temperature(model: PreTrainedModel) -> int | None:
    """Return the largest row that Llama 4 reads like its documents alone; None for other models."""
    config = unwrapped(model).config.get_text_config()
    return int(config.floor_scale) - 1 if getattr(config, "attn_temperature_tuning", False) else None


def _by_place(reach: int, got: str) -> str:
    return (
        f"the model scales attention by a token's place in its row from token {reach} on (attn_temperature_tuning), "
        "not in its document: packed documents would be read otherwise than alone. Rows may have "
        f"{reach} tokens, got {got}; take shorter rows, or set the config's attn_temperature_tuning to False"
    )


def accelerates_loader() -> Any:
    """Return the dataloader that accelerate (and so Trainer) is reading from; None if there is none."""
    library = sys.modules.get("accelerate.data_loader")
    return None if library is None else library.GradientState().active_dataloader


def _refuse_dispatcher() -> None:
    """Raise ValueError if accelerate is reading from a dataloader that splits batches by their rows."""
    loader = accelerates_loader()
    if loader is not None and isinstance(loader, sys.modules["accelerate.data_loader"].DataLoaderDispatcher):
        raise ValueError(
            'layout="flat" makes batches of one row, and accelerate\'s dispatcher (its way with streams) cuts every '
            "tensor of a batch by the number of its rows: the ends of the documents (cu_seq_lens) would be lost. Let "
            'every process read for itself: TrainingArguments(accelerator_config={"dispatch_batches": False})'
        )


def warn_beyond_window(seq_length: int, window: int | None, owner: str) -> None:
    """Warn if rows are longer than the maximum of a model or a tokenizer."""
    if window is not None and seq_length > window:
        warnings.warn(
            f"seq_length = {seq_length} is more than the {owner}'s maximum of {window} tokens: a document of that "
            "length has positions that the model does not know",
            stacklevel=3,
        )
