r"""The column space of a model's output embedding, cut to its leading directions.

A softmax model's logits are W h with W [V, d] and d much smaller than V. Where the hidden state h minimises the
cross-entropy against a true distribution p*, the gradient W^T (p* - p) vanishes: the model's error is orthogonal to
every column of W, hence to every combination W v of them. A basis is V of c such columns, those with the most energy:

    factors = W [v_1 ... v_c] / rms,    v_k the leading eigenvectors of W^T W = sum over chunks of W_chunk^T W_chunk

Each column lies in the column space of W to rounding, whatever the error of v_k: an inaccurate decomposition can only
choose weaker directions, never false ones. Columns are scaled to root mean square 1, which changes no constraint.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_longtrunc.arguments import check_float, check_int
from hf_longtrunc.saving import load_folder, save_folder

if TYPE_CHECKING:
    import os

    from jaxtyping import Float

# Rows of the output embedding that are in float64 at one time.
_CHUNK = 16384
_KIND = "softmax_basis"


@dataclass(frozen=True, eq=False)
class SoftmaxBasis:
    """The leading `rank` directions of a model's output embedding, for basis-aware truncation.

    Examples:
        >>> basis = SoftmaxBasis.from_model(model, rank=8)
        >>> basis.factors.shape
        torch.Size([96, 8])

    Attributes:
        factors: [vocabulary, rank], float64: the output embedding times its leading right singular vectors, each
            column scaled to root mean square 1, the leading one first.
        singular_values: [rank], of the directions, largest first.
        weight_hash: SHA-256 of the weights it was made from: a basis says nothing about any other weights.
        softcap: the cap c of a head that returns c * tanh(logits / c), None for a plain head.

    A final RMSNorm holds h on an ellipsoid; that the gradient vanishes across it too is an assumption.

    Raises:
        TypeError, ValueError: factors or singular values of another dtype or shape, or not finite.

    Source: Finlayson et al. 2023, "Closing the Curious Case of Neural Text Degeneration", arXiv 2310.01693, section 4.
    Deviations: the columns' scale; `softcap` is not in the paper.
    """

    factors: Float[Tensor, "vocab rank"]
    singular_values: Float[Tensor, " rank"]
    weight_hash: str
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
    def from_model(cls, model: Any, rank: int = 20) -> SoftmaxBasis:
        """Make the basis of the output embedding of `model`, a transformers language model or a wrapper of one.

        One forward of eight tokens finds how the model turns states into logits: by a bias, a constant scale or a cap
        c * tanh(z / c); anything else is refused. An embedding that is no plain linear layer is read as f(I) - f(0).

        Raises:
            TypeError: it is no model.
            ValueError: the model has no output embedding, one with dropout that is in training mode, or logits that
                are none of the above; errors of `from_weight`.
        """
        head = _head_of(model)
        return cls.from_weight(head.weight(), rank, softcap=head.cap)

    @classmethod
    def from_weight(cls, weight: Tensor, rank: int = 20, *, softcap: float | None = None) -> SoftmaxBasis:
        """Make the basis of an output embedding [vocabulary, width], on its device.

        Args:
            weight: any floating dtype; worked on in float64, 16384 rows at a time.
            rank: how many directions, 1 to the numerical rank of `weight`; the paper uses 20.
            softcap: the cap of the logits, if the head has one.

        Raises:
            TypeError, ValueError: a weight that is no finite floating-point matrix; a rank beyond the weight's own,
                where further directions are rounding noise; another argument outside its range.

        Cost: vocabulary * width^2 multiplications and an eigendecomposition [width, width], in float64.
        """
        rank = _checked_rank(weight, rank)
        gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        for rows in torch.split(weight, _CHUNK):
            gram += rows.double().T @ rows.double()
        energies, vectors = torch.linalg.eigh(gram)
        singular_values = energies.flip(0)[:rank].clamp_min(0).sqrt()
        _check_directions(singular_values, weight)
        leading = vectors.flip(1)[:, :rank]
        factors = torch.cat([rows.double() @ leading for rows in torch.split(weight, _CHUNK)])
        rms = factors.square().mean(0).sqrt()
        return cls(factors / rms.where(rms > 0, 1), singular_values, _hash(weight), softcap)

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
        rank = check_int("rank", rank, minimum=1, maximum=self.rank)
        parts = self.factors[:, :rank].contiguous(), self.singular_values[:rank].clone()
        return SoftmaxBasis(*parts, self.weight_hash, self.softcap)

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
        save_folder(folder, _KIND, tensors, {"weight_hash": self.weight_hash, "softcap": self.softcap})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> SoftmaxBasis:
        """Read a basis that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder holds none.
            TypeError, ValueError: the files are damaged, something is missing in them, or it is no float64 basis.
        """
        shapes = {"factors": "vocab rank", "singular_values": "rank"}
        tensors, settings = load_folder(folder, _KIND, shapes, ("weight_hash", "softcap"))
        factors, values = tensors["factors"].to(device), tensors["singular_values"].to(device)
        return cls(factors, values, settings["weight_hash"], settings["softcap"])

    save, load = save_pretrained, from_pretrained  # earlier names

    def __repr__(self) -> str:
        return f"SoftmaxBasis(vocab_size={self.vocab_size}, rank={self.rank}, weight_hash={self.weight_hash[:12]!r})"


def _head_of(model: Any) -> Any:
    # Imported here: the file needs no transformers unless it is given a model.
    from hf_longtrunc.head import LanguageModelHead

    return LanguageModelHead(model)


def _hash(weight: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    for rows in torch.split(weight, _CHUNK):
        digest.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_directions(singular_values: Float[Tensor, " rank"], weight: Tensor) -> None:
    """Raise ValueError if a direction may be rounding noise."""
    rms = torch.stack([rows.double().square().sum() for rows in torch.split(weight, _CHUNK)]).sum() / weight.numel()
    # The norm of what rounding entries of root mean square r changes: about eps r (sqrt(vocabulary) + sqrt(width)).
    stored = torch.finfo(weight.dtype).eps * rms.sqrt() * sum(math.sqrt(side) for side in weight.shape)
    # Squaring the weight hides directions under sqrt(width eps64) of its norm.
    worked = math.sqrt(weight.shape[1] * torch.finfo(torch.float64).eps) * singular_values[0]
    meant = int((singular_values > torch.maximum(stored, worked)).sum())
    if meant < len(singular_values):
        raise ValueError(
            f"rank must be at most {meant}, got {len(singular_values)}: the weight's further directions are no larger "
            f"than rounding to {weight.dtype} makes them, and prove nothing"
        )


def _checked_rank(weight: Tensor, rank: object) -> int:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor [vocabulary, width], got {type(weight).__name__}")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            "weight must be a floating-point matrix [vocabulary, width], got "
            f"{weight.dtype} of shape {tuple(weight.shape)}; for a quantised or adapted one use SoftmaxBasis.from_model"
        )
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, got NaN or infinite entries")
    return check_int("rank", rank, minimum=1, maximum=min(weight.shape))
