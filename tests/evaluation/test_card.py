"""The section that a saved model's card gets."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

import hf_longtrunc
from hf_longtrunc import EtaLogitsProcessor, LMInfinite, pack
from hf_longtrunc.evaluation import PositionBin, update_model_card
from hf_longtrunc.evaluation.card import PAPERS
from tests.conftest import tiny_config

RECORDS = [PositionBin(0, 64, 63, 2.5, 12.182494), PositionBin(64, 96, 32, 2.75, 15.642632)]


def test_a_card_is_begun_beside_a_saved_model(tmp_path):
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    path = update_model_card(tmp_path, [pack, LMInfinite(window_length=64), EtaLogitsProcessor(2e-3)], records=RECORDS)
    card = ModelCard.load(path)
    assert card.data.tags == ["hf_longtrunc"]
    for part in (
        "- best-fit packing: `pack` (Ding et al. 2024",
        "LMInfinite(num_sink_tokens=16, window_length=64",
        "EtaLogitsProcessor(",
        "https://arxiv.org/abs/2210.15191",
        "| start | end | tokens | nll | perplexity |\n| --- | --- | --- | --- | --- |\n| 0 | 64 | 63 | 2.5 | 12.18 |",
    ):
        assert part in card.text, part


def test_a_card_that_is_there_keeps_everything_else_and_is_updated_in_place(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- chat\n---\n\n# Mine\n\nWords.\n")
    update_model_card(tmp_path, [LMInfinite()], records=RECORDS)
    path = update_model_card(tmp_path, [EtaLogitsProcessor])
    card = ModelCard.load(path)
    assert (card.data.license, card.data.tags) == ("mit", ["chat", "hf_longtrunc"])
    assert card.text.lstrip().startswith("# Mine\n\nWords.\n\n<!-- hf_longtrunc: begin -->")
    assert card.text.count("## hf_longtrunc") == 1
    assert "LMInfinite" not in card.text
    assert "| start |" not in card.text
    before = path.read_text()
    update_model_card(tmp_path, [EtaLogitsProcessor])
    assert path.read_text() == before


def test_a_card_without_metadata_keeps_its_words(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n\nA $1 \\d word.\n")
    text = update_model_card(tmp_path, [pack]).read_text()
    assert "# Mine\n\nA $1 \\d word.\n" in text
    assert text.startswith("---\nlibrary_name: transformers\ntags:\n- hf_longtrunc\n---\n")


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(NotADirectoryError, match="save the model first"):
        update_model_card(tmp_path / "nowhere", [pack])
    with pytest.raises(ValueError, match=r"techniques: 3 is none of hf_longtrunc's.*LMInfinite"):
        update_model_card(tmp_path, [3])
    with pytest.raises(ValueError, match="records must be of one kind"):
        update_model_card(tmp_path, [pack], records=[RECORDS[0], PAPERS["pack"]])
    assert not (tmp_path / "README.md").exists()


def test_every_name_with_a_paper_is_public():
    assert set(PAPERS) <= set(hf_longtrunc.__all__)
