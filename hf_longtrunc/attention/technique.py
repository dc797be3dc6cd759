"""The base class of techniques: the settings that a user writes, and the methods that `AttentionPatch` calls.

A technique is a frozen dataclass. `for_model` and `check` return it with every default resolved; the other methods
belong to that resolved copy. A new technique needs a law of distances, `context` and `attend`; `patch.py` needs no
change. At attach, `path_check.py` compares each of its paths with the law.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from hf_longtrunc.attention.explanation import Explanation
from hf_longtrunc.attention.patch import AttentionPatch
from hf_longtrunc.errors import UnsupportedModelError
from hf_longtrunc.handles import PatchSettings
from hf_longtrunc.models import attachable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers.cache_utils import CacheLayerMixin
    from typing_extensions import Self

    from hf_longtrunc.attention.block_scores import BlockScores
    from hf_longtrunc.attention.cache_law import CacheLaw
    from hf_longtrunc.attention.context import AttentionCall, AttentionLayer, DecoderCall, MaskPlaceholder
    from hf_longtrunc.attention.key_retrieval import Retrieval
    from hf_longtrunc.attention.probe import ProbeResult
    from hf_longtrunc.handles import Handle


class DistanceLaw(Protocol):
    """Which keys a query sees, and at which distance: the definition of a technique."""

    @property
    def exact_length(self) -> int:
        """The longest text that is read as the unmodified model reads it."""

    def key_position(self, positions: Any) -> Tensor:
        """Return the position at which queries and keys are rotated when the model computes them."""

    def visible(self, query_positions: Any, key_positions: Any) -> Tensor:
        """Return whether each query sees each key [..., n, m]."""

    def distance(self, query_positions: Any, key_positions: Any) -> Tensor:
        """Return the distance of each pair [..., n, m]."""


class Technique(PatchSettings, ABC):
    """Settings of a technique, and how it computes attention.

    Attributes:
        retrieval: how keys outside the window are read; None: not at all.
        compiles_decode: whether its step of one token has a constant shape.
        prefill_chunk: tokens of a long prompt that `generate` reads at once; None: all.
        cache_implementations: those of `generate` that it works with.
        restarts_positions: whether its position_ids may start again within a text.
        num_sink_tokens: first tokens of a row that belong to no block of `TopBlocks`.
    """

    retrieval: Retrieval | None = None
    num_sink_tokens: int
    compiles_decode: ClassVar[bool] = False
    prefill_chunk: ClassVar[int | None] = None
    cache_implementations: ClassVar[tuple[str | None, ...]] = (None, "dynamic", "offloaded")
    restarts_positions: ClassVar[bool] = False

    def attach(self, model: Any) -> AttentionPatch:
        """Patch `model`, a transformers causal language model or a PEFT or DDP wrapper of one, until `detach()`.

        Runs a few forwards of at most eight tokens to find how each layer rotates its queries and keys. The same
        technique on the same model, unchanged since, runs none.

        Raises:
            TypeError: it is no such model.
            UnsupportedModelError: its architecture cannot be patched; the message says why.
            ValueError: it is patched or compiled already, or the settings do not fit it.
        """
        return AttentionPatch(self, attachable(model, type(self).__name__))

    __call__ = attach

    def explain(self, model: Any) -> Explanation:
        """Return what holds for this model under the technique, or why it cannot be patched.

        Examples:
            >>> print(LMInfinite(window_length=64).explain(model).cache)
            a ring: 38 KiB a row at any length

        The model is patched and given back. See `Explanation` for the fields; `print` shows all of them.
        """
        owner = attachable(model, type(self).__name__)
        try:
            with self.attach(model) as handle:
                return handle.explanation()
        except UnsupportedModelError as error:
            return Explanation(f"{self} on {type(owner).__name__}", supported=False, reason=str(error))

    @property
    @abstractmethod
    def distance_law(self) -> DistanceLaw:
        """The law of visibility and distance, resolved."""

    @property
    def max_drafts(self) -> int | None:
        """How many drafted tokens its cache can take back; None: any number."""
        return None

    @property
    @abstractmethod
    def rope_length(self) -> int:
        """The length at which frequencies that depend on the running length are taken."""

    @property
    @abstractmethod
    def retrieval_length(self) -> int:
        """The shortest text in which `retrieval` can select keys."""

    @property
    def title(self) -> str:
        """The technique and the settings that its caches depend on, as messages name them."""
        lengths = (each.name for each in fields(self.distance_law) if hasattr(self, each.name))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in lengths)})"

    @abstractmethod
    def for_model(self, model: Any) -> Self:
        """Return the technique with its lengths resolved for one model.

        Raises:
            ValueError: they do not fit together, or the model's config does not say the trained length.
        """

    @abstractmethod
    def check(self, found: ProbeResult) -> Self:
        """Return the technique with what depends on the model's layers resolved.

        Raises:
            UnsupportedModelError, ValueError: it cannot patch this model; the message says why.
        """

    @abstractmethod
    def tiny(self) -> Sequence[Self]:
        """Return the technique at lengths of a few tokens, once for each path of computation, for `path_check.py`."""

    @abstractmethod
    def prepare(self, handle: Handle, decoder: Any, found: ProbeResult) -> None:
        """Make further changes to the model, through `handle.set`: its rotary modules, say."""

    @abstractmethod
    def context(
        self, call: DecoderCall, found: ProbeResult, block_scores: BlockScores | None, passthrough: bool
    ) -> tuple[MaskPlaceholder, Tensor | None]:
        """Return the context of a call, or PASSTHROUGH, and its position_ids; None leaves the decoder's own.

        `block_scores` collects the scores of a scoring pass; `passthrough` says whether a call that the unpatched model
        computes equally may be left to it.
        """

    @abstractmethod
    def cache_layer(self, ordinary: Any, layer: AttentionLayer, law: CacheLaw, shares_keys: bool) -> CacheLayerMixin:
        """Return the cache layer that `generate` uses in the place of an `ordinary` one that grows.

        `shares_keys` says whether several layers of the model read one cache layer.
        """

    @abstractmethod
    def check_cache_layer(self, layer: Any) -> None:
        """Refuse a cache layer that this technique cannot continue, whatever it holds.

        Raises:
            CacheLawError, ValueError: the message says what to do.
        """

    @abstractmethod
    def selection_layers(self, call: DecoderCall) -> Sequence[Any]:
        """Return the cache layers that hold what `TopBlocks` selects.

        Raises:
            ValueError: the call's cache cannot hold it.
        """

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Return the attention [batch, heads, n, value_dim] of one layer's queries in one forward."""
