"""Perplexity, harness tasks, SCROLLS and samplers of a model, with tables, plots and records; loaded on first use.

SCROLLS is a module of its own: `from hf_longtrunc.evaluation import scrolls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_longtrunc.lazy import lazy_names

if TYPE_CHECKING:
    from hf_longtrunc.evaluation.card import update_model_card as update_model_card
    from hf_longtrunc.evaluation.find_and_read import (
        FactText as FactText,
        FindAndReadRecord as FindAndReadRecord,
        find_and_read_table as find_and_read_table,
        paired_test as paired_test,
        run_find_and_read as run_find_and_read,
    )
    from hf_longtrunc.evaluation.intervals import wilson_interval as wilson_interval
    from hf_longtrunc.evaluation.matching import (
        critical_parameters as critical_parameters,
        match_table as match_table,
        matched_parameter as matched_parameter,
        matched_parameters as matched_parameters,
        plot_match as plot_match,
    )
    from hf_longtrunc.evaluation.perplexity import (
        PerplexityRecord as PerplexityRecord,
        PositionBin as PositionBin,
        compare_losses as compare_losses,
        default_edges as default_edges,
        perplexity_by_position as perplexity_by_position,
        perplexity_records as perplexity_records,
        perplexity_table as perplexity_table,
        plot_perplexity as plot_perplexity,
        recomputed_losses as recomputed_losses,
        stream_losses as stream_losses,
        token_losses as token_losses,
    )
    from hf_longtrunc.evaluation.records import (
        append_records as append_records,
        read_records as read_records,
    )
    from hf_longtrunc.evaluation.streaming import (
        cache_bytes as cache_bytes,
        read_ahead as read_ahead,
        start_stream as start_stream,
    )
    from hf_longtrunc.evaluation.texts import python_reference as python_reference
    from hf_longtrunc.evaluation.traces import read_traces as read_traces

_HOME = {
    "FactText": "hf_longtrunc.evaluation.find_and_read",
    "FindAndReadRecord": "hf_longtrunc.evaluation.find_and_read",
    "PerplexityRecord": "hf_longtrunc.evaluation.perplexity",
    "PositionBin": "hf_longtrunc.evaluation.perplexity",
    "append_records": "hf_longtrunc.evaluation.records",
    "cache_bytes": "hf_longtrunc.evaluation.streaming",
    "compare_losses": "hf_longtrunc.evaluation.perplexity",
    "critical_parameters": "hf_longtrunc.evaluation.matching",
    "default_edges": "hf_longtrunc.evaluation.perplexity",
    "find_and_read_table": "hf_longtrunc.evaluation.find_and_read",
    "match_table": "hf_longtrunc.evaluation.matching",
    "matched_parameter": "hf_longtrunc.evaluation.matching",
    "matched_parameters": "hf_longtrunc.evaluation.matching",
    "paired_test": "hf_longtrunc.evaluation.find_and_read",
    "perplexity_by_position": "hf_longtrunc.evaluation.perplexity",
    "perplexity_records": "hf_longtrunc.evaluation.perplexity",
    "perplexity_table": "hf_longtrunc.evaluation.perplexity",
    "plot_match": "hf_longtrunc.evaluation.matching",
    "plot_perplexity": "hf_longtrunc.evaluation.perplexity",
    "python_reference": "hf_longtrunc.evaluation.texts",
    "read_ahead": "hf_longtrunc.evaluation.streaming",
    "read_records": "hf_longtrunc.evaluation.records",
    "read_traces": "hf_longtrunc.evaluation.traces",
    "recomputed_losses": "hf_longtrunc.evaluation.perplexity",
    "run_find_and_read": "hf_longtrunc.evaluation.find_and_read",
    "start_stream": "hf_longtrunc.evaluation.streaming",
    "stream_losses": "hf_longtrunc.evaluation.perplexity",
    "token_losses": "hf_longtrunc.evaluation.perplexity",
    "update_model_card": "hf_longtrunc.evaluation.card",
    "wilson_interval": "hf_longtrunc.evaluation.intervals",
}
# Names of 0.2.0 -> the file of recipes/instruments that has them now: only recipes used them.
_MOVED = {
    "Haystack": "haystack",
    "PasskeyPrompts": "passkey",
    "PasskeyRecord": "passkey",
    "PasskeyTask": "passkey",
    "passkey_table": "passkey",
    "passkey_tasks": "passkey",
    "plot_passkey": "passkey",
    "run_passkey": "passkey",
    "Fact": "recall",
    "RecallRecord": "recall",
    "fact_recall": "recall",
    "recall_records": "recall",
    "KeyValuePrompts": "retrieval",
    "NeedlePrompts": "retrieval",
    "RetrievalRecord": "retrieval",
    "RetrievalTask": "retrieval",
    "VariablePrompts": "retrieval",
    "plot_retrieval": "retrieval",
    "retrieval_table": "retrieval",
    "retrieval_tasks": "retrieval",
    "run_retrieval": "retrieval",
    "RepetitionRecord": "truncation",
    "TruncationScore": "truncation",
    "plot_repetition": "truncation",
    "plot_truncation": "truncation",
    "repetition_table": "truncation",
    "run_repetition": "truncation",
    "truncation_scores": "truncation",
    "truncation_table": "truncation",
}

__all__ = sorted(_HOME)
__getattr__ = lazy_names(__name__, _HOME, {name: f"recipes/instruments/{file}.py" for name, file in _MOVED.items()})


def __dir__() -> list[str]:
    return list(__all__)
