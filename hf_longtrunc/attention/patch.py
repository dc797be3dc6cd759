"""Installing a technique's attention in a model, running it, and undoing it."""

from __future__ import annotations

import itertools
import weakref
import zlib
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from hf_longtrunc.attention.cache_law import CacheLaw, guard, require_law
from hf_longtrunc.attention.context import ForwardContext, KeyLayout, padding_of, resolve_mask, set_context
from hf_longtrunc.attention.decoder_call import DecoderCall
from hf_longtrunc.attention.explanation import Explanation
from hf_longtrunc.attention.interface import register, unregister
from hf_longtrunc.attention.own_config import give_own_configs
from hf_longtrunc.attention.own_forwards import REFUSED, own_forward
from hf_longtrunc.attention.padding import check_end
from hf_longtrunc.attention.path_check import check_paths
from hf_longtrunc.attention.probe import ArchitectureProbe, ProbeResult, States, hidden_states, states_of
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.attention.rope import exact_forward, exact_rotaries
from hf_longtrunc.attention.technique import AttentionLayer, Technique
from hf_longtrunc.errors import UnsupportedModelError
from hf_longtrunc.handles import Handle
from hf_longtrunc.models import CACHE, attachable, cache_of, decoder_of, disagreement, few_tokens, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_longtrunc.attention.key_retrieval import BlockScores

_serial = itertools.count()


class PatchTechnique(Technique):
    """A technique that attaches by an `AttentionPatch`."""

    def attach(self, model: Any) -> AttentionPatch:
        """Patch `model`, a transformers causal language model or a PEFT or DDP wrapper of one, until `detach()`.

        Runs a few forwards of at most eight tokens to find how each layer rotates its queries and keys.

        Raises:
            TypeError: it is no such model.
            UnsupportedModelError: its architecture cannot be patched; the message says why.
            ValueError: it is patched or compiled already, or the settings do not fit it.
        """
        return AttentionPatch(self, attachable(model, type(self).__name__))

    __call__ = attach

    def explain(self, model: Any) -> Explanation:
        """Return what will hold for this model, or why it cannot be patched, before a long prompt is read.

        >>> print(LMInfinite(window_length=64).explain(model).cache)
        a ring: 40 KiB a row at any length

        The model is patched and given back. See `Explanation` for the fields; `print` shows all of them.
        """
        owner = attachable(model, type(self).__name__)
        try:
            with self.attach(model) as handle:
                return handle.explanation()
        except UnsupportedModelError as error:
            return Explanation.refused(self, owner, error)


