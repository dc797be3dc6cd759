"""The mistakes that users make most: each raises, and the page says what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, default_data_collator

import hf_longtrunc
from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    BestFitPackingCollator,
    CreamCollator,
    EtaLogitsProcessor,
    LMInfinite,
    SoftmaxBasis,
    Unlimiformer,
    check_packed,
    extend_context,
    pack,
)
from hf_longtrunc.models import CACHE, cache_of
from tests.conftest import tiny_config

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
IDS = torch.arange(1, 9)[None]


def cache_out_of_its_block(model):
    with LMInfinite(window_length=8)(model):
        cache = cache_of(model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True))
    model(IDS[:, :1], **{CACHE: cache})


def two_patches(model):
    with LMInfinite()(model), LMInfinite()(model):
        pass


def right_padding(model):
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    with LMInfinite(window_length=8)(model):
        model.generate(IDS, attention_mask=mask, max_new_tokens=2)


def packed_with_a_mask(model):
    batch = BestFitPackingCollator(5, pad_token_id=0)([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    check_packed(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"]), "use_cache": False})


def scaled_twice(model):
    extend_context(model, 2)
    extend_context(model, 2)


def basis_of_another(model):
    other = LlamaForCausalLM(tiny_config(vocab_size=64))
    basis_aware = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(other, 4), 2e-3)
    model.generate(IDS, do_sample=True, max_new_tokens=1, logits_processor=[basis_aware])


MISTAKES = {
    "epsilon must be a number above 0 and below 1, got 2.0": lambda model: EtaLogitsProcessor(2),
    "object of type 'EtaLogitsProcessor' has no len()": lambda model: model.generate(
        IDS, max_new_tokens=1, logits_processor=EtaLogitsProcessor(2e-3)
    ),
    "make the basis from the model that generates": basis_of_another,
    "is patched by LMInfinite already": two_patches,
    "Generate inside the patch": cache_out_of_its_block,
    "pad on the left": right_padding,
    "tokenize the dataset first": lambda model: pack([{"text": "one two"}], 8),
    "transformers ignores document boundaries then": packed_with_a_mask,
    "CreamCollator is attached to no model": lambda model: CreamCollator(default_data_collator, 8, 2)(
        [{"input_ids": [1, 2, 3]}]
    ),
    "positions are scaled already": scaled_twice,
    "Unlimiformer needs an encoder-decoder": lambda model: Unlimiformer().attach(model),
    "has no attribute 'Eta'; it offers": lambda model: hf_longtrunc.Eta,
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message, tiny_model):
    with pytest.raises((AttributeError, TypeError, ValueError)) as caught:
        MISTAKES[message](tiny_model)
    assert message in str(caught.value)
    assert message in PAGE


def test_learned_positions_are_named(tiny_gpt2):
    with pytest.raises(ValueError, match="its queries depend on absolute positions"):
        LMInfinite(window_length=8).attach(tiny_gpt2)
    assert "its queries depend on absolute positions" in PAGE


def test_what_the_page_says_that_nothing_notices_is_so(tiny_model):
    """A processor sees every token whatever top_k is; a basis knows its weights, if it is asked."""
    finite = []

    def watch(input_ids, scores):
        finite.append(int(scores.isfinite().sum()))
        return scores

    tiny_model.generate(IDS, do_sample=True, top_k=5, max_new_tokens=1, logits_processor=[watch])
    assert finite == [97]
    other = SoftmaxBasis.from_model(LlamaForCausalLM(tiny_config()), 4)
    processor = BasisAwareLogitsProcessor(other, 2e-3)
    tiny_model.generate(IDS, do_sample=True, top_k=0, max_new_tokens=1, logits_processor=[processor])
    with pytest.raises(ValueError, match="made from other weights"):
        other.check_model(tiny_model)
    assert "basis.check_model(model)" in PAGE
