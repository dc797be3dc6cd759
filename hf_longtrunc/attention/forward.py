"""The forward of a patched decoder: makes the step, lets the decoder run with it, and lets a strategy run it twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_longtrunc.attention.cache import ArchiveCacheLayer, LambdaCacheLayer
from hf_longtrunc.attention.row_positions import check_positions, checked_mask
from hf_longtrunc.attention.step import Layout, carry, made, padding_of, planned
from hf_longtrunc.models import CACHE, bound, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_longtrunc.attention.layer import Settings
    from hf_longtrunc.attention.retrieval import Ballot, Retrieval
    from hf_longtrunc.attention.rotary import Rotation
    from hf_longtrunc.attention.states import States

_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "per_layer_inputs")


class PatchedForward:
    """Runs a decoder under LM-Infinite.

    Args:
        decoder: the patched model without its head.
        original: its forward before it was patched.
        settings: of the patch.
        rotations: of its layers.
        name: of the patch's attention in its config.
        has_windows: whether some of its layers were trained with a window of their own.
        states: what its recurrent and convolutional layers carry; None where there are none.
        mesh: over which tensor parallelism splits its heads; None: it does not.

    Attributes:
        compiled: the original forward as it was compiled for one token; None: it was not.
    """

    def __init__(
        self,
        decoder: Any,
        original: Callable[..., Any],
        settings: Settings,
        rotations: set[Rotation],
        name: str,
        has_windows: bool,
        states: States | None,
        mesh: Any = None,
    ):
        self.decoder = decoder
        self.original = original
        self.compiled: Callable[..., Any] | None = None
        self.settings = settings
        self.rotations = rotations
        self.name = name
        self.has_windows = has_windows
        self.states = states
        self.mesh = mesh
        self.takes_positions = "position_ids" in parameters_of(decoder)

    def once(self, ballot: Ballot | None, /, *args: Any, **inputs: Any) -> Any:
        """Run the decoder once; with a ballot, let its last rows vote.

        Where the step of one token is compiled it is planned before it and settled behind it, so that its graph holds
        no number that changes with the tokens seen.
        """
        if args:
            inputs = bound(self.decoder, args, inputs)
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        new, cache = tokens.shape[1], inputs.get(CACHE)
        layers = [] if cache is None else cache.layers
        self.check(layers)
        past = 0 if cache is None else int(cache.get_seq_length())
        padding = padding_of(inputs.get("attention_mask"))
        real = checked_mask(padding, past + new)
        check_positions(inputs.get("position_ids"), real, new)
        if self.states is not None:
            self.states.check(real, past, new)
        like = tokens.new_empty(0, dtype=self.decoder.dtype)
        step, positions = planned(self.settings, self.rotations, layers, real, past, new, like, ballot)
        if self.has_windows and (step.query_order is not None or step.has_moved):
            raise ValueError(
                "attention_mask has zeros between real tokens, and this model has layers with a window of their own, "
                "which counts them: pad on the left alone"
            )
        if self.takes_positions:
            inputs["position_ids"] = positions.clamp_min(0)
        inputs["attention_mask"] = made(inputs.get("attention_mask"), padding, step)
        rings = [layer for layer in layers if isinstance(layer, LambdaCacheLayer)]
        run = self.original
        if (
            self.compiled is not None
            and step.layout is Layout.RING
            and not step.has_moved
            and rings[0].fits(like.dtype)
        ):
            run = self.compiled
            if isinstance(inputs["attention_mask"], Tensor) and not self.has_windows and self.states is None:
                inputs["attention_mask"] = None  # it grows, and is in the step already
        before = carry(step)
        try:
            output = run(**inputs)
        finally:
            carry(before)
        for ring in rings:
            ring.settle()
        return output

    def reading(self, *args: Any, **inputs: Any) -> Any:
        """Run the decoder as the strategy that reads the middle wants it."""
        retrieval = self.settings.retrieval
        assert retrieval is not None
        return Call(self, bound(self.decoder, args, inputs)).read(retrieval)

    def check(self, layers: Sequence[Any]) -> None:
        """Refuse a model whose attention is no longer ours, and a cache that is not, or not whole.

        Raises:
            ValueError: the message says what to do.
        """
        check_implementation(self.decoder, self.name, "LMInfinite")
        ours = self.settings.num_sink_tokens, self.settings.window_length
        for layer in layers:
            if not isinstance(layer, LambdaCacheLayer):
                continue
            theirs = layer.num_sink_tokens, layer.window_length
            if theirs != ours:
                raise ValueError(
                    f"this cache was built for (num_sink_tokens, window_length) = {theirs}, and the model is patched "
                    f"with {ours}: start anew, or patch with the same numbers"
                )
            if self.settings.retrieval is not None and not isinstance(layer, ArchiveCacheLayer):
                raise ValueError(
                    "this cache was built without retrieval, so the middle of its text is gone: start anew, or patch "
                    "with retrieval=None"
                )
            if layer.is_torn:
                raise ValueError(
                    "a forward was interrupted while this cache stored its tokens, so its layers no longer hold the "
                    "same text: start anew with a new cache"
                )


def check_implementation(decoder: Any, name: str, technique: str) -> None:
    """Raise ValueError if a patched decoder's attention is no longer the one that was registered as `name`."""
    if decoder.config._attn_implementation != name:
        raise ValueError(
            f"set_attn_implementation was called on a model patched by {technique}, whose attention would no longer "
            "run: detach first"
        )


