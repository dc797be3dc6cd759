"""Truncation sampling and long context for Hugging Face transformers.

Every public name is listed here and loaded on first use: importing the package imports nothing else,
registers nothing and changes nothing in torch or transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_longtrunc.lazy import lazy_names

if TYPE_CHECKING:
    from hf_longtrunc.asking.answers import Answer as Answer, ask as ask
    from hf_longtrunc.asking.finders import BM25 as BM25, Fused as Fused, SentenceEncoder as SentenceEncoder
    from hf_longtrunc.asking.index import TextIndex as TextIndex
    from hf_longtrunc.asking.passages import Passage as Passage
    from hf_longtrunc.attention.dual_chunk_attention import DualChunkAttention as DualChunkAttention
    from hf_longtrunc.attention.explanation import Explanation as Explanation
    from hf_longtrunc.attention.full_store import ArchiveCacheLayer as ArchiveCacheLayer
    from hf_longtrunc.attention.key_retrieval import TopBlocks as TopBlocks, TopK as TopK
    from hf_longtrunc.attention.lm_infinite import LMInfinite as LMInfinite, trained_length as trained_length
    from hf_longtrunc.attention.ring_cache import LambdaCacheLayer as LambdaCacheLayer
    from hf_longtrunc.attention.streaming_llm import StreamingLLM as StreamingLLM
    from hf_longtrunc.attention.trace import AttentionTrace as AttentionTrace
    from hf_longtrunc.cross_attention.datastore import (
        Datastore as Datastore,
        FaissDatastore as FaissDatastore,
        ShardedDatastore as ShardedDatastore,
    )
    from hf_longtrunc.cross_attention.unlimiformer import Unlimiformer as Unlimiformer
    from hf_longtrunc.data.balance import BalancedRows as BalancedRows
    from hf_longtrunc.data.collators import BestFitPackingCollator as BestFitPackingCollator
    from hf_longtrunc.data.dataset import PackedDataset as PackedDataset, pack as pack
    from hf_longtrunc.data.datatrove import write_datatrove as write_datatrove
    from hf_longtrunc.data.megatron import read_megatron as read_megatron, write_megatron as write_megatron
    from hf_longtrunc.data.mixture import TokenMixture as TokenMixture
    from hf_longtrunc.data.packing import (
        Packing as Packing,
        best_fit_decreasing as best_fit_decreasing,
        pack_in_order as pack_in_order,
    )
    from hf_longtrunc.data.report import packing_table as packing_table, plot_packing as plot_packing
    from hf_longtrunc.data.states import reset_states as reset_states
    from hf_longtrunc.data.stream import PackedStream as PackedStream
    from hf_longtrunc.data.verify import check_packed as check_packed, try_packed as try_packed
    from hf_longtrunc.errors import (
        CacheLawError as CacheLawError,
        HFLongtruncError as HFLongtruncError,
        LeakingRowsError as LeakingRowsError,
        UnsupportedModelError as UnsupportedModelError,
    )
    from hf_longtrunc.mixing.auxiliary import (
        AuxiliaryModelLogitsProcessor as AuxiliaryModelLogitsProcessor,
        ContrastiveDecodingLogitsProcessor as ContrastiveDecodingLogitsProcessor,
        GuidanceLogitsProcessor as GuidanceLogitsProcessor,
        ProxyTuningLogitsProcessor as ProxyTuningLogitsProcessor,
        ULDLogitsProcessor as ULDLogitsProcessor,
    )
    from hf_longtrunc.mixing.pema import (
        GradualUnrolling as GradualUnrolling,
        PEMAAdapter as PEMAAdapter,
        PEMAMemory as PEMAMemory,
    )
    from hf_longtrunc.mixing.pema_processor import (
        PEMA as PEMA,
        PEMALogitsProcessor as PEMALogitsProcessor,
        build_pema_memory as build_pema_memory,
        train_pema as train_pema,
    )
    from hf_longtrunc.mixing.uld import (
        ULDCollator as ULDCollator,
        ULDLoss as ULDLoss,
        load_uld_assistant as load_uld_assistant,
        save_uld_assistant as save_uld_assistant,
        uld_assistant as uld_assistant,
    )
    from hf_longtrunc.positions.collator import CreamCollator as CreamCollator
    from hf_longtrunc.positions.cream import (
        CreamPositions as CreamPositions,
        contiguous_positions as contiguous_positions,
        pose_positions as pose_positions,
        random_positions as random_positions,
    )
    from hf_longtrunc.positions.scaling import extend_context as extend_context
    from hf_longtrunc.positions.verify import verify_positions as verify_positions
    from hf_longtrunc.pretrained import load_encoder as load_encoder, load_pretrained as load_pretrained
    from hf_longtrunc.sampling.attach import attach_processors as attach_processors
    from hf_longtrunc.sampling.basis import SoftmaxBasis as SoftmaxBasis
    from hf_longtrunc.sampling.bat import BasisAwareLogitsProcessor as BasisAwareLogitsProcessor
    from hf_longtrunc.sampling.by_name import sampler_by_name as sampler_by_name, sampler_names as sampler_names
    from hf_longtrunc.sampling.calls import sampling_settings as sampling_settings
    from hf_longtrunc.sampling.mask import (
        SamplingMask as SamplingMask,
        truncated_log_probs as truncated_log_probs,
        truncated_scores as truncated_scores,
    )
    from hf_longtrunc.sampling.policy_training import attach_truncation as attach_truncation
    from hf_longtrunc.sampling.processors import (
        DRYLogitsProcessor as DRYLogitsProcessor,
        EpsilonLogitsProcessor as EpsilonLogitsProcessor,
        EtaLogitsProcessor as EtaLogitsProcessor,
        MinKLogitsProcessor as MinKLogitsProcessor,
        PLessLogitsProcessor as PLessLogitsProcessor,
        TopHLogitsProcessor as TopHLogitsProcessor,
        TopNSigmaLogitsProcessor as TopNSigmaLogitsProcessor,
        XTCLogitsProcessor as XTCLogitsProcessor,
    )
    from hf_longtrunc.sampling.recorder import SamplingMaskRecorder as SamplingMaskRecorder
    from hf_longtrunc.sampling.support import SupportChecker as SupportChecker, critical_threshold as critical_threshold
    from hf_longtrunc.sampling.trace import TruncationTrace as TruncationTrace
    from hf_longtrunc.sampling.trace_records import TruncationRecord as TruncationRecord

__version__ = "0.2.0"

_NAMES = {  # file -> its public names
    "asking.answers": "Answer ask",
    "asking.finders": "BM25 Fused SentenceEncoder",
    "asking.index": "TextIndex",
    "asking.passages": "Passage",
    "attention.dual_chunk_attention": "DualChunkAttention",
    "attention.explanation": "Explanation",
    "attention.full_store": "ArchiveCacheLayer",
    "attention.key_retrieval": "TopBlocks TopK",
    "attention.lm_infinite": "LMInfinite trained_length",
    "attention.ring_cache": "LambdaCacheLayer",
    "attention.streaming_llm": "StreamingLLM",
    "attention.trace": "AttentionTrace",
    "cross_attention.datastore": "Datastore FaissDatastore ShardedDatastore",
    "cross_attention.unlimiformer": "Unlimiformer",
    "data.balance": "BalancedRows",
    "data.collators": "BestFitPackingCollator",
    "data.dataset": "PackedDataset pack",
    "data.datatrove": "write_datatrove",
    "data.megatron": "read_megatron write_megatron",
    "data.mixture": "TokenMixture",
    "data.packing": "Packing best_fit_decreasing pack_in_order",
    "data.report": "packing_table plot_packing",
    "data.states": "reset_states",
    "data.stream": "PackedStream",
    "data.verify": "check_packed try_packed",
    "errors": "CacheLawError HFLongtruncError LeakingRowsError UnsupportedModelError",
    "mixing.auxiliary": (
        "AuxiliaryModelLogitsProcessor ContrastiveDecodingLogitsProcessor GuidanceLogitsProcessor "
        "ProxyTuningLogitsProcessor ULDLogitsProcessor"
    ),
    "mixing.pema": "GradualUnrolling PEMAAdapter PEMAMemory",
    "mixing.pema_processor": "PEMA PEMALogitsProcessor build_pema_memory train_pema",
    "mixing.uld": "ULDCollator ULDLoss load_uld_assistant save_uld_assistant uld_assistant",
    "positions.collator": "CreamCollator",
    "positions.cream": "CreamPositions contiguous_positions pose_positions random_positions",
    "positions.scaling": "extend_context",
    "positions.verify": "verify_positions",
    "pretrained": "load_encoder load_pretrained",
    "sampling.attach": "attach_processors",
    "sampling.basis": "SoftmaxBasis",
    "sampling.bat": "BasisAwareLogitsProcessor",
    "sampling.by_name": "sampler_by_name sampler_names",
    "sampling.calls": "sampling_settings",
    "sampling.mask": "SamplingMask truncated_log_probs truncated_scores",
    "sampling.policy_training": "attach_truncation",
    "sampling.processors": (
        "DRYLogitsProcessor EpsilonLogitsProcessor EtaLogitsProcessor MinKLogitsProcessor "
        "PLessLogitsProcessor TopHLogitsProcessor TopNSigmaLogitsProcessor XTCLogitsProcessor"
    ),
    "sampling.recorder": "SamplingMaskRecorder",
    "sampling.support": "SupportChecker critical_threshold",
    "sampling.trace": "TruncationTrace",
    "sampling.trace_records": "TruncationRecord",
}

__all__ = sorted(" ".join(_NAMES.values()).split())
__getattr__ = lazy_names(__name__, _NAMES, {"distances": "distances_seen"})  # public in 0.1.0


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
