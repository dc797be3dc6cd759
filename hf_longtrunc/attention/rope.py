"""RoPE as a model computes it: exact angles, and rotating already rotated vectors by further positions.

A model file rotates queries and keys inside its attention, in a layout of its own, and caches rotated keys. That stays
as it is. Two things are needed in addition.

1. *Exact angles.* Model files multiply position and frequency in fp32, where the error grows with the position (0.2
   radians at 1e7). In a patched model the rotary modules answer with angles computed in fp64 (`ExactRotary`), so a
   query and a key are at their true distance at any position.
2. *Rotating a rotated vector further* (`Rotation.rotate`), to place a sink at the maximum distance. The layout is found
   by experiment: one forward with all angles zero, one with a known angle per frequency (`probe.py`). A model that no
   known layout explains is refused.

Scaling factors on cosines and sines (YaRN, longrope) are in the rotated vectors already, so a further rotation keeps
them once. Frequencies that depend on the running length ("dynamic", longrope) are frozen at those of `window` tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hf_longtrunc.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_LAYOUTS: tuple[Literal["halves", "pairs"], ...] = ("halves", "pairs")


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotary embedding of queries and keys, one object for all layers that share it.

    Examples:
        >>> rotation = Rotation(torch.tensor([1.0, 0.1]))
        >>> x = torch.randn(1, 1, 3, 4)
        >>> there = rotation.rotate(x, torch.tensor([[5, 6, 7]]))
        >>> back = rotation.rotate(there, -torch.tensor([[5, 6, 7]]))
        >>> torch.allclose(back, x, atol=1e-6)
        True

    Attributes:
        frequencies: radians per position [f], fp64.
        layout: "halves" pairs dimension start + p with start + f + p, "pairs" start + 2p with start + 2p + 1.
        start: the first rotary dimension of a head.
        sign: 1, or -1 where the model rotates in the other direction.
    """

    frequencies: Tensor
    layout: Literal["halves", "pairs"] = "halves"
    start: int = 0
    sign: int = 1
    dims: slice = field(init=False)  # of a head, those that rotate

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", slice(self.start, self.start + 2 * len(self.frequencies)))

    def rotate(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rotate x [batch, heads, n, dim] by offsets [rows, n] positions; the result has x's dtype."""
        return self.apply(x, *self.cos_sin(offsets, x.dtype))

    def cos_sin(self, offsets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [rows, 1, n, 2f] for offsets [rows, n], in fp32 or better."""
        angles, wide = exact_angles(offsets, self.frequencies)[:, None], torch.promote_types(dtype, torch.float32)
        cos, sin = angles.cos().to(wide), (angles * self.sign).sin().to(wide)
        if self.layout == "halves":
            return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [batch, heads, n, dim] by cosines and sines of `cos_sin`."""
        part = x[..., self.dims].to(torch.promote_types(x.dtype, torch.float32))
        if self.layout == "halves":
            first, second = part.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
        else:
            turned = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
        rotated = (part * cos + turned * sin).to(x.dtype)
        if rotated.shape[-1] == x.shape[-1]:
            return rotated
        return torch.cat([x[..., : self.dims.start], rotated, x[..., self.dims.stop :]], dim=-1)


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
        generator: draws `probe_angles` [f], which identify the layers that use this module.

    While `probing` is a number, every angle is that multiple of `probe_angles`, whatever the position.

    Raises:
        UnsupportedModelError: the module's answers follow none of the known forms.
    """

    def __init__(self, module: nn.Module, layer_type: str | None, window: int, generator: torch.Generator):
        name = type(module).__name__
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
        self._set_order(answer, name)
        self._check(answer, positions[:, :4], name)

    def _set_order(self, answer: Any, name: str) -> None:
        count = self.frequencies.shape[-1]
        self.is_complex = isinstance(answer, Tensor) and answer.is_complex()
        parts = [answer] if self.is_complex else answer
        if (
            not isinstance(parts, (tuple, list))
            or len(parts) != (1 if self.is_complex else 2)
            or not all(isinstance(t, Tensor) and t.ndim == 3 and t.shape[-1] in (count, 2 * count) for t in parts)
        ):
            raise UnsupportedModelError(f"{name} answers with something else than cosines and sines [batch, n, dim]")
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
            raise UnsupportedModelError(f"{name} computes its angles in a way that is not position * inv_freq")

    def __call__(self, x: Tensor, positions: Tensor) -> Any:
        """Return the module's answer for positions [rows, n]."""
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


def find_rotary(decoder: nn.Module, window: int) -> Iterator[tuple[nn.Module, dict[str | None, ExactRotary]]]:
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
    """Find the candidate that rotates one to the other, both [batch, heads, n, dim], by its source's probe angles.

    Returns:
        The rotation, or None where nothing was rotated.

    Raises:
        UnsupportedModelError: no candidate does.
    """
    scale = unrotated.double().norm()
    tolerance = 2e-2 if unrotated.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if (rotated.double() - unrotated.double()).norm() <= tolerance * scale:
        return None
    one = torch.ones(1, unrotated.shape[2], device=unrotated.device)
    for source, candidate in candidates:
        by_probe_angles = replace(candidate, frequencies=source.probe_angles)
        if (by_probe_angles.rotate(unrotated.double(), one) - rotated.double()).norm() <= tolerance * scale:
            return candidate
    raise UnsupportedModelError(
        "it turns queries or keys in a way that is no rotation of planes by position * frequency"
    )


def rotations_of(dim: int, device: torch.device, sources: list[ExactRotary]) -> list[tuple[ExactRotary, Rotation]]:
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
