"""Putting an attention of ours in place of a model's own, and taking it back."""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicIndexedLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hf_longtrunc.attention.families import REFUSED, own_forward
from hf_longtrunc.attention.lambda_attention import Scoring
from hf_longtrunc.attention.probe import Probe, hidden_states
from hf_longtrunc.attention.rotary import CannotPatchError, exact_forward, rotary_modules
from hf_longtrunc.attention.states import States, states_of
from hf_longtrunc.attention.step import MORE_THAN_CAUSAL, Native, Step, Unmade, running
from hf_longtrunc.handles import Handle
from hf_longtrunc.models import CACHE, decoder_of, disagreement, few_tokens, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from hf_longtrunc.attention.rotary import ExactRotary, Rotation

_serial = itertools.count()
_ROWS = 256  # of a mask that are looked at at once
_REGISTRIES = (AttentionInterface, AttentionMaskInterface)


class AttentionPatch(Handle):
    """A model whose attention is computed by ours: what `attach` of a technique returns. `detach()` undoes it.

    Every change is an attribute of this model's own modules, or an entry under a name of this patch's own in
    transformers' two attention registries, which knows neither patch nor model and goes with either. A subclass says
    what each attention module becomes, what runs in the place of the decoder's forward, and what `generate` needs.

    Attributes:
        layers: the attention modules that are patched.
        model: the instance that is changed.
        decoder: its part without a head.
    """

    def __init__(self, technique: object, model: Any, changed: str):
        super().__init__(technique, model, changed)
        self.layers: dict[nn.Module, Any] = {}
        self.model = model
        self.decoder: Any = decoder_of(model)
        self._name = f"hf_longtrunc_{next(_serial)}"
        self._states: States | None = None  # what recurrent and convolutional layers carry

    def _install(self, window: int) -> None:
        """Put everything in place; a model that gives other results on a few tokens than before is refused.

        Args:
            window: tokens that the model was trained for, at which frequencies that depend on the length are taken.
        """
        named = type(self.technique).__name__
        with self.or_nothing():
            try:
                self._change(window)
            except CannotPatchError as error:
                raise ValueError(f"{named} cannot patch {type(self.model).__name__}: {error}") from error

    def _change(self, window: int) -> None:
        decoder, model = self.decoder, self.model
        _refuse_at_sight(model, decoder, type(self.technique).__name__)
        self._states = states_of(decoder)
        ids = few_tokens(decoder, window)
        before = hidden_states(decoder, ids)
        original = decoder.config._attn_implementation
        self._give_own_configs()
        functions: tuple[Any, Any] = _attention, _mask
        for registry, function in zip(_REGISTRIES, functions, strict=True):
            registry.register(self._name, partial(function, original))
        self.undo(_forget, self._name)
        weakref.finalize(model, _forget, self._name)
        self.set(decoder, "_hf_longtrunc_patch", self)
        self._learn(window)
        self.set(decoder, "forward", update_wrapper(self._forward(), decoder.forward))
        difference = disagreement(before, hidden_states(decoder, ids))
        if difference is not None:
            raise CannotPatchError(
                f"within the window its attention would give other results than the model's own (they differ by "
                f"{difference:.1e}), so it computes something that is not reproduced here"
            )
        self.set(model, "_get_stopping_criteria", self._stopping_criteria)
        self.set(model, "init_continuous_batching", self._refuse_continuous_batching)
        self.refuse_copies(model, decoder, advice="detach first, copy or save, and attach again")

    def _learn(self, window: int) -> None:
        """Find out how each layer's attention rotates, and give it a layer of ours."""
        with Handle("a probe", self.decoder, "rotary modules") as probing:
            exact = dict(rotary_modules(self.decoder, window))
            for module, rotaries in exact.items():
                probing.set(module, "forward", exact_forward(rotaries))
            sources = [source for rotaries in exact.values() for source in rotaries.values()]
            probe = Probe(self.decoder, sources, has_states=self._states is not None)
            own = {module: build for module in self.decoder.modules() if (build := own_forward(module)) is not None}
            for module, build in own.items():
                probing.set(module, "forward", build(module, partial(probe.attend, module)))
            found = Learnt(probe.rotations(), probe.indices, probe.cached_otherwise(), probe.has_windows, exact)
        self.layers = self._layers(found)
        for module, layer in self.layers.items():
            self.set(module, "_hf_longtrunc_layer", layer)
            if module in own:
                self.set(module, "forward", own[module](module, layer.attend))

    def _layers(self, found: Learnt) -> dict[nn.Module, Any]:
        """Return what computes each module's attention, an object with `attend(query, key, value, step, scoring)`."""
        raise NotImplementedError

    def _forward(self) -> Callable[..., Any]:
        """Return what runs in the place of the decoder's forward."""
        raise NotImplementedError

    def traced_forward(self) -> Callable[..., Any]:
        """Return what runs in the place of the decoder's forward while an `AttentionTrace` listens.

        Raises:
            ValueError: nothing can listen here; the message says why.
        """
        if not self.is_attached:
            raise ValueError(f"{self!r} reads nothing any more: attach the technique again, and trace that")
        if getattr(self.model, "_device_mesh", None) is not None:
            raise ValueError("tensor parallelism gives this process some of the heads alone: trace without it")
        forward: Callable[..., Any] = self.decoder.forward
        return forward

    def _give_own_configs(self) -> None:
        """Let every module of the model hold a copy of its config; the decoder's names this patch's attention.

        A config object may be shared with other models, and is saved with this one: neither must see the name. What
        is edited in the copy while it is in place is carried back.
        """
        memo: dict[int, Any] = {}
        originals: dict[int, PreTrainedConfig] = {}
        mine = {id(config) for part in self.decoder.modules() for config in _configs(part).values()}
        mine.add(id(self.model.config.get_text_config(decoder=True)))  # by which a multimodal model asks for masks
        for module in self.model.modules():
            for name, config in _configs(module).items():
                self.set(module, name, copy.deepcopy(config, memo))
                _collect(config, originals)
        for key, original in originals.items():
            own = memo[key]
            if key in mine:
                own._attn_implementation_internal = self._name
            self.undo(_carry_back, original, own, copy.deepcopy(_fields(own)))

    def _stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        """Build the stopping criteria without the warning that a text exceeds the model's length: here it may."""
        criteria = type(self.model)._get_stopping_criteria(self.model, *args, **kwargs)
        for criterion in criteria:
            if hasattr(criterion, "max_position_embeddings"):
                criterion.max_position_embeddings = None
        return criteria

    def _refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"continuous batching keeps a cache and an attention of its own: detach {type(self.technique).__name__} "
            "first, or use generate()"
        )


