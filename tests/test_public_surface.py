"""The front door: what is public, what importing costs, and that nothing is touched by it."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

import hf_longtrunc
from hf_longtrunc import evaluation, hosting

PUBLIC = {
    hf_longtrunc: [
        "Answer",
        "ArchiveCacheLayer",
        "AttentionTrace",
        "AuxiliaryModelLogitsProcessor",
        "BalancedRows",
        "BM25",
        "BasisAwareLogitsProcessor",
        "BestFitPackingCollator",
        "CacheLawError",
        "ContrastiveDecodingLogitsProcessor",
        "CreamCollator",
        "CreamPositions",
        "DRYLogitsProcessor",
        "DualChunkAttention",
        "Datastore",
        "EpsilonLogitsProcessor",
        "EtaLogitsProcessor",
        "Explanation",
        "FaissDatastore",
        "Fused",
        "GradualUnrolling",
        "GuidanceLogitsProcessor",
        "HFLongtruncError",
        "LMInfinite",
        "LambdaCacheLayer",
        "MinKLogitsProcessor",
        "LeakingRowsError",
        "PEMA",
        "PEMAAdapter",
        "PEMALogitsProcessor",
        "PEMAMemory",
        "PLessLogitsProcessor",
        "PackedDataset",
        "Passage",
        "SentenceEncoder",
        "TextIndex",
        "ask",
        "load_encoder",
        "PackedStream",
        "Packing",
        "ProxyTuningLogitsProcessor",
        "SamplingMask",
        "SamplingMaskRecorder",
        "ShardedDatastore",
        "SoftmaxBasis",
        "StreamingLLM",
        "SupportChecker",
        "TokenMixture",
        "TopBlocks",
        "TopHLogitsProcessor",
        "TopK",
        "TopNSigmaLogitsProcessor",
        "TruncationRecord",
        "TruncationTrace",
        "ULDCollator",
        "ULDLogitsProcessor",
        "ULDLoss",
        "Unlimiformer",
        "XTCLogitsProcessor",
        "UnsupportedModelError",
        "attach_processors",
        "attach_truncation",
        "best_fit_decreasing",
        "build_pema_memory",
        "check_packed",
        "contiguous_positions",
        "critical_threshold",
        "extend_context",
        "load_pretrained",
        "load_uld_assistant",
        "pack",
        "pack_in_order",
        "packing_table",
        "plot_packing",
        "pose_positions",
        "random_positions",
        "read_megatron",
        "reset_states",
        "sampler_by_name",
        "sampler_names",
        "sampling_settings",
        "save_uld_assistant",
        "train_pema",
        "trained_length",
        "truncated_log_probs",
        "truncated_scores",
        "try_packed",
        "uld_assistant",
        "verify_positions",
        "write_datatrove",
        "write_megatron",
    ],
    evaluation: [
        "PerplexityRecord",
        "PositionBin",
        "append_records",
        "cache_bytes",
        "compare_losses",
        "critical_parameters",
        "default_edges",
        "match_table",
        "matched_parameter",
        "matched_parameters",
        "perplexity_by_position",
        "perplexity_records",
        "perplexity_table",
        "plot_match",
        "plot_perplexity",
        "python_reference",
        "read_ahead",
        "read_records",
        "start_stream",
        "stream_losses",
        "token_losses",
        "update_model_card",
        "wilson_interval",
        "read_traces",
    ],
    hosting: [
        "Exported",
        "HostSettings",
        "Reading",
        "export",
        "hosted_generate",
        "reading_of",
        "serve",
        "verify_export",
    ],
}


ROOT = Path(__file__).parent.parent


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_the_public_names_are_these(module):
    assert module.__all__ == sorted(PUBLIC[module])


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_name_exists_and_is_documented(module):
    for name in module.__all__:
        assert getattr(module, name).__doc__
        assert name in dir(module)


def test_the_newest_section_of_the_changelog_is_this_version():
    changelog = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    heads = [line for line in changelog.splitlines() if line.startswith("## ")]
    sections = [re.fullmatch(r"## (\d+\.\d+\.\d+) \((\d{4}-\d{2}-\d{2})\)", head) for head in heads]
    assert all(sections), heads
    versions, days = zip(*(section.groups() for section in sections), strict=True)
    assert versions[0] == hf_longtrunc.__version__
    assert sorted(days, reverse=True) == list(days)
    assert all(date.fromisoformat(day) for day in days)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {versions[0]}\n" in citation
    assert f"\ndate-released: {days[0]}\n" in citation


def test_what_could_be_imported_from_an_earlier_version_still_can_or_says_where_it_is():
    versions = json.loads((ROOT / "tests" / "public_names.json").read_text(encoding="utf-8"))
    for version, modules in versions.items():
        for module, names in modules.items():
            for name in names:
                try:
                    getattr(importlib.import_module(module), name)
                except ImportError as moved:
                    (file,) = re.findall(rf"{module}.{name} moved to (recipes/\S+\.py)", str(moved))
                    assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8"))
                except AttributeError:
                    pytest.fail(f"{module} of {version} offered {name}")


def test_every_public_name_is_on_the_page_of_all_names():
    page = (ROOT / "docs" / "all-of-hf-longtrunc.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^::: hf_longtrunc\.(\w+)$", page, re.MULTILINE)) ^ set(hf_longtrunc.__all__)) == []


@pytest.mark.parametrize("module", PUBLIC)
def test_no_public_function_returns_any(module):
    for name in module.__all__:
        thing = getattr(module, name)
        parts = {name: thing}
        if inspect.isclass(thing):
            parts = {f"{name}.{k}": v for k, v in vars(thing).items() if k == "__call__" or not k.startswith("_")}
        for called, part in parts.items():
            function = getattr(part, "fget", getattr(part, "__func__", part))
            if inspect.isfunction(function):
                assert str(function.__annotations__.get("return")) not in ("Any", "typing.Any"), called


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'Eta'.*EtaLogitsProcessor"):
        hf_longtrunc.Eta  # noqa: B018


def test_import_brings_nothing_with_it():
    """No torch, no optional package, nothing registered: the import is this file's own few lines."""
    program = """
import sys
before = set(sys.modules)
import hf_longtrunc
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"torch", "transformers", "numpy", "rich", "typer", "matplotlib", "pandas", "datasets",
                    "accelerate", "gguf", "tqdm", "jaxtyping", "beartype"}))
"""
    assert run(program).strip() == "[]"


def test_processors_need_no_optional_package():
    """With every optional package hidden, the sampling room still imports and works."""
    program = """
import sys
for name in ("rich", "matplotlib", "pandas", "datasets", "accelerate", "gguf", "jaxtyping", "beartype"):
    sys.modules[name] = None
import torch
from hf_longtrunc import EtaLogitsProcessor, TruncationTrace, attach_processors, load_pretrained
print(EtaLogitsProcessor(0.1)(None, torch.tensor([[3.0, -3.0]])).tolist())
"""
    assert run(program).strip() == "[[3.0, -inf]]"


def test_command_line_says_what_to_install():
    program = """
import sys
sys.modules["rich"] = None
from hf_longtrunc.__main__ import main
sys.stderr = sys.stdout
try:
    main()
except SystemExit as error:
    print(error)
"""
    needs = (
        'hf-longtrunc: error: the command line needs rich: run pip install "hf_longtrunc[demo]" '
        '(in a checkout: pip install -e ".[demo]")'
    )
    assert run(program).splitlines() == [needs, "2"]
