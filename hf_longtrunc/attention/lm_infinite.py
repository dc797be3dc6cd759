"""LM-Infinite for transformers models: `with LMInfinite()(model): model.generate(...)`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_longtrunc.arguments import check_int
from hf_longtrunc.attention.key_retrieval import Retrieval
from hf_longtrunc.attention.lambda_attention import SinkWindowLaw
from hf_longtrunc.attention.sink_window import SinkWindowTechnique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class LMInfinite(SinkWindowTechnique):
    """Λ-shaped attention with a maximum distance: a pretrained model on texts of any length, without training.

    Every query sees the `num_sink_tokens` first tokens of its row and the last `window_length`, itself included; no
    key ever seems farther away than `max_distance`. On texts of up to `window_length` tokens the model computes what
    it always did. Cost: time O(n (S + L)) for n tokens; `generate` builds a cache of constant size. Tokens outside
    sinks and window cannot be read: perplexity stays flat at any length, recall of the middle does not.

    Examples:
        >>> technique = LMInfinite(num_sink_tokens=4, window_length=64)
        >>> with technique(model) as handle:
        ...     answer = model.generate(ids, max_new_tokens=4, do_sample=False)
        >>> answer.shape[1] - ids.shape[1]
        4

    Args:
        num_sink_tokens: S; 10 to 100 in the paper. 0 leaves a plain sliding window.
        window_length: L; None takes the length that the model was trained for, from its config.
        max_distance: D, at least L; None takes L.
        retrieval: `TopK(...)` or `TopBlocks(...)` read the middle too, at the price of keeping it; None does not.
        path: how a prompt's attention is computed, see `LambdaAttention`: "auto", "split", "sdpa", "eager" or "flex".

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
        super().__post_init__()
        if self.max_distance is not None:
            max_distance = check_int("max_distance", self.max_distance, minimum=self.window_length or 1)
            object.__setattr__(self, "max_distance", max_distance)
        if self.retrieval is not None and not isinstance(self.retrieval, Retrieval):
            raise TypeError(f"retrieval must be TopK(...), TopBlocks(...) or None, got {self.retrieval!r}")

    def for_model(self, model: Any) -> Self:
        """Return the technique with window and maximum distance of one model."""
        window = trained_length(model.config) if self.window_length is None else self.window_length
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
        return replace(self, window_length=window, max_distance=max_distance)

    @cached_property
    def distance_law(self) -> SinkWindowLaw:
        """Sinks are seen at the maximum distance."""
        assert self.window_length is not None
        assert self.max_distance is not None
        return SinkWindowLaw(self.num_sink_tokens, self.window_length, self.max_distance)

    def tiny(self, **settings: Any) -> Sequence[Self]:
        """Return the technique at a window of four tokens, with sinks up to two positions beyond it."""
        beyond = min(2, self.distance_law.max_distance - self.distance_law.window_length)
        return super().tiny(max_distance=4 + beyond, retrieval=None, **settings)


def trained_length(config: PreTrainedConfig) -> int:
    """Return how many tokens a model was trained for.

    That is `max_position_embeddings` (or what its config calls it), or the length that YaRN's factor stretches the
    original one to, if that is more.

    Examples:
        >>> trained_length(model.config)
        64
    """
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"config must be that of a transformers model, `model.config`, got {type(config).__name__}")
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