class Learnt(NamedTuple):
    """What a probe has found out about a decoder.

    Attributes:
        rotations: of each attention module; None where it rotates nothing.
        indices: its place among the decoder's layers; -1 where that could not be told.
        cached_otherwise: the modules that cache what their keys are made from (multi-head latent attention).
        has_windows: whether some other layers were trained with a window of their own.
        exact: the rotary modules, and what answers in their place with exact angles.
    """

    rotations: dict[nn.Module, Rotation | None]
    indices: dict[nn.Module, int]
    cached_otherwise: set[nn.Module]
    has_windows: bool
    exact: dict[nn.Module, dict[str | None, ExactRotary]]


# What stands in transformers' registries holds no model, and takes what it needs from the module and the mask.


def _attention(
    original: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Compute attention as the step says that came as the mask; other layers get what they had."""
    if isinstance(attention_mask, Unmade):
        raise ValueError(
            "layers of a patched model were run outside its decoder's forward, in which positions are "
            "found: detach first"
        )
    if isinstance(attention_mask, Step):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scoring = Scoring(scale, kwargs.get("softcap"), None, kwargs.get("s_aux"), dropout)
        output = module._hf_longtrunc_layer.attend(query, key, value, attention_mask, scoring)
        return output.transpose(1, 2).contiguous(), None
    probe = running()
    if isinstance(probe, Probe):
        output = probe.attend(module, query, key, value, attention_mask, None)
        return output.transpose(1, 2).contiguous(), None
    native: Any = AttentionInterface._global_mapping.get(original)
    if original == "eager":
        native = sys.modules[type(module).__module__].eager_attention_forward
    result: tuple[Tensor, Any] = native(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return result


def _mask(original: str, *, local_size: int | None = None, **kwargs: Any) -> Any:
    """Hand out what the running decoder carries; layers that were trained with a window get their own mask."""
    carried = running()
    own: Any = AttentionMaskInterface._global_mapping[original]
    native = partial(own, local_size=local_size, **kwargs)
    if local_size is not None or isinstance(carried, Native):
        if isinstance(carried, Probe):
            carried.has_windows = True
        return native()
    is_causal = partial(_is_causal, **kwargs)
    if carried is None:
        return Unmade(kwargs["attention_mask"], is_causal, native)
    if not is_causal():
        if isinstance(carried, Probe):
            raise CannotPatchError(
                "it asks for a mask in which tokens see what is to come, as an encoder's do, and the mask that limits "
                "distances is causal"
            )
        raise ValueError(MORE_THAN_CAUSAL)
    return carried


def _is_causal(mask_function: Any, q_length: int, q_offset: int, **kwargs: Any) -> bool:
    """Return whether a mask that transformers asks for hides what is to come and nothing else, padding aside."""
    if mask_function is causal_mask_function:
        return True
    kwargs |= {"attention_mask": None, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    for start in range(0, q_length, _ROWS):
        rows: dict[str, Any] = {**kwargs, "q_length": min(_ROWS, q_length - start), "q_offset": q_offset + start}
        wanted, causal = (sdpa_mask(mask_function=which, **rows) for which in (mask_function, causal_mask_function))
        if not torch.equal(wanted, causal):  # type: ignore[arg-type]
            return False
    return True


def _refuse_at_sight(model: Any, decoder: Any, technique: str) -> None:
    earlier = decoder.__dict__.get("_hf_longtrunc_patch")
    if earlier is not None:
        raise ValueError(
            f"this {type(model).__name__} is patched by {type(earlier.technique).__name__} already: detach that patch "
            "first, they do not nest"
        )
    if any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__):
        raise ValueError(
            f"{technique}: this model was sharded by fully_shard, whose parameters cannot be probed: attach before "
            "fully_shard(model)"
        )
    if model.config.is_encoder_decoder:
        raise CannotPatchError("it is an encoder-decoder, not a causal language model")
    config = decoder.config
    sees_ahead = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if sees_ahead or not getattr(config, "is_causal", True):
        raise CannotPatchError("its prompts are read in both directions, and the mask that limits distances is causal")
    reason = REFUSED.get(type(decoder).__name__)
    if reason is not None:
        raise CannotPatchError(reason)
    layers = DynamicCache(config=config).layers
    if any(isinstance(layer, DynamicIndexedLayer) for layer in layers):
        raise CannotPatchError(
            "an indexer of its own chooses from the whole text which keys each token sees: a window would hide what it "
            "chooses from, and its cache would grow all the same"
        )
    attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    if not attends or (model._is_stateful and CACHE not in parameters_of(decoder)):
        raise CannotPatchError(
            "it has no attention layers: its states are of constant size already, and there is no distance to limit"
        )


def _configs(module: nn.Module) -> dict[str, PreTrainedConfig]:
    """Return the configs that a module holds itself, by their names."""
    return {name: value for name, value in module.__dict__.items() if isinstance(value, PreTrainedConfig)}


def _collect(config: PreTrainedConfig, found: dict[int, PreTrainedConfig]) -> None:
    """Add a config and those inside it to `found`, by their ids."""
    if id(config) not in found:
        found[id(config)] = config
        for value in config.__dict__.values():
            if isinstance(value, PreTrainedConfig):
                _collect(value, found)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's own fields, without the configs inside it and the name of its attention."""
    fields = config.__dict__.items()
    return {
        name: value
        for name, value in fields
        if not isinstance(value, PreTrainedConfig) and name != "_attn_implementation_internal"
    }


def _carry_back(original: PreTrainedConfig, own: PreTrainedConfig, before: dict[str, Any]) -> None:
    """Make the changes in the original config that were made in its copy since it had the fields `before`."""
    now = _fields(own)
    for name, value in now.items():
        if name not in before or value != before[name]:
            original.__dict__[name] = value
    for name in before.keys() - now.keys():
        original.__dict__.pop(name, None)


def _forget(name: str) -> None:
    for registry in _REGISTRIES:
        registry._global_mapping.pop(name, None)
