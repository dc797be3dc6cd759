"""The section that a saved model's card gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM, default_data_collator

import hf_longtrunc
from hf_longtrunc import (
    CreamCollator,
    CreamPositions,
    EtaLogitsProcessor,
    GuidanceLogitsProcessor,
    LMInfinite,
    PEMAAdapter,
    Unlimiformer,
    pack,
)
from hf_longtrunc.evaluation import PositionBin, update_model_card
from hf_longtrunc.evaluation.card import PAPERS
from hf_longtrunc.handles import Handle
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


NO_TECHNIQUE = {
    "Answer",
    "ArchiveCacheLayer",
    "AttentionTrace",
    "AuxiliaryModelLogitsProcessor",
    "BM25",
    "CacheLawError",
    "DRYLogitsProcessor",
    "Datastore",
    "Explanation",
    "FaissDatastore",
    "Fused",
    "GradualUnrolling",
    "HFLongtruncError",
    "LambdaCacheLayer",
    "LeakingRowsError",
    "PEMAMemory",
    "Packing",
    "Passage",
    "SamplingMask",
    "SamplingMaskRecorder",
    "SentenceEncoder",
    "ShardedDatastore",
    "SupportChecker",
    "TextIndex",
    "TruncationRecord",
    "TruncationTrace",
    "ULDCollator",
    "UnsupportedModelError",
    "XTCLogitsProcessor",
    "ask",
    "attach_processors",
    "attach_truncation",
    "best_fit_decreasing",
    "build_pema_memory",
    "check_packed",
    "contiguous_positions",
    "critical_threshold",
    "load_encoder",
    "load_pretrained",
    "load_uld_assistant",
    "pack_in_order",
    "packing_table",
    "plot_packing",
    "random_positions",
    "read_megatron",
    "reset_states",
    "sampler_by_name",
    "sampler_names",
    "sampling_settings",
    "save_uld_assistant",
    "trained_length",
    "truncated_log_probs",
    "truncated_scores",
    "try_packed",
    "verify_positions",
    "write_datatrove",
    "write_megatron",
}


def test_every_public_name_is_a_technique_with_a_paper_or_named_as_none():
    assert set(hf_longtrunc.__all__) - set(PAPERS) - NO_TECHNIQUE == set()
    assert not set(PAPERS) & NO_TECHNIQUE


@pytest.mark.parametrize("name", sorted(set(PAPERS) & set(hf_longtrunc.__all__)))
def test_every_technique_gets_its_line(name, tmp_path):
    technique = getattr(hf_longtrunc, name)
    assert f": `{name}` (" in update_model_card(tmp_path, [technique]).read_text()


def test_every_paper_of_the_readme_is_in_a_card_of_its_technique():
    readme = Path(__file__, "../../../README.md").resolve().read_text()
    cited = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", readme))
    assert cited <= {paper.arxiv for paper in PAPERS.values()}


def test_objects_subclasses_and_handles_are_lines_without_addresses(tmp_path, tiny_model):
    class Mine(EtaLogitsProcessor):
        pass

    objects = [
        CreamCollator(default_data_collator, 8, 2),
        CreamPositions(),
        GuidanceLogitsProcessor(tiny_model, 1.5, torch.ones(1, 1, dtype=torch.long)),
        Unlimiformer(),
        Mine(2e-3),
        Handle(LMInfinite(), tiny_model, "nothing"),
        PEMAAdapter(8, 2, 97),
    ]
    lines = [line for line in update_model_card(tmp_path, objects).read_text().splitlines() if line.startswith("- ")]
    lines = lines[-len(objects) :]
    for method, line in zip(("CREAM", "CREAM", "class", "Unlimi", "eta", "LM-Inf", "PEMA"), lines, strict=True):
        assert line.startswith(f"- {method}")
        assert " 0x" not in line
    assert "`LMInfinite(" in lines[5]
    assert "`PEMAAdapter`" in lines[6]
