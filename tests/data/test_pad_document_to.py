"""Documents filled up to a multiple: boundaries that context parallelism can cut, and the same loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import BestFitPackingCollator, PackedDataset, pack, write_datatrove
from hf_longtrunc.data.documents import IGNORE
from tests.conftest import tiny_config
from tests.data.corpora import raw_examples
from tests.data.test_dataset import SEQ_LENGTH, Tokenizer, arrow, documents_of

RANKS = 4


def padded(tokens: list[int], multiple: int) -> list[int]:
    """Cut a document as `pack()` does, and fill up its last piece, token by token."""
    tokens = list(tokens) if tokens[-1] == Tokenizer.eos_token_id else [*tokens, Tokenizer.eos_token_id]
    while len(tokens) % multiple:
        tokens.append(Tokenizer.pad_token_id)
    return tokens


@pytest.mark.parametrize("kind", ["dataset", "list", "stream", "written"])
def test_random_documents_end_at_multiples(kind, tmp_path):
    rng = np.random.default_rng(0)
    for case in range(4):
        multiple = int(rng.choice([2, 4, 8, 16]))
        lengths = rng.integers(1, 200, 40).tolist()
        source = {"list": raw_examples(lengths), "stream": iter(raw_examples(lengths))}.get(kind, arrow(lengths))
        packed = pack(source, SEQ_LENGTH, Tokenizer(), min_piece=1, pad_document_to=multiple)
        rows = packed.materialize(tmp_path / str(case)) if kind == "written" else list(packed)
        documents = [padded(row["input_ids"], multiple) for row in raw_examples(lengths)]
        pieces = [tuple(d[i : i + SEQ_LENGTH]) for d in documents for i in range(0, len(d), SEQ_LENGTH)]
        assert sorted(documents_of(rows).elements()) == sorted(pieces)
        for row in rows:
            tokens, labels = np.array(row["input_ids"]), np.array(row["labels"])
            is_padding = tokens == Tokenizer.pad_token_id
            assert (labels[is_padding] == IGNORE).all()
            assert ((labels == tokens) | is_padding | (np.array(row["position_ids"]) == 0)).all()


def test_ranks_of_context_parallelism_get_equal_parts_of_every_document():
    """Rank r takes the parts r and 2 n - 1 - r of the 2 n equal parts of a document."""
    packed = pack(arrow(), SEQ_LENGTH, Tokenizer(), pad_document_to=2 * RANKS)
    batch = BestFitPackingCollator(SEQ_LENGTH, layout="flat")(list(packed))
    assert (batch["cu_seq_lens_q"] % (2 * RANKS) == 0).all()


def test_the_loss_is_that_of_the_documents_alone():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).double().eval()
    lengths, collate = [5, 30, 12, 17], BestFitPackingCollator(SEQ_LENGTH)
    losses = [
        model(**collate(list(pack(arrow(lengths), SEQ_LENGTH, pad_document_to=multiple))), use_cache=False).loss
        for multiple in (1, 8)
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_padding_needs_labels_and_a_row_of_whole_multiples(tmp_path):
    with pytest.raises(
        ValueError, match="seq_length must be a multiple of pad_document_to = 6, as all pieces are, got 64"
    ):
        pack(arrow(), SEQ_LENGTH, pad_document_to=6)
    packed = pack(arrow(), SEQ_LENGTH, pad_document_to=8)
    with pytest.raises(ValueError, match=r"columns must have labels: the documents have padding \(pad_document_to\)"):
        packed.materialize(tmp_path, columns=["input_ids"])
    with pytest.raises(ValueError, match=r"holds tokens only, and the documents have padding \(pad_document_to\)"):
        write_datatrove(packed, tmp_path / "rows.ds", pad_token_id=0)
    with pytest.raises(ValueError, match="the plan was made for other documents"):
        PackedDataset(arrow(), packed.packing)
    assert len(PackedDataset(arrow(), packed.packing, pad_document_to=8)) == len(packed)
