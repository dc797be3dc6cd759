"""Perplexity, harness tasks, SCROLLS and samplers of a model, with tables, plots and records; loaded on first use.

SCROLLS is a module of its own: `from hf_longtrunc.evaluation import scrolls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_longtrunc.lazy import lazy_names

if TYPE_CHECKING:
    from hf_longtrunc.evaluation.card import update_model_card as update_model_card
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
        stream_losses as stream_losses,
        token_losses as token_losses,
    )
    from hf_longtrunc.evaluation.records import append_records as append_records, read_records as read_records
    from hf_longtrunc.evaluation.streaming import (
        cache_bytes as cache_bytes,
        read_ahead as read_ahead,
        start_stream as start_stream,
    )
    from hf_longtrunc.evaluation.texts import python_reference as python_reference
    from hf_longtrunc.evaluation.traces import read_traces as read_traces

_NAMES = {  # file -> its public names
    "card": "update_model_card",
    "intervals": "wilson_interval",
    "matching": "critical_parameters match_table matched_parameter matched_parameters plot_match",
    "perplexity": (
        "PerplexityRecord PositionBin compare_losses default_edges perplexity_by_position perplexity_records "
        "perplexity_table plot_perplexity stream_losses token_losses"
    ),
    "records": "append_records read_records",
    "streaming": "cache_bytes read_ahead start_stream",
    "texts": "python_reference",
    "traces": "read_traces",
}
_MOVED = {  # file of recipes/instruments -> its names that were public in 0.1.0 or 0.2.0: only recipes used them
    "haystack": "Haystack",
    "passkey": "PasskeyPrompts PasskeyRecord PasskeyTask passkey_table passkey_tasks plot_passkey run_passkey",
    "recall": "Fact RecallRecord fact_recall recall_records",
    "retrieval": (
        "KeyValuePrompts NeedlePrompts RetrievalRecord RetrievalTask VariablePrompts plot_retrieval "
        "retrieval_table retrieval_tasks run_retrieval"
    ),
    "truncation": (
        "RepetitionRecord TruncationScore plot_repetition plot_truncation repetition_table run_repetition "
        "truncation_scores truncation_table"
    ),
}

__all__ = sorted(" ".join(_NAMES.values()).split())
__getattr__ = lazy_names(__name__, _NAMES, _MOVED)


def __dir__() -> list[str]:
    return list(__all__)