@dataclass
class Call:
    """One call of a decoder that a strategy may run twice: a `retrieval.Forward`.

    Attributes:
        forward: of the decoder.
        inputs: by their names.
    """

    forward: Any
    inputs: dict[str, Any]

    @property
    def new(self) -> int:
        """How many tokens the call brings."""
        tokens = self.inputs.get("input_ids")
        return int((self.inputs["inputs_embeds"] if tokens is None else tokens).shape[1])

    @property
    def seen(self) -> int:
        """How many tokens there are with them."""
        cache = self.inputs.get(CACHE)
        return self.new + (0 if cache is None else int(cache.get_seq_length()))

    @property
    def has_middle(self) -> bool:
        """Whether there are tokens that are neither in the window nor sinks."""
        settings = self.forward.settings
        return bool(self.seen > settings.window_length + settings.num_sink_tokens)

    def ends_in(self, ids: Sequence[int]) -> Tensor | None:
        """Return which rows end in these tokens [batch]; None where that is not known or no tokens are named."""
        tokens = self.inputs.get("input_ids")
        if tokens is None or not ids:
            return None
        if tokens.shape[1] < len(ids):  # a decoded token, for which no device is waited
            return torch.zeros(len(tokens), dtype=torch.bool)
        end: Tensor = tokens[:, -len(ids) :]
        return (end == end.new_tensor(list(ids))).all(1)

    def archives(self) -> list[Any]:
        """Return every layer's archive.

        Raises:
            ValueError: some layer has none, or the call asks for hidden states of rows that would run twice.
        """
        cache = self.inputs.get(CACHE)
        layers = [] if cache is None else cache.layers
        if not layers or not all(isinstance(layer, ArchiveCacheLayer) for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "no cache"
            raise ValueError(
                "TopBlocks runs the end of a question twice, for which every layer needs the cache that generate() "
                f"builds; this text has a middle and {kinds}: call generate(), or take TopK (also for models with "
                "windowed layers)"
            )
        return list(layers)

    def read(self, retrieval: Retrieval) -> Any:
        """Run the decoder as often as a strategy wants it."""
        return retrieval.run(self) if retrieval.is_run_twice(self) else self.forward.once(None, **self.inputs)

    def run(self, last: int | None = None, ballot: Ballot | None = None) -> Any:
        """Run the decoder on all new tokens or on the `last` of them."""
        if self.inputs.get("output_hidden_states") or self.forward.decoder.config.output_hidden_states:
            raise ValueError("output_hidden_states cannot be had with TopBlocks, which runs the last rows twice")
        inputs = dict(self.inputs)
        for name in _PER_TOKEN if last is not None else ():
            value = inputs.get(name)
            if isinstance(value, Tensor):
                by_row = name in ("inputs_embeds", "per_layer_inputs")
                inputs[name] = value[:, -last:] if by_row else value[..., -last:]  # type: ignore[operator]
        return self.forward.once(ballot, **inputs)

    def take_back(self, rows: int) -> None:
        """Take the last `rows` tokens out of the cache."""
        self.inputs[CACHE].crop(-rows)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks that share the model's heads: all of them must choose alike."""
        mesh = self.forward.mesh
        if mesh is not None:
            mesh = mesh["tp"] if mesh.ndim > 1 else mesh
            device = "cpu" if mesh.device_type == "cpu" else torch.device(mesh.device_type)
            summed = x.to(device)
            torch.distributed.all_reduce(summed, group=mesh.get_group())
            x = summed.to(x.device)
        return x

    def with_first(self, first: Any, output: Any) -> Any:
        """Return `output` with the hidden states of the rows before, out of the first output."""
        hidden = torch.cat([first[0][:, : -output[0].shape[1]], output[0]], dim=1)
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output["last_hidden_state"] = hidden
        return output
