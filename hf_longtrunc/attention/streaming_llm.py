"""StreamingLLM for transformers models: `with StreamingLLM(window_length=2048)(model): model.generate(...)`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_longtrunc.attention.lambda_attention import SinkWindowLaw
from hf_longtrunc.attention.lm_infinite import trained_length
from hf_longtrunc.attention.sink_window import SinkWindowTechnique

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(SinkWindowTechnique):
    """Attention sinks and a window, with positions counted within the cache, as transformers' former `SinkCache`.

    Every query sees the `num_sink_tokens` first tokens of its row and the last `window_length`, as if they were
    adjacent. Texts of up to S + L tokens are read as the unmodified model reads them. Cost as for `LMInfinite`.

    Examples:
        >>> with StreamingLLM(num_sink_tokens=4, window_length=60)(model):
        ...     answer = model.generate(ids, max_new_tokens=4, do_sample=False)

    Args:
        num_sink_tokens: S; 4 in the paper.
        window_length: L; None takes the trained length less S.
        path: how a prompt's attention is computed, as for `LMInfinite`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2.
    """

    num_sink_tokens: int = 4
    window_length: int | None = None
    path: str = "auto"

    def for_model(self, model: Any) -> Self:
        """Return the technique with the window of one model."""
        window = self.window_length
        return replace(self, window_length=window or max(1, trained_length(model.config) - self.num_sink_tokens))

    @cached_property
    def distance_law(self) -> SinkWindowLaw:
        """The sinks come right before the window, in their order."""
        assert self.window_length is not None
        return SinkWindowLaw(
            self.num_sink_tokens, self.window_length, self.num_sink_tokens + self.window_length - 1, sink_spacing=1
        )
