"""Does a row leak: long rows, batches of other trainers, and the table of all ways to call a model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import transformers

from hf_longtrunc import BestFitPackingCollator, check_packed, pack, try_packed
from tests.attention.tiny_models import tiny_model
from tests.command_line import invoke, model_folder  # noqa: F401
from tests.data.corpora import raw_examples, token_lists

ROOT = Path(__file__).parents[2]
FAMILIES = [
    "bloom", "falcon_h1", "gemma3_text", "gpt2", "gpt_neox", "granitemoehybrid", "lfm2", "llama", "llama4_text", "mpt",
    "qwen3", "qwen3_next",
]  # fmt: skip
DOCUMENTS = token_lists((20, 31, 50, 27))
TOKENS = [token for document in DOCUMENTS for token in document]


def batch_of(**options):
    rows = [
        {
            "input_ids": TOKENS,
            "position_ids": [place for tokens in DOCUMENTS for place in range(len(tokens))],
        }
    ]
    return {**BestFitPackingCollator(128, **options)(rows), "use_cache": False}


def llama4(**changes):
    return tiny_model("llama4_text", **{"attn_temperature_tuning": False, "attention_chunk_size": 1024, **changes})


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_a_temperature_by_the_index_in_the_row_is_found_in_long_rows_alone(layout):
    """A probe of 16 tokens is blind to it: Llama 4 begins at its 8,192nd token."""
    tuned = {"attn_temperature_tuning": True, "floor_scale": 32, "attn_scale": 0.5}
    check_packed(llama4(), batch_of(layout=layout))
    check_packed(llama4(**tuned | {"floor_scale": 8192}), batch_of(layout=layout))
    with pytest.raises(ValueError, match=r"sees where in the row it lies.*from token 120 on.*attn_temperature_tuning"):
        check_packed(llama4(**tuned), batch_of(layout=layout))


def test_attention_chunks_by_the_index_in_the_row_are_found():
    """Attention that is cut at the 32nd token of the row, which transformers' own masks are not."""

    class Cut(torch.nn.Module):
        def forward(self, states, **kwargs):
            states = states.clone()
            states[:, 32:] += 1
            return states

    model = llama4(attention_chunk_size=32)
    check_packed(model, batch_of())
    layer, forward = model.model.layers[0], model.model.layers[0].forward
    layer.forward = lambda states, *args, **kwargs: forward(Cut()(states), *args, **kwargs)
    with pytest.raises(ValueError, match="from token 28 on"):
        check_packed(model, batch_of())


def test_a_batch_that_another_collator_made():
    """TRL's padding-free batches: one row, positions that restart, no mask; and one that hands a mask on."""
    ids, positions = torch.tensor([TOKENS]), batch_of()["position_ids"]
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids.clone(), "use_cache": False}
    model = tiny_model("qwen3")
    check_packed(model, batch)
    with pytest.raises(ValueError, match="The batch has an attention_mask"):
        check_packed(model, batch | {"attention_mask": torch.ones_like(ids)})


def test_the_table_of_the_page_is_what_twelve_families_show(monkeypatch):
    recipe = runpy.run_path(str(ROOT / "recipes/leaks.py"))
    tiny = __import__("tests.attention.tiny_models", fromlist=["tiny_model"])
    page = (ROOT / "docs/leaks_families.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    for family in FAMILIES:
        found = recipe["verdicts"](tiny, family)
        for attention in ("eager", "sdpa"):
            (line,) = [line for line in lines if family in line[0].split(", ") and attention in line[1].split(", ")]
            assert found[attention, "and a 2D mask"] != "apart"
            if f"transformers {transformers.__version__}" in lines[0][0]:
                assert line[2:] == [found[attention, kind] for _, kind in list(found)[: len(found) // 2]], family


def test_trying_all_ways_sets_the_attention_back():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    rows = [{name: value[0] for name, value in batch_of().items() if name != "use_cache"}]
    found = try_packed(model, rows)
    assert found["sdpa", "position_ids"] == found["eager", "flat"] == "apart"
    assert found["eager", "and a 2D mask"] == found["sdpa", "and a cache"] == "leaks"
    assert model.config._attn_implementation == before


def test_the_command(model_folder, tmp_path):  # noqa: F811
    result = invoke("check-packed", model_folder)
    assert result.exit_code == 0, result.output
    assert "apart" in result.output
    assert "leaks" in result.output
    pack(raw_examples(range(5, 40), vocabulary=50), 64).materialize(
        tmp_path / "rows", columns=["input_ids", "seq_lengths"]
    )
    result = invoke("check-packed", model_folder, "--rows", tmp_path / "rows", "--json")
    assert '"sdpa": {"position_ids": "apart"' in result.output
    (tmp_path / "raw.jsonl").write_text('{"input_ids": [5, 6]}\n')
    result = invoke("check-packed", model_folder, "--rows", tmp_path / "raw.jsonl")
    assert result.exit_code == 2
    assert "holds no packed rows" in result.stderr
