"""Installing a technique's attention in a model, running it, and undoing it."""

from __future__ import annotations

import itertools
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_longtrunc.attention.cache_law import CacheLaw, check_law, guarded
from hf_longtrunc.attention.context import (
    AttentionCall,
    AttentionLayer,
    DecoderCall,
    ForwardContext,
    padding_of,
    resolve_mask,
    set_context,
)
from hf_longtrunc.attention.explanation import Explanation
from hf_longtrunc.attention.generation import patch_generate
from hf_longtrunc.attention.interface import register, set_own_configs
from hf_longtrunc.attention.own_forwards import own_forward
from hf_longtrunc.attention.path_check import check_technique
from hf_longtrunc.attention.probe import (
    get_result,
    hidden_states,
    identity_of,
    probe,
    refuse_model,
    set_result,
    states_of,
)
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.errors import UnsupportedModelError
from hf_longtrunc.handles import Handle
from hf_longtrunc.models import cache_of, decoder_of, disagreement, few_tokens, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hf_longtrunc.attention.block_scores import BlockScores
    from hf_longtrunc.attention.kernels import Scoring
    from hf_longtrunc.attention.technique import Technique

_serial = itertools.count()


class AttentionPatch(Handle):
    """A model with attention computed by a technique; `attach` returns it, and `detach()` undoes it.

    Every change is an attribute of this model's own modules, or an entry under a name of this patch's own in
    transformers' two attention registries, which knows neither patch nor model and goes with either.

    Attributes:
        technique: as the user wrote it.
        resolved: the technique with its lengths for this model.
        found: the probe's findings about the model.
        layer_indices: of these modules, in order.
        law: which caches carry.
        model: the instance that is changed.
        decoder: its part without a head.
        passthrough: whether a text that the unpatched model reads equally may be left to it.
        compiled: the decoder's forward as it was compiled for one token; None: it was not.
    """

    def __init__(self, technique: Technique, model: Any):
        super().__init__(technique, model, "its attention, masks, rotary modules, and the cache of generate()")
        self.technique: Technique = technique
        self.resolved = technique.for_model(model)
        self.model = model
        self.decoder: Any = decoder_of(model)
        self.compiled: Callable[..., Any] | None = None
        self._name = f"hf_longtrunc_{next(_serial)}"
        self.passthrough = False
        self._run_decoder: Any = None  # the decoder's forward before the patch
        with self.or_nothing():
            try:
                self._attach()
            except UnsupportedModelError as error:
                named = type(technique).__name__
                raise UnsupportedModelError(f"{named} cannot patch {type(model).__name__}: {error}") from error

    @property
    def layers(self) -> Mapping[nn.Module, AttentionLayer]:
        """The attention modules that are patched, with a record of each."""
        return self.found.layers

    # -- install -------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Put everything in place; refuse a model that computes something else on a few tokens than before."""
        decoder, model = self.decoder, self.model
        refuse_model(model, decoder, type(self.technique).__name__)
        key, identity = self.resolved, identity_of(decoder)
        known = get_result(decoder, key, identity)
        states = (False, True) if known else states_of(decoder)  # by the model's own attention
        self._original = decoder.config._attn_implementation
        self._configs = set_own_configs(self, model, decoder, self._name)
        register(self, model, self._name, self._original)
        self.set(decoder, "_hf_longtrunc_patch", self)
        self.found = known or probe(decoder, self.resolved.rope_length, *states)
        self.resolved = self.resolved.check(self.found)
        law = self.resolved.distance_law
        frequencies = self.found.frequencies
        self.law = CacheLaw(self.resolved.title, 0 if frequencies else law.exact_length, frequencies)
        check_technique(self.resolved, self.found)
        self.resolved.prepare(self, decoder, self.found)
        ids = few_tokens(decoder, self.resolved.rope_length)
        before = None if known else self._own_states(ids)
        for module, layer in self.found.layers.items():
            self.set_attention(self, module, layer, self.resolved.attend)
        self._run_decoder = decoder.forward
        self._takes_positions = "position_ids" in parameters_of(decoder)
        self.layer_indices = sorted({layer.index for layer in self.found.layers.values() if layer.index >= 0})
        enter = partial(self.run, None, None) if self.resolved.retrieval is None else partial(self.forward)
        self.set(decoder, "forward", update_wrapper(enter, decoder.forward))
        if before is not None:  # texts of every length take our attention here, so a layer that it cannot serve is seen
            self._check_attention(ids, before)
            set_result(decoder, key, identity, self.found)
        self.passthrough = self.resolved.retrieval is None and not self.found.own_forwards
        patch_generate(self)
        self.refuse_copies(model, decoder, advice="detach first, copy or save, and attach again")

    def _check_attention(self, ids: Tensor, before: Tensor) -> None:
        """Refuse the model if its states of a few tokens differ from `before`, those of its own attention."""
        after = hidden_states(self.decoder, ids)
        if disagreement(before, after) is None:
            return
        difference = disagreement(before, after, self._own_noise(ids, before))
        if difference is not None:
            raise UnsupportedModelError(
                f"within the window its attention would give other results than the model's own (they differ by "
                f"{difference:.1e}), so it computes something that is not reproduced here"
            )

    def _own_states(self, ids: Tensor) -> Tensor:
        """Return hidden states of the model's own attention, at the rotary frequencies of the patch."""
        attributes = self.decoder.__dict__
        patched = attributes.get("forward")
        try:
            if self._run_decoder is not None:
                attributes["forward"] = self._run_decoder
            for config in self._configs:
                config._attn_implementation_internal = self._original
            return hidden_states(self.decoder, ids)
        finally:
            for config in self._configs:
                config._attn_implementation_internal = self._name
            if self._run_decoder is not None:
                attributes["forward"] = patched

    def _own_noise(self, ids: Tensor, before: Tensor) -> float:
        """Return how far rounding errors of the embeddings move the model's own states, relative to them.

        Dynamically quantised activations (W8A8) amplify them: there no two attentions agree to the last digits.
        """
        generator = torch.Generator().manual_seed(0)

        def noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            draw = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            return output * (1 + 4 * torch.finfo(output.dtype).eps * draw)

        largest = 0.0
        hook = self.decoder.get_input_embeddings().register_forward_hook(noise)
        try:
            for _ in range(3):
                difference = self._own_states(ids) - before
                largest = max(largest, float(difference.double().norm() / before.double().norm()))
        finally:
            hook.remove()
        return largest

    @staticmethod
    def set_attention(
        handle: Handle, module: nn.Module, layer: AttentionLayer, attend: Callable[[AttentionCall], Tensor]
    ) -> None:
        """Let a module's attention be computed by `attend`, until detach."""
        handle.set(module, "_hf_longtrunc_layer", layer)
        handle.set(module, "_hf_longtrunc_attend", attend)
        build = own_forward(module)
        if build is not None:

            def from_states(query: Tensor, key: Tensor, value: Tensor, context: Any, scoring: Scoring) -> Tensor:
                scoring = scoring._replace(rotation=layer.rotation)
                return attend(AttentionCall(layer, query, key, value, context, scoring))

            handle.set(module, "forward", build(module, from_states))

    # -- run -----------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the decoder, as often as the retrieval wants it."""
        call, retrieval = DecoderCall.of(self.decoder, args, inputs), self.resolved.retrieval
        if retrieval is None or call.past + call.new < self.resolved.retrieval_length:
            return self.run(call, None)
        return retrieval.run(call, self.run, partial(self.resolved.selection_layers, call), self._total)

    def run(
        self, call: DecoderCall | None, block_scores: BlockScores | None = None, /, *args: Any, **inputs: Any
    ) -> Any:
        """Run the decoder once, for a call or for the arguments of its forward.

        A step of one token is planned before it and committed after it, so that a compiled graph holds no number that
        changes with the tokens seen. `block_scores` collects the scores of a scoring pass.
        """
        if call is None:
            call = DecoderCall.of(self.decoder, args, inputs)
        if self.decoder.config._attn_implementation != self._name:
            raise ValueError(
                f"set_attn_implementation was called on a model patched by {type(self.technique).__name__}, whose "
                "attention would no longer run: detach first"
            )
        cached = call.cache_layers
        self._check_cache(cached)
        self.found.check_states(call.real, call.past, call.new)
        context, positions = self.resolved.context(call, self.found, block_scores, self.passthrough)
        inputs = dict(call.inputs)
        padding = padding_of(inputs.get("attention_mask"))
        if positions is not None and self._takes_positions:
            inputs["position_ids"] = positions
            if padding is None and self.resolved.restarts_positions:
                # Without a mask, transformers takes positions that start again for a new document.
                padding = torch.ones(call.batch, call.past + call.new, dtype=torch.long, device=call.device)
        inputs["attention_mask"] = resolve_mask(inputs.get("attention_mask"), padding, context)
        rings = [layer for layer in cached if isinstance(layer, RingCacheLayer)]
        run = self._run_decoder
        if self.compiled is not None and isinstance(context, ForwardContext) and rings and rings[0].is_initialized:
            is_step = context.ring_slots is not None and not context.is_shifted
            if is_step and rings[0].fits(call.like.dtype):
                run = self.compiled
                if isinstance(inputs["attention_mask"], Tensor) and not self.found.windowed:
                    inputs["attention_mask"] = None  # it grows, and is in the context already
        before = set_context(context)
        try:
            output = run(**inputs)
        finally:
            set_context(before)
        for ring in rings:
            ring.commit()
        if call.past == 0:  # the decoder made the cache, or its layers
            self._set_law(cache_of(output) if call.cache is None else call.cache)
        return output

    def _check_cache(self, cached: Any) -> None:
        """Refuse a cache that this patch cannot continue; let its layers carry the law from now on."""
        if torch.compiler.is_compiling():  # a graph of the whole model; its first call was checked
            return
        for index in self.layer_indices:
            if index >= len(cached):
                break
            layer = cached[index]
            if getattr(layer, "law", None) is self.law and not getattr(layer, "is_partial", False):
                continue
            self.resolved.check_cache_layer(layer)
            own = layer if isinstance(layer, RingCacheLayer) else guarded(layer)
            if own is not None:
                cached[index] = own
                check_law(own, self.law)

    def _set_law(self, cache: Any) -> None:
        """Let a cache after its first forward carry the law."""
        layers: Any = getattr(cache, "layers", ())
        for index in () if torch.compiler.is_compiling() else self.layer_indices:
            own = guarded(layers[index]) if index < len(layers) else None
            if own is not None and own.law is not self.law:
                layers[index] = own
                own.law = self.law

    def _total(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks that share the model's heads: all of them must select alike."""
        mesh = getattr(self.model, "_device_mesh", None)
        if mesh is None:
            return x
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        device = "cpu" if mesh.device_type == "cpu" else torch.device(mesh.device_type)
        summed = x.to(device)
        torch.distributed.all_reduce(summed, group=mesh.get_group())
        return summed.to(x.device)

    def compile(self, **options: Any) -> None:
        """Compile the decoding step: forwards of one token with the cache that `generate` builds.

        All else, prompts of any length above all, runs as before. What changes with every token is planned outside the
        step, and reaches it as tensors: one graph serves all tokens once the cache is full.

        Args:
            options: of `torch.compile`, where `dynamic` is False unless it is given.

        Raises:
            ValueError: the step has no constant shape, as a text is kept that grows; or recurrent layers count tokens.
        """
        named = type(self.technique).__name__
        if not self.resolved.compiles_decode:
            raise ValueError(f"compile() needs steps of one shape, and the cache of {named} grows: leave it out")
        if self.resolved.retrieval is not None:
            raise ValueError("compile() needs steps of one shape, and retrieval keeps a text that grows: leave it out")
        if self.found.has_states:
            raise ValueError(
                "compile() needs steps of one graph, and the recurrent or convolutional layers of this model are "
                "compiled again for every token: leave it out"
            )
        run = self._run_decoder
        self.compiled = torch.compile(lambda **inputs: run(**inputs), **{"dynamic": False, **options})

    def explanation(self) -> Explanation:
        """Return what holds for this model while it is patched."""
        return Explanation.of(self)
