"""Reading a model's own rotary embedding, exactly and whatever its layout.

A model file rotates inside its attention, in a layout of its own (halves or neighbouring pairs, the first dimensions
of a head or the last, through cosines or complex numbers), and keeps rotated keys in its cache. That is left as it
is. Two things are needed beside it:

1. *Exact angles.* The model's modules multiply position and frequency in fp32, whose error grows with the position
   (0.2 radians at 1e7). While a model is patched, its rotary modules answer with angles reduced in fp64: a key and a
   query then stand at their true distance at any position, so nothing ever has to be re-based.
2. *Turning a rotated vector on by any number of steps*, to put an old sink at the distance ceiling. The layout is
   found by experiment: one forward with all angles zero, one with a known angle for each frequency. What no layout
   explains to the last digits is refused, so an unknown architecture cannot be patched wrongly.

A factor on cosines and sines (YaRN, longrope) is in the rotated vectors already; turning them on keeps it once.
"dynamic" and longrope frequencies depend on the running length: here they are those of a text of `window` tokens,
for good.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_LAYOUTS: tuple[Literal["halves", "pairs"], ...] = ("halves", "pairs")


class CannotPatchError(ValueError):
    """A model does something that LM-Infinite cannot reproduce; the message says what."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of queries and keys, one object for all layers that share it.

    Attributes:
        frequencies: radians a step [f], fp64, of the f planes.
        layout: "halves" turns dimension start + p against start + f + p, "pairs" start + 2p against start + 2p + 1.
        start: the first rotated dimension of a head.
        sign: 1, or -1 where the model turns the other way.
    """

    frequencies: Tensor
    layout: Literal["halves", "pairs"] = "halves"
    start: int = 0
    sign: int = 1

    def rotate(self, x: Tensor, steps: Tensor) -> Tensor:
        """Turn x [batch, heads, n, dim] on by steps [rows, n] positions; the result has x's dtype."""
        return self.apply(x, *self.weights(steps, x.dtype))

    def weights(self, steps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines [rows, 1, n, 2f] of a turn by steps [rows, n], in fp32 or better."""
        return self._weights(exact_angles(steps, self.frequencies)[:, None] * self.sign, dtype)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """Turn x [batch, heads, n, dim] by angles [..., n, f], in fp32 or better."""
        return self.apply(x, *self._weights(angles, x.dtype))

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn x [batch, heads, n, dim] by what `weights` returned."""
        planes = self.planes
        turned = (x[..., planes] * cos + self.quarter_turn(x) * sin).to(x.dtype)
        if turned.shape[-1] == x.shape[-1]:
            return turned
        return torch.cat([x[..., : planes.start], turned, x[..., planes.stop :]], dim=-1)

    @property
    def planes(self) -> slice:
        """The dimensions of a head that turn."""
        return slice(self.start, self.start + 2 * len(self.frequencies))

    def _weights(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        if self.layout == "halves":
            return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)

    def quarter_turn(self, x: Tensor) -> Tensor:
        """Return the planes of x [..., dim], each (a, b) turned to (-b, a), in fp32 or better [..., 2f]."""
        planes = x[..., self.planes].to(torch.promote_types(x.dtype, torch.float32))
        if self.layout == "halves":
            first, second = planes.chunk(2, dim=-1)
            return torch.cat([-second, first], dim=-1)
        return torch.stack([-planes[..., 1::2], planes[..., ::2]], dim=-1).flatten(-2)


def exact_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Return positions * frequencies [..., f] in fp64 (fp32 on a device that has no fp64)."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    return positions[..., None].to(dtype) * frequencies.to(positions.device, dtype)


class ExactRotary:
    """A rotary module's own cosines and sines, from exact angles, for one of its layer types.

    Args:
        module: the model's rotary module.
        layer_type: which of its frequency sets, for a module that has several; None for one that has one.
        window: frequencies that depend on the running length are taken at this length.
        generator: draws `probe_angles` [f], by which the layers that use this module are recognised.

    While `probing` is a number, every angle is that multiple of `probe_angles`, whatever the position.

    Raises:
        CannotPatchError: the module's answers follow none of the known forms.
    """

    def __init__(self, module: nn.Module, layer_type: str | None, window: int, generator: torch.Generator):
        twin = copy.deepcopy(module)  # asking may change a module: dynamic and longrope store what they saw last
        table = _table(twin)
        device = next(twin.buffers()).device
        last = max(4, window - 1) if table is None else len(table) - 1
        positions = torch.tensor([[0, 1, 2, 3, last]], device=device)
        extra = {"layer_type": layer_type} if layer_type else {}
        answer = type(twin).forward(twin, torch.zeros(1, 5, 1, dtype=torch.float64, device=device), positions, **extra)
        if table is None:
            frequencies = getattr(twin, f"{layer_type}_inv_freq" if layer_type else "inv_freq").detach()
        else:
            count = table.shape[-1] // 2
            frequencies = 10_000 ** (-torch.arange(count, dtype=torch.float64) / count)
        self.frequencies: Tensor = frequencies.double().cpu().clone().to(device)
        self.probe_angles = 0.2 + 1.2 * torch.rand(self.frequencies.shape, generator=generator, dtype=torch.float64)
        self.probing: float | None = None
        self._set_form(answer, type(module).__name__)
        self._check(answer, positions[:, :4], type(module).__name__)

    def _set_form(self, answer: Any, name: str) -> None:
        count = self.frequencies.shape[-1]
        self.is_complex = isinstance(answer, Tensor) and answer.is_complex()
        parts = [answer] if self.is_complex else answer
        if (
            not isinstance(parts, (tuple, list))
            or len(parts) != (1 if self.is_complex else 2)
            or not all(isinstance(t, Tensor) and t.ndim == 3 and t.shape[-1] in (count, 2 * count) for t in parts)
        ):
            raise CannotPatchError(f"{name} answers with something else than cosines and sines [batch, n, dim]")
        # At position 0 every cosine is the scale, and every sine is 0.
        self.is_sine_first = not self.is_complex and not parts[0][0, 0].any()
        sample = parts[1] if self.is_sine_first else parts[0]
        self.scale = float(sample[0, 0, 0].real)
        self.dtype = None if sample.dtype == torch.float64 else sample.dtype
        order = torch.arange(count, device=self.frequencies.device)
        self.order = order if sample.shape[-1] == count else order.repeat(2)
        if sample.shape[-1] == 2 * count:
            neighbours = (sample[0, 1, 0] - sample[0, 1, 1]).abs() < (sample[0, 1, 0] - sample[0, 1, count]).abs()
            self.order = order.repeat_interleave(2) if neighbours else self.order

    def _check(self, answer: Any, positions: Tensor, name: str) -> None:
        ours = self(torch.zeros(1, dtype=torch.float64, device=positions.device), positions)
        pairs = [(ours, answer)] if self.is_complex else list(zip(ours, answer, strict=True))
        if not all(torch.allclose(mine, theirs[:, :4].to(mine.dtype), atol=1e-4) for mine, theirs in pairs):
            raise CannotPatchError(f"{name} computes its angles in a way that is not position * inv_freq")

    def __call__(self, x: Tensor, positions: Tensor) -> Any:
        """Return what the module would, for positions [rows, n]."""
        if self.probing is None:
            angles = exact_angles(positions, self.frequencies)
        else:
            angles = (self.probing * self.probe_angles).to(positions.device).expand(*positions.shape, -1)
        angles = angles[..., self.order.to(angles.device)]
        if self.is_complex:
            return torch.polar(torch.full_like(angles, self.scale), angles).to(self.dtype or torch.complex128)
        dtype = self.dtype or x.dtype
        cos, sin = (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)
        return (sin, cos) if self.is_sine_first else (cos, sin)


def rotary_modules(decoder: nn.Module, window: int) -> Iterator[tuple[nn.Module, dict[str | None, ExactRotary]]]:
    """Yield each rotary module of `decoder` with an `ExactRotary` for each of its frequency sets."""
    generator = torch.Generator().manual_seed(0)
    for module in decoder.modules():
        names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        types = [name.removesuffix("inv_freq").rstrip("_") or None for name in names if "original" not in name]
        if types or _table(module) is not None:
            types = types or [None]
            yield module, {layer_type: ExactRotary(module, layer_type, window, generator) for layer_type in types}


def _table(module: nn.Module) -> Tensor | None:
    """Return the table [positions, sines and cosines] that GPT-J and CodeGen look angles up in, None elsewhere."""
    is_rotary = type(module).__name__.endswith("RotaryEmbedding")
    return module._buffers.get("embed_positions") if is_rotary else None


def find_rotation(
    unrotated: Tensor, rotated: Tensor, candidates: Iterable[tuple[ExactRotary, Rotation]]
) -> Rotation | None:
    """Find the candidate that turns one into the other, both [..., dim], by its source's probe angles.

    Returns:
        The rotation, or None where nothing was rotated.

    Raises:
        CannotPatchError: neither explains what is seen.
    """
    scale = unrotated.double().norm()
    tolerance = 2e-2 if unrotated.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if (rotated.double() - unrotated.double()).norm() <= tolerance * scale:
        return None
    for source, candidate in candidates:
        turned = candidate.turn(unrotated.double(), source.probe_angles.to(unrotated.device) * candidate.sign)
        if (turned - rotated.double()).norm() <= tolerance * scale:
            return candidate
    raise CannotPatchError("it turns queries or keys in a way that is no rotation of planes by position * frequency")


def candidate_rotations(
    dim: int, device: torch.device, sources: list[ExactRotary]
) -> list[tuple[ExactRotary, Rotation]]:
    """Return every rotation of heads of `dim` dimensions that a source's frequencies can make, with that source."""
    candidates = []
    for source in sources:
        frequencies = source.frequencies.to(device)
        width = 2 * frequencies.shape[-1]
        for layout in _LAYOUTS:
            for start in sorted({0, dim - width}) if width <= dim else []:
                candidates += [(source, Rotation(frequencies, layout, start, sign)) for sign in (1, -1)]
    return candidates


def exact_forward(sources: dict[str | None, ExactRotary]) -> Callable[..., Any]:
    """Return a `forward` that takes the place of a rotary module's own.

    Of positions in time, height and width [3, rows, n] the first are taken: `check_positions` has seen them agree.
    """

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        position_ids = position_ids[0] if position_ids.ndim == 3 else position_ids
        return sources[layer_type](x, position_ids.to(x.device))

    return forward
