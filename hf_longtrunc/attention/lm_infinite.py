"""LM-Infinite for transformers models: `with LMInfinite()(model): model.generate(...)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_longtrunc.arguments import one_of, whole
from hf_longtrunc.attention.lambda_attention import PATHS
from hf_longtrunc.attention.lambda_patch import LambdaPatch
from hf_longtrunc.attention.layer import Settings
from hf_longtrunc.attention.retrieval import Retrieval
from hf_longtrunc.models import attachable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class LMInfinite:
    """Λ-shaped attention with a distance ceiling: a pretrained model on texts of any length, without training.

    Every query sees the `num_sink_tokens` first tokens of its row and the last `window_length`, itself included; no
    key ever seems farther away than `max_distance`. On texts of up to `window_length` tokens the model computes what
    it always did. Cost: time O(n (S + L)) for n tokens; `generate` builds a cache of constant size. What lies outside
    sinks and window cannot be read: perplexity stays flat at any length, recall of the middle does not.

    Args:
        num_sink_tokens: S; 10 to 100 in the paper. 0 leaves a plain sliding window.
        window_length: L; None takes the length that the model was trained for, from its config.
        max_distance: D, at least L; None takes L.
        retrieval: `TopK(...)` or `TopBlocks(...)` read the middle too, at the price of keeping it; None does not.
        path: how a prompt's attention is computed, see `lambda_attention`: "auto", "joined", "sdpa", "eager",
            "flex", "varlen" or "triton".

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    `with LMInfinite(...)(model):` patches for the block; `handle = LMInfinite(...).attach(model)` until
    `handle.detach()`. Only that model instance is touched, and afterwards it is as it was.

    Source: Han et al. 2024, "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", arXiv
    2308.16137. Deviations: positions are counted from each row's first real token, and rotary angles are computed in
    fp64, so padding changes nothing and a stream may be of any length.
    """

    num_sink_tokens: int = 16
    window_length: int | None = None
    max_distance: int | None = None
    retrieval: Retrieval | None = None
    path: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("num_sink_tokens", 0), ("window_length", 1), ("max_distance", 1)):
            value = getattr(self, name)
            if value is not None or name == "num_sink_tokens":
                object.__setattr__(self, name, whole(name, value, least=least))
        if None not in (self.max_distance, self.window_length):
            whole("max_distance", self.max_distance, least=self.window_length)
        if self.retrieval is not None and not isinstance(self.retrieval, Retrieval):
            raise TypeError(f"retrieval must be TopK(...), TopBlocks(...) or None, got {self.retrieval!r}")
        one_of("path", self.path, PATHS)

    def attach(self, model: Any) -> LambdaPatch:
        """Patch `model`, a transformers causal language model or a PEFT or DDP wrapper of one, until `detach()`.

        Runs a few forwards of at most eight tokens to learn how each layer rotates its queries and keys.

        Raises:
            TypeError: it is no such model.
            ValueError: it is patched or compiled already, its architecture cannot be patched (the message says why),
                or `max_distance` is smaller than the window that its config implies.
        """
        owner = attachable(model, "LMInfinite")
        window = trained_length(owner.config) if self.window_length is None else self.window_length
        max_distance = window if self.max_distance is None else self.max_distance
        if max_distance < window:
            raise ValueError(
                f"max_distance must be at least the window, got {max_distance} for window_length={window}"
                f"{' (the trained length)' if self.window_length is None else ''}; leave it out to take the window"
            )
        retrieval = self.retrieval
        if retrieval is not None and (retrieval.distance or 0) > max_distance:
            raise ValueError(
                f"{type(retrieval).__name__}: distance must be at most max_distance, got "
                f"{retrieval.distance} for {max_distance}; leave it out to take a share of the window"
            )
        settings = Settings(
            num_sink_tokens=self.num_sink_tokens,
            window_length=window,
            max_distance=max_distance,
            path=self.path,
            retrieval=retrieval,
        )
        return LambdaPatch(self, owner, settings)

    __call__ = attach


def trained_length(config: PreTrainedConfig) -> int:
    """Return how many tokens a model was trained for.

    That is `max_position_embeddings` (or what its config calls it), or the length that YaRN's factor stretches the
    original one to, if that is more.
    """
    config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions"):
        length = getattr(config, name, None)
        if isinstance(length, int):
            break
    else:
        raise ValueError(
            f"{type(config).__name__} does not say how long the texts were that it was trained on: pass "
            "window_length=..."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    stretched = [
        int(values["original_max_position_embeddings"] * values["factor"])
        for values in sets
        if values.get("original_max_position_embeddings") and values.get("factor") and values.get("rope_type") == "yarn"
    ]
    return max([length, *stretched])