class AttentionPatch(Handle):
    """A model whose attention is computed by a technique: what `attach` returns. `detach()` undoes it.

    Every change is an attribute of this model's own modules, or an entry under a name of this patch's own in
    transformers' two attention registries, which knows neither patch nor model and goes with either.

    Attributes:
        technique: as the user wrote it.
        resolved: the technique with its lengths for this model.
        found: what the probe found out about the model.
        layers: a record of each attention module that is patched.
        law: which caches carry.
        model: the instance that is changed.
        decoder: its part without a head.
        passthrough: whether a text that the model itself reads alike may be left to it.
        compiled: the decoder's forward as it was compiled for one token; None: it was not.
    """

    def __init__(self, technique: Technique, model: Any):
        super().__init__(technique, model, "its attention, masks, rotary modules, and the cache of generate()")
        self.technique: Technique = technique
        self.resolved = technique.for_model(model)
        self.layers: dict[nn.Module, AttentionLayer] = {}
        self.model = model
        self.decoder: Any = decoder_of(model)
        self.compiled: Callable[..., Any] | None = None
        self._name = f"hf_longtrunc_{next(_serial)}"
        self.passthrough = False
        self._run_decoder: Any = None  # the decoder's forward before the patch
        with self.or_nothing():
            try:
                self._install()
            except UnsupportedModelError as error:
                named = type(technique).__name__
                raise UnsupportedModelError(f"{named} cannot patch {type(model).__name__}: {error}") from error

    # -- install -------------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        """Put everything in place; refuse a model that computes something else on a few tokens than before."""
        decoder, model = self.decoder, self.model
        _refuse_at_sight(model, decoder, type(self.technique).__name__)
        self._original = decoder.config._attn_implementation
        states = states_of(decoder)
        self._configs = give_own_configs(self, model, decoder, self._name)
        register(self._name, self._original)
        self.undo(unregister, self._name)
        weakref.finalize(model, unregister, self._name)
        self.set(decoder, "_hf_longtrunc_patch", self)
        self.found = self._probe(states)
        self.resolved = self.resolved.check(self.found)
        law = self.resolved.distances
        frequencies = self.found.frequencies
        self.law = CacheLaw(self.resolved.title, 0 if frequencies else law.exact_length, frequencies)
        check_paths(self.resolved, self.found)
        self.resolved.prepare(self, decoder, self.found)
        ids = few_tokens(decoder, self.resolved.rope_length)
        before = self._natively(ids)
        self.layers = {
            module: AttentionLayer(self.found.indices[module], rotation, module not in self.found.cached_otherwise)
            for module, rotation in self.found.rotations.items()
        }
        for module, layer in self.layers.items():
            self.route(self, module, partial(self.resolved.attend, layer))
        self._run_decoder = decoder.forward
        self._takes_positions = "position_ids" in parameters_of(decoder)
        self._indices = sorted({layer.index for layer in self.layers.values() if layer.index >= 0})
        enter = partial(self.run, None, None) if self.resolved.retrieval is None else partial(self.forward)
        self.set(decoder, "forward", update_wrapper(enter, decoder.forward))
        after = hidden_states(decoder, ids)
        if disagreement(before, after) is not None:
            difference = disagreement(before, after, self._own_noise(ids, before))
            if difference is not None:
                raise UnsupportedModelError(
                    f"within the window its attention would give other results than the model's own (they differ by "
                    f"{difference:.1e}), so it computes something that is not reproduced here"
                )
        # Until here texts of every length took our attention, so that a layer which it cannot serve was refused.
        self.passthrough = self.resolved.retrieval is None and not self.found.own_forwards
        self.set(model, "_get_stopping_criteria", self._stopping_criteria)
        self.set(model, "init_continuous_batching", self._refuse_continuous_batching)
        self.set(model, "_prepare_cache_for_generation", self._prepare_cache)
        prepare = type(model).prepare_inputs_for_generation
        self.set(model, "prepare_inputs_for_generation", update_wrapper(partial(self._prepare_inputs), prepare))
        self.set(model, "_prepare_attention_mask_for_generation", self._prepare_mask)
        self.set(model, "_get_candidate_generator", self._candidate_generator)
        self.refuse_copies(model, decoder, advice="detach first, copy or save, and attach again")

    def _probe(self, states: States | None) -> ProbeResult:
        """Find out how each layer's attention rotates, and what its caches hold."""
        decoder = self.decoder
        with Handle("a probe", decoder, "rotary modules") as probing:
            exact = dict(exact_rotaries(decoder, self.resolved.rope_length))
            for module, rotaries in exact.items():
                probing.set(module, "forward", exact_forward(rotaries))
            sources = [source for rotaries in exact.values() for source in rotaries.values()]
            probe = ArchitectureProbe(decoder, sources, has_states=states is not None)
            own = {module: build for module in decoder.modules() if (build := own_forward(module)) is not None}
            for module, build in own.items():
                probing.set(module, "forward", build(module, partial(probe.attend, module)))
            rotations = probe.rotations()
            cached_otherwise = probe.cached_otherwise()
        short = dict(exact_rotaries(decoder, 1))
        return ProbeResult(
            rotations=rotations,
            indices=probe.indices,
            cached_otherwise=cached_otherwise,
            windowed=frozenset(probe.windowed),
            exact=exact,
            states=states,
            own_forwards=bool(own),
            frequencies=_fingerprint(exact, short),
        )

    def _natively(self, ids: Tensor) -> Tensor:
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

        def rounded(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            draw = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            return output * (1 + 4 * torch.finfo(output.dtype).eps * draw)

        noise = 0.0
        hook = self.decoder.get_input_embeddings().register_forward_hook(rounded)
        try:
            for _ in range(3):
                difference = self._natively(ids) - before
                noise = max(noise, float(difference.double().norm() / before.double().norm()))
        finally:
            hook.remove()
        return noise

    @staticmethod
    def route(handle: Handle, module: nn.Module, attend: Callable[..., Tensor]) -> None:
        """Let a module's attention be computed by `attend(query, key, value, context, scoring)`, until detach."""
        handle.set(module, "_hf_longtrunc_attend", attend)
        build = own_forward(module)
        if build is not None:
            handle.set(module, "forward", build(module, attend))

    # -- run -----------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the decoder, as often as the retrieval wants it."""
        call, retrieval = DecoderCall.bind(self.decoder, args, inputs), self.resolved.retrieval
        if retrieval is None or call.past + call.new < self.resolved.retrieval_length:
            return self.run(call, None)
        return retrieval.run(call, self.run, partial(self.resolved.selection_layers, call), self._total)

    def run(
        self, call: DecoderCall | None, block_scores: BlockScores | None = None, /, *args: Any, **inputs: Any
    ) -> Any:
        """Run the decoder once.

        Where the step of one token is compiled, it is planned before it and committed after it, so that its graph
        holds no number that changes with the tokens seen.

        Args:
            call: of the decoder; None takes it from the arguments of its forward.
            block_scores: collects the scores of a scoring pass; None otherwise.
            args: of the decoder's forward.
            inputs: of the decoder's forward, by name.
        """
        if call is None:
            call = DecoderCall.bind(self.decoder, args, inputs)
        if self.decoder.config._attn_implementation != self._name:
            raise ValueError(
                f"set_attn_implementation was called on a model patched by {type(self.technique).__name__}, whose "
                "attention would no longer run: detach first"
            )
        cached = call.cache_layers
        self._check_cache(cached)
        if self.found.states is not None:
            self.found.states.check(call.real, call.past, call.new)
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
            is_step = context.layout is KeyLayout.RING_BUFFER and not context.is_shifted
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
            self._mark(cache_of(output) if call.cache is None else call.cache)
        return output

    def _check_cache(self, cached: Any) -> None:
        """Refuse a cache that this patch cannot continue; let its layers carry the law from now on."""
        if torch.compiler.is_compiling():  # a graph of the whole model, whose first call was checked
            return
        for index in self._indices:
            if index >= len(cached):
                break
            layer = cached[index]
            if getattr(layer, "law", None) is self.law and not getattr(layer, "is_partial", False):
                continue
            self.resolved.check_cache_layer(layer)
            guarded = layer if isinstance(layer, RingCacheLayer) else guard(layer)
            if guarded is not None:
                cached[index] = guarded
                require_law(guarded, self.law)

    def _mark(self, cache: Any) -> None:
        """Let a cache after its first forward carry the law."""
        layers: Any = getattr(cache, "layers", ())
        for index in () if torch.compiler.is_compiling() else self._indices:
            guarded = guard(layers[index]) if index < len(layers) else None
            if guarded is not None and guarded.law is not self.law:
                layers[index] = guarded
                guarded.law = self.law

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
        """Compile the decoding step: forwards of one token beside the cache that `generate` builds.

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
        if self.found.states is not None:
            raise ValueError(
                "compile() needs steps of one graph, and the recurrent or convolutional layers of this model are "
                "compiled again for every token: leave it out"
            )
        run = self._run_decoder
        self.compiled = torch.compile(lambda **inputs: run(**inputs), **{"dynamic": False, **options})

    def explanation(self) -> Explanation:
        """Return what holds for this model while it is patched."""
        return Explanation.of(self)

    # -- generate() ----------------------------------------------------------------------------------------------------

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

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Build the cache that `generate` would, with the technique's layers in the place of those that grow."""
        named = type(self.technique).__name__
        if generation_config.cache_implementation not in self.resolved.cache_implementations:
            allowed = ", ".join(repr(each) for each in self.resolved.cache_implementations if each)
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot be used on a model patched "
                f"by {named}: leave it out, or take one of {allowed}"
            )
        if getattr(generation_config, "use_mtp", None):
            raise ValueError(
                f"use_mtp drafts with layers that {named} does not patch: leave it out, or detach first. "
                "prompt_lookup_num_tokens and assistant_model work"
            )
        check_end(model_kwargs.get("attention_mask"))
        given = model_kwargs.get(CACHE)
        prepare = type(self.model)._prepare_cache_for_generation
        result = prepare(self.model, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if cache is None:
            return result
        if given is None:
            self._replace_layers(cache.layers)
        for index in self._indices:
            if index < len(cache.layers):
                self.resolved.check_cache_layer(cache.layers[index])
        chunk, retrieval = generation_config.prefill_chunk_size, self.resolved.retrieval
        if chunk is None or retrieval is None:
            self._read_in_chunks(generation_config, model_kwargs)
        else:
            mask = model_kwargs.get("attention_mask")
            length = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[-1]
            if length > cache.get_seq_length():
                generation_config.prefill_chunk_size = retrieval.prefill_chunk(chunk, length - cache.get_seq_length())
        return result

    def _prepare_mask(self, tokens: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> Any:
        """Build the mask that `generate` infers where none is given; a drafter's text holds no padding.

        transformers would take a drafted token for padding that equals the pad token.
        """
        if getattr(generation_config, "is_assistant", False):
            return tokens.new_ones(tokens.shape[:2], dtype=torch.long)
        infer = type(self.model)._prepare_attention_mask_for_generation
        return infer(self.model, tokens, generation_config, model_kwargs)

    def _prepare_inputs(self, *args: Any, **inputs: Any) -> dict[str, Any]:
        """Prepare the inputs of a forward with the cache that is given.

        Phi-3 drops it where a text outgrows its original length, as its rotary frequencies change there: a patched
        model's do not.
        """
        result: dict[str, Any] = type(self.model).prepare_inputs_for_generation(self.model, *args, **inputs)
        if inputs.get(CACHE) is not None and result.get(CACHE) is None:
            result = GenerationMixin.prepare_inputs_for_generation(self.model, *args, **inputs)
        return result

    def _replace_layers(self, cached: list[Any]) -> None:
        """Put the technique's cache layer in the place of every one that would grow, and tell it of states."""
        shares_keys = bool(getattr(self.decoder.config, "num_kv_shared_layers", 0))
        for layer in self.layers.values():
            is_held = 0 <= layer.index < len(cached)
            if is_held and type(cached[layer.index]) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
                cached[layer.index] = self.resolved.cache_layer(cached[layer.index], layer, self.law, shares_keys)
        rings = [each for each in cached if isinstance(each, RingCacheLayer)]
        others = [each for each in cached if not isinstance(each, RingCacheLayer)]
        for ring in rings:
            ring.states = [each for each in others if isinstance(each, LinearAttentionLayer)]

    def _read_in_chunks(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Let a long prompt of ids be read in chunks, so that its activations too take constant memory.

        Retrieval counts the rows of a forward, and some recurrent layers do not go on from a chunk to the next: there
        the prompt is read at once.
        """
        chunk = self.resolved.prefill_chunk
        tensors = {name for name, value in model_kwargs.items() if isinstance(value, Tensor)}
        mask = model_kwargs.get("attention_mask")
        is_short = isinstance(mask, Tensor) and mask.shape[-1] <= (chunk or 0)
        has_ids_alone = tensors <= {"attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"}
        has_ids_alone &= not model_kwargs.get("mm_encoder_outputs")  # of images, which transformers encodes beforehand
        states = self.found.states
        # Before 5.21 transformers, reading in chunks, feeds what a cache holds already a second time; 5.24 was tried.
        goes_on_right = CACHE == "cache"
        if (
            goes_on_right
            and chunk is not None
            and generation_config.prefill_chunk_size is None
            and self.resolved.retrieval is None
            and has_ids_alone
            and not is_short
            and (states is None or states.go_on)
            and any(isinstance(layer, RingCacheLayer) for layer in model_kwargs[CACHE].layers)
        ):
            generation_config.prefill_chunk_size = chunk

    def _candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Build the drafter of assisted decoding, and refuse drafts that the cache could not take back."""
        generator = type(self.model)._get_candidate_generator(self.model, *args, **kwargs)
        most = self.resolved.max_drafts
        if most is None:
            return generator
        reason = (
            "whose cache can take back so many tokens"
            if self.resolved.retrieval is None
            else "of whose forward so many rows read distant keys beside the first"
        )
        for name in ("num_assistant_tokens", "num_output_tokens"):
            drafted = getattr(generator, name, None)
            if drafted is not None and drafted > most:
                option = "prompt_lookup_num_tokens" if name == "num_output_tokens" else name
                raise ValueError(
                    f"{option} must be at most {most} on a model patched by {type(self.technique).__name__}, {reason}, "
                    f"got {drafted}"
                )
        if getattr(generator, "num_assistant_tokens", None) is not None:
            update = generator.update_candidate_strategy

            def within_reach(*args: Any, **kwargs: Any) -> None:  # the heuristic lets drafts grow
                update(*args, **kwargs)
                generator.num_assistant_tokens = min(generator.num_assistant_tokens, most)

            generator.update_candidate_strategy = within_reach
        return generator


def _fingerprint(frozen: Any, short: Any) -> int:
    """Return a number for rotary frequencies that are not those of a short text; 0 where they are."""
    result = 0
    for module, rotaries in frozen.items():
        for layer_type, rotary in rotaries.items():
            if not torch.equal(rotary.frequencies, short[module][layer_type].frequencies):
                result = zlib.crc32(rotary.frequencies.cpu().numpy().tobytes(), result)
    return result


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
        raise UnsupportedModelError("it is an encoder-decoder, not a causal language model")
    config = decoder.config
    sees_ahead = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if sees_ahead or not getattr(config, "is_causal", True):
        raise UnsupportedModelError(
            "its prompts are read in both directions, and the mask that limits distances is causal"
        )
    reason = REFUSED.get(type(decoder).__name__)
    if reason is not None:
        raise UnsupportedModelError(reason)
    layers = DynamicCache(config=config).layers
    if any(isinstance(layer, DynamicIndexedLayer) for layer in layers):
        raise UnsupportedModelError(
            "an indexer of its own chooses from the whole text which keys each token sees: a window would hide what it "
            "chooses from, and its cache would grow all the same"
        )
    attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    if not attends or (model._is_stateful and CACHE not in parameters_of(decoder)):
        raise UnsupportedModelError(
            "it has no attention layers: its states are of constant size already, and there is no distance to limit"
        )
