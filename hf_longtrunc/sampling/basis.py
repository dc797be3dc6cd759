r"""The column space of a model's output embedding, cut to its leading directions.

A softmax model's logits are W h with W [V, d] and d much smaller than V. Where the hidden state h minimises the
cross-entropy against a true distribution p*, the gradient W^T (p* - p) vanishes: the model's error is orthogonal to
every column of W, hence to every combination W v of them. A basis is V of c such columns, those with the most energy:

    factors = W [v_1 ... v_c] / rms,    v_k the leading eigenvectors of W^T W = sum over chunks of W_chunk^T W_chunk

Each column lies in the column space of W to rounding whatever the error of v_k: a randomised or inaccurate
decomposition can only choose weaker directions, never false ones. Columns are scaled to root mean square 1, which
changes no constraint.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.arguments import check_choice, check_float, check_int
from hf_longtrunc.saving import load_folder, save_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

    from jaxtyping import Float

    Method = Literal["exact", "randomized"]

# Rows of the output embedding that are in float64 at one time.
_CHUNK = 16384
_KIND = "softmax_basis"
_OVERSAMPLING = 16
_POWER_ITERATIONS = 8


class _Directions(NamedTuple):
    vectors: Float[Tensor, "width rank"]
    singular_values: Float[Tensor, " rank"]


@dataclass(frozen=True, eq=False)
class SoftmaxBasis:
    """The leading `rank` directions of a model's output embedding, for basis-aware truncation.

    >>> basis = SoftmaxBasis.from_model(model, rank=8)
    >>> basis.factors.shape
    torch.Size([96, 8])

    Attributes:
        factors: [vocabulary, rank], float64: the output embedding times its leading right singular vectors, each
            column scaled to root mean square 1, the leading one first.
        singular_values: [rank], of the directions, largest first.
        weight_hash: SHA-256 of the weights it was made from: a basis says nothing about any other weights.
        centered: whether the mean row was subtracted first (softmax cannot see a vector that is added to every row).
        softcap: the cap c of a head that returns c * tanh(logits / c), None for a plain head.

    A final RMSNorm holds h on an ellipsoid; that the gradient vanishes across it too is an assumption.

    Make one with `from_model` or `from_weight`, keep it with `save_pretrained` and `from_pretrained`.

    Raises:
        TypeError, ValueError: factors or singular values of another dtype or shape, or not finite.

    Source: Finlayson et al. 2023, "Closing the Curious Case of Neural Text Degeneration", arXiv 2310.01693, section 4.
    Deviation: the columns' scale; `centered` and `softcap` are not in the paper.
    """

    factors: Float[Tensor, "vocab rank"]
    singular_values: Float[Tensor, " rank"]
    weight_hash: str
    centered: bool = False
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.factors.dtype != torch.float64 or self.singular_values.dtype != torch.float64:
            raise TypeError(
                "factors and singular_values must be float64, in which every proof is made, got "
                f"{self.factors.dtype} and {self.singular_values.dtype}; make the basis again with from_model or "
                "from_weight"
            )
        if self.factors.ndim != 2 or self.singular_values.shape != self.factors.shape[1:]:
            raise ValueError(
                f"factors must be [vocabulary, rank] and singular_values [rank], got {list(self.factors.shape)} and "
                f"{list(self.singular_values.shape)}"
            )
        if not bool(self.factors.isfinite().all() and self.singular_values.isfinite().all()):
            raise ValueError("factors and singular_values must be finite, got NaN or infinite entries")
        if self.softcap is not None:
            check_float("softcap", self.softcap, gt=0)

    @classmethod
    def from_model(cls, model: Any, rank: int = 20, **options: Any) -> SoftmaxBasis:
        """Make the basis of the output embedding of `model`, a transformers language model or a wrapper of one.

        One forward of eight tokens finds what the model does to its logits. A bias or a constant scale leaves the
        column space as it is; a cap c * tanh(z / c) is noted in the basis; anything else is refused. An embedding that
        is no plain linear layer (adapters, quantised weights) is read as f(I) - f(0). `options` are those of
        `from_weight`.

        Raises:
            ValueError: the model has no output embedding, one with dropout that is in training mode, or logits that
                are none of the above; errors of `from_weight`.
        """
        head = _head_of(model)
        return cls.from_weight(head.weight(), rank, softcap=head.cap, **options)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        rank: int = 20,
        *,
        centered: bool = False,
        method: Method = "exact",
        softcap: float | None = None,
        progress: bool = False,
    ) -> SoftmaxBasis:
        """Make the basis of an output embedding [vocabulary, width], on its device.

        Args:
            weight: any floating dtype; worked on in float64, 16384 rows at a time.
            rank: how many directions, 0 to the numerical rank of `weight`; the paper uses 20.
            centered: subtract the mean row first.
            method: "exact" decomposes W^T W (vocabulary * width^2 multiplications); "randomized" iterates on a block of
                rank + 16 vectors (18 passes of vocabulary * width * that), for widths of several thousand.
            softcap: the cap of the logits, if the head has one.
            progress: show a bar (needs tqdm).

        Raises:
            TypeError, ValueError: a weight that is no finite floating-point matrix; a rank beyond that of the weight,
                whose further directions are rounding noise; another argument outside its range.
        """
        rank = _checked_rank(weight, rank)
        check_choice("method", method, ("exact", "randomized"))
        mean = _mean_row(weight) if centered else weight.new_zeros(weight.shape[1], dtype=torch.float64)

        def chunks() -> Iterator[Tensor]:
            for rows in torch.split(weight, _CHUNK):
                yield rows.double() - mean

        directions = _leading_directions(chunks, weight, rank, method, progress)
        _check_directions(directions.singular_values, weight)
        factors = torch.cat([rows @ directions.vectors for rows in chunks()])
        rms = factors.square().mean(0).sqrt()
        factors = factors / rms.where(rms > 0, 1)
        return cls(factors, directions.singular_values, _hash(weight), centered, softcap)

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.factors.shape[1]

    @property
    def vocab_size(self) -> int:
        """Number of tokens: the width of the logits, which may exceed the tokenizer."""
        return self.factors.shape[0]

    def truncated(self, rank: int) -> SoftmaxBasis:
        """Return the basis of the first `rank` of these directions."""
        rank = check_int("rank", rank, minimum=0, maximum=self.rank)
        parts = self.factors[:, :rank].contiguous(), self.singular_values[:rank].clone()
        return SoftmaxBasis(*parts, self.weight_hash, self.centered, self.softcap)

    def check_model(self, model: Any) -> None:
        """Raise ValueError unless this basis was made from the weights that `model` has now; hashes them once."""
        if _hash(_head_of(model).weight()) != self.weight_hash:
            raise ValueError(
                "this basis was made from other weights than the model's output embedding has now: make it again with "
                "SoftmaxBasis.from_model(model)"
            )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the basis into a folder, as a safetensors file with a checksum."""
        tensors = {"factors": self.factors, "singular_values": self.singular_values}
        settings = {"weight_hash": self.weight_hash, "centered": self.centered, "softcap": self.softcap}
        save_folder(folder, _KIND, tensors, settings)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> SoftmaxBasis:
        """Read a basis that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder holds none.
            TypeError, ValueError: the files are damaged, something is missing in them, or it is no float64 basis.
        """
        tensors, settings = load_folder(
            folder, _KIND, {"factors": "vocab rank", "singular_values": "rank"}, ("weight_hash", "centered", "softcap")
        )
        factors, values = tensors["factors"].to(device), tensors["singular_values"].to(device)
        return cls(factors, values, settings["weight_hash"], settings["centered"], settings["softcap"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the basis into the folder `path`: `save_pretrained` by its earlier name."""
        self.save_pretrained(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> SoftmaxBasis:
        """Read a basis from the folder `path`: `from_pretrained` by its earlier name."""
        return cls.from_pretrained(path, device)

    def __repr__(self) -> str:
        return f"SoftmaxBasis(vocab_size={self.vocab_size}, rank={self.rank}, weight_hash={self.weight_hash[:12]!r})"


def _leading_directions(
    chunks: Callable[[], Iterator[Tensor]], weight: Tensor, rank: int, method: str, progress: bool
) -> _Directions:
    """Leading right singular vectors of the chunks' rows, from products with W^T W alone."""
    width = weight.shape[1]

    def gram_times(block: Tensor) -> Tensor:
        product = torch.zeros_like(block)
        for rows in _shown(chunks(), progress, -(-weight.shape[0] // _CHUNK)):
            product += rows.T @ (rows @ block if block.shape[1] < width else rows)
        return product

    if method == "exact" or rank + _OVERSAMPLING >= width:
        block = torch.eye(width, dtype=torch.float64, device=weight.device)
    else:
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(width, rank + _OVERSAMPLING, dtype=torch.float64, generator=generator).to(weight.device)
        for _ in range(_POWER_ITERATIONS):
            block = torch.linalg.qr(gram_times(block)).Q
    # Rayleigh-Ritz: the best directions inside the block's span; the whole space in the exact case.
    energies, inner = torch.linalg.eigh(block.T @ gram_times(block))
    leading = inner.flip(1)[:, :rank]
    return _Directions(block @ leading, energies.flip(0)[:rank].clamp_min(0).sqrt())


def _head_of(model: Any) -> Any:
    # Asked for here: the file knows no transformers until it is handed a model of it.
    from hf_longtrunc.head import LanguageModelHead

    return LanguageModelHead(model)


def _hash(weight: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    for rows in torch.split(weight, _CHUNK):
        digest.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _mean_row(weight: Tensor) -> Tensor:
    return torch.stack([rows.double().sum(0) for rows in torch.split(weight, _CHUNK)]).sum(0) / weight.shape[0]


def _shown(chunks: Iterable[Tensor], progress: bool, total: int) -> Iterable[Tensor]:
    if not progress:
        return chunks
    from tqdm import tqdm

    return tqdm(chunks, total=total, desc="softmax basis", unit="chunk", leave=False)


def _check_directions(singular_values: Float[Tensor, " rank"], weight: Tensor) -> None:
    """Raise ValueError if a direction is no larger than what rounding makes of nothing.

    Entries of root mean square r that are rounded to a relative eps are off by a matrix whose norm is about
    eps r (sqrt(vocabulary) + sqrt(width)); and squaring the weight hides what is under sqrt(width eps64) of its norm.
    """
    if not len(singular_values):
        return
    rms = torch.stack([rows.double().square().sum() for rows in torch.split(weight, _CHUNK)]).sum() / weight.numel()
    stored = torch.finfo(weight.dtype).eps * rms.sqrt() * sum(math.sqrt(side) for side in weight.shape)
    worked = math.sqrt(weight.shape[1] * torch.finfo(torch.float64).eps) * singular_values[0]
    meant = int((singular_values > torch.maximum(stored, worked)).sum())
    if meant < len(singular_values):
        raise ValueError(
            f"rank must be at most {meant}, got {len(singular_values)}: the weight's further directions are no larger "
            f"than rounding to {weight.dtype} makes them, and prove nothing"
        )


def _checked_rank(weight: Tensor, rank: object) -> int:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            "weight must be a floating-point matrix [vocabulary, width], got "
            f"{weight.dtype} of shape {tuple(weight.shape)}; for a quantised or adapted one use SoftmaxBasis.from_model"
        )
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, got NaN or infinite entries")
    return check_int("rank", rank, minimum=0, maximum=min(weight.shape))
