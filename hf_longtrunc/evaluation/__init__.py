"""Measuring: perplexity, retrieval, samplers, streams; tables, plots and records of them, loaded on first use.

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
    from hf_longtrunc.evaluation.haystack import Haystack as Haystack
    from hf_longtrunc.evaluation.heat_maps import wilson_interval as wilson_interval
    from hf_longtrunc.evaluation.matching import (
        critical_parameters as critical_parameters,
        match_table as match_table,
        matched_parameter as matched_parameter,
        matched_parameters as matched_parameters,
        plot_match as plot_match,
    )
    from hf_longtrunc.evaluation.passkey import (
        PasskeyPrompts as PasskeyPrompts,
        PasskeyRecord as PasskeyRecord,
        PasskeyTask as PasskeyTask,
        passkey_table as passkey_table,
        passkey_tasks as passkey_tasks,
        plot_passkey as plot_passkey,
        run_passkey as run_passkey,
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
    from hf_longtrunc.evaluation.recall import (
        Fact as Fact,
        RecallRecord as RecallRecord,
        fact_recall as fact_recall,
        recall_records as recall_records,
    )
    from hf_longtrunc.evaluation.records import (
        append_records as append_records,
        read_records as read_records,
    )
    from hf_longtrunc.evaluation.retrieval import (
        KeyValuePrompts as KeyValuePrompts,
        NeedlePrompts as NeedlePrompts,
        RetrievalRecord as RetrievalRecord,
        RetrievalTask as RetrievalTask,
        VariablePrompts as VariablePrompts,
        plot_retrieval as plot_retrieval,
        retrieval_table as retrieval_table,
        retrieval_tasks as retrieval_tasks,
        run_retrieval as run_retrieval,
    )
    from hf_longtrunc.evaluation.streaming import (
        cache_bytes as cache_bytes,
        read_ahead as read_ahead,
        start_stream as start_stream,
    )
    from hf_longtrunc.evaluation.texts import (
        python_reference as python_reference,
    )
    from hf_longtrunc.evaluation.truncation import (
        RepetitionRecord as RepetitionRecord,
        TruncationScore as TruncationScore,
        plot_repetition as plot_repetition,
        plot_truncation as plot_truncation,
        read_traces as read_traces,
        repetition_table as repetition_table,
        run_repetition as run_repetition,
        truncation_scores as truncation_scores,
        truncation_table as truncation_table,
    )

_HOME = {
    "Fact": "hf_longtrunc.evaluation.recall",
    "FactText": "hf_longtrunc.evaluation.find_and_read",
    "FindAndReadRecord": "hf_longtrunc.evaluation.find_and_read",
    "find_and_read_table": "hf_longtrunc.evaluation.find_and_read",
    "paired_test": "hf_longtrunc.evaluation.find_and_read",
    "run_find_and_read": "hf_longtrunc.evaluation.find_and_read",
    "Haystack": "hf_longtrunc.evaluation.haystack",
    "KeyValuePrompts": "hf_longtrunc.evaluation.retrieval",
    "NeedlePrompts": "hf_longtrunc.evaluation.retrieval",
    "PasskeyPrompts": "hf_longtrunc.evaluation.passkey",
    "PasskeyRecord": "hf_longtrunc.evaluation.passkey",
    "PasskeyTask": "hf_longtrunc.evaluation.passkey",
    "PerplexityRecord": "hf_longtrunc.evaluation.perplexity",
    "PositionBin": "hf_longtrunc.evaluation.perplexity",
    "RecallRecord": "hf_longtrunc.evaluation.recall",
    "RepetitionRecord": "hf_longtrunc.evaluation.truncation",
    "RetrievalRecord": "hf_longtrunc.evaluation.retrieval",
    "RetrievalTask": "hf_longtrunc.evaluation.retrieval",
    "TruncationScore": "hf_longtrunc.evaluation.truncation",
    "VariablePrompts": "hf_longtrunc.evaluation.retrieval",
    "append_records": "hf_longtrunc.evaluation.records",
    "cache_bytes": "hf_longtrunc.evaluation.streaming",
    "compare_losses": "hf_longtrunc.evaluation.perplexity",
    "critical_parameters": "hf_longtrunc.evaluation.matching",
    "default_edges": "hf_longtrunc.evaluation.perplexity",
    "fact_recall": "hf_longtrunc.evaluation.recall",
    "match_table": "hf_longtrunc.evaluation.matching",
    "matched_parameter": "hf_longtrunc.evaluation.matching",
    "matched_parameters": "hf_longtrunc.evaluation.matching",
    "passkey_table": "hf_longtrunc.evaluation.passkey",
    "passkey_tasks": "hf_longtrunc.evaluation.passkey",
    "perplexity_by_position": "hf_longtrunc.evaluation.perplexity",
    "perplexity_records": "hf_longtrunc.evaluation.perplexity",
    "perplexity_table": "hf_longtrunc.evaluation.perplexity",
    "plot_match": "hf_longtrunc.evaluation.matching",
    "plot_passkey": "hf_longtrunc.evaluation.passkey",
    "plot_perplexity": "hf_longtrunc.evaluation.perplexity",
    "plot_repetition": "hf_longtrunc.evaluation.truncation",
    "plot_retrieval": "hf_longtrunc.evaluation.retrieval",
    "plot_truncation": "hf_longtrunc.evaluation.truncation",
    "python_reference": "hf_longtrunc.evaluation.texts",
    "read_ahead": "hf_longtrunc.evaluation.streaming",
    "read_records": "hf_longtrunc.evaluation.records",
    "recall_records": "hf_longtrunc.evaluation.recall",
    "recomputed_losses": "hf_longtrunc.evaluation.perplexity",
    "repetition_table": "hf_longtrunc.evaluation.truncation",
    "retrieval_table": "hf_longtrunc.evaluation.retrieval",
    "retrieval_tasks": "hf_longtrunc.evaluation.retrieval",
    "run_passkey": "hf_longtrunc.evaluation.passkey",
    "run_repetition": "hf_longtrunc.evaluation.truncation",
    "run_retrieval": "hf_longtrunc.evaluation.retrieval",
    "start_stream": "hf_longtrunc.evaluation.streaming",
    "stream_losses": "hf_longtrunc.evaluation.perplexity",
    "token_losses": "hf_longtrunc.evaluation.perplexity",
    "read_traces": "hf_longtrunc.evaluation.truncation",
    "truncation_scores": "hf_longtrunc.evaluation.truncation",
    "truncation_table": "hf_longtrunc.evaluation.truncation",
    "update_model_card": "hf_longtrunc.evaluation.card",
    "wilson_interval": "hf_longtrunc.evaluation.heat_maps",
}

__all__ = sorted(_HOME)
__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return list(__all__)
