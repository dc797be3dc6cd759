r"""Plug-in external memory adaptation (PEMA), in pure torch.

The memory is a table of contexts and next tokens: f, the input of a model's output embedding W after a context c, and
the token y that followed. One bottleneck A [rank, width] serves two up-projections [width, rank]:

    stage 1    B_rct = the one for which some A minimises mean (B_rct A f - f)^2 over the memory
    stage 2    min over A, B_pd of  kappa mean (B_rct A f - f)^2 + (1 - kappa) CE(W B_pd A f, y)
    use        P = lambda P_PEMA + (1 - lambda) P_LM,    P_PEMA = softmax(W B_pd A f)

Stage 1 needs no steps: it is the best rank-r approximation of the table (Eckart and Young 1936), spanned by the
leading eigenvectors of the sum of f f^T, so one pass over the memory gives the exact optimum with orthonormal columns.
Stage 2 starts from a new Gaussian A and B_pd = 0, a uniform P_PEMA, and leaves B_rct as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_longtrunc.arguments import check_float, check_fraction, check_int, check_tensor
from hf_longtrunc.saving import load_folder, save_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from jaxtyping import Float, Int

# Rows of the memory that are in float64 at one time.
_CHUNK = 16384
_MEMORY, _ADAPTER = "pema_memory", "pema_adapter"
_SETTINGS = ("hidden_size", "rank", "vocab_size")


@dataclass(frozen=True, eq=False)
class PEMAMemory:
    """PEMA's training data: a model's hidden states, and the tokens that followed.

    Examples:
        >>> PEMAMemory(hidden=torch.randn(3, 32), tokens=torch.tensor([4, 5, 6]), vocab_size=96)
        PEMAMemory(3 rows of width 32, vocab_size=96)

    Attributes:
        hidden: [rows, width], the inputs of the model's output embedding, any floating dtype.
        tokens: [rows], int64, the next tokens.
        vocab_size: width of that model's logits.

    `build_pema_memory` makes one. `from_pretrained` maps a saved one, so it may be larger than the machine's memory:
    training reads only the rows of a batch.
    """

    hidden: Tensor
    tokens: Tensor
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("hidden", "tokens"):
            check_tensor(name, getattr(self, name))
        if self.hidden.ndim != 2 or not self.hidden.is_floating_point() or self.tokens.shape != self.hidden.shape[:1]:
            raise ValueError(
                "hidden must be a floating-point matrix [rows, width] and tokens [rows], got shapes "
                f"{tuple(self.hidden.shape)} ({self.hidden.dtype}) and {tuple(self.tokens.shape)}"
            )
        if self.tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64, got {self.tokens.dtype}")
        object.__setattr__(self, "vocab_size", check_int("vocab_size", self.vocab_size, minimum=1))
        if not len(self.tokens):
            raise ValueError("a memory needs at least one row: no token was marked as a target")
        if not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < self.vocab_size:
            raise ValueError(
                f"tokens must lie in 0..{self.vocab_size - 1}, the model's vocabulary, got "
                f"{int(self.tokens.min())}..{int(self.tokens.max())}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the memory into a folder, as a safetensors file with a checksum."""
        tensors = {"hidden": self.hidden, "tokens": self.tokens}
        save_folder(folder, _MEMORY, tensors, {"vocab_size": self.vocab_size})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> PEMAMemory:
        """Map a memory that `save_pretrained` wrote, after one pass for the checksum.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError: the files are damaged, or something is missing in them or of another shape.
        """
        tensors, settings = load_folder(folder, _MEMORY, {"hidden": "rows width", "tokens": "rows"}, ("vocab_size",))
        return cls(tensors["hidden"], tensors["tokens"], settings["vocab_size"])

    save, load = save_pretrained, from_pretrained  # earlier names

    def __repr__(self) -> str:
        return f"PEMAMemory({len(self)} rows of width {self.hidden.shape[1]}, vocab_size={self.vocab_size})"


class PEMAAdapter(nn.Module):
    """The external part of PEMA: B_pd A f replaces f before the output embedding.

    Examples:
        >>> adapter = PEMAAdapter(hidden_size=32, rank=8, vocab_size=96)
        >>> adapter(torch.randn(2, 32)).shape
        torch.Size([2, 32])

    Args:
        hidden_size: width of f.
        rank: of the bottleneck, at most `hidden_size`; the paper uses 512.
        vocab_size: width of the logits of the model that it was made for.
        generator: draws A, N(0, 1 / hidden_size); None takes torch's.

    Parameters A [rank, width] and B_pd [width, rank], and the buffer B_rct [width, rank], fp32.
    """

    def __init__(
        self, hidden_size: int, rank: int, vocab_size: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        hidden_size = check_int("hidden_size", hidden_size, minimum=1)
        rank = check_int("rank", rank, minimum=1, maximum=hidden_size)
        self.hidden_size, self.rank = hidden_size, rank
        self.vocab_size = check_int("vocab_size", vocab_size, minimum=1)
        self.A = nn.Parameter(torch.randn(rank, hidden_size, generator=generator) / math.sqrt(hidden_size))
        self.B_pd = nn.Parameter(torch.zeros(hidden_size, rank))
        self.B_rct: Tensor
        self.register_buffer("B_rct", torch.zeros(hidden_size, rank))

    def forward(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Return B_pd A f, in fp32, for the output embedding."""
        return F.linear(self._bottleneck(hidden), self.B_pd)

    def reconstruct(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Return B_rct A f."""
        return F.linear(self._bottleneck(hidden), self.B_rct)

    def _bottleneck(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.A), self.A)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter into a folder, as a safetensors file with a checksum."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        save_folder(folder, _ADAPTER, self.state_dict(), settings)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> PEMAAdapter:
        """Read an adapter that `save_pretrained` wrote, in eval mode.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError: the files are damaged, or something is missing in them or of another shape.
        """
        shapes = {"A": "rank width", "B_pd": "width rank", "B_rct": "width rank"}
        tensors, settings = load_folder(folder, _ADAPTER, shapes, _SETTINGS)
        adapter = cls(**{name: settings[name] for name in _SETTINGS})
        try:
            adapter.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder} holds tensors that do not fit its settings {settings}: {error}") from None
        return adapter.to(device).eval()

    save, load = save_pretrained, from_pretrained  # earlier names

    def __repr__(self) -> str:
        return f"PEMAAdapter(hidden_size={self.hidden_size}, rank={self.rank}, vocab_size={self.vocab_size})"


def reconstruction_basis(hidden: Float[Tensor, "rows width"], rank: int) -> Float[Tensor, "width rank"]:
    """Return B_rct of stage 1: orthonormal columns V that minimise the mean of (V V^T f - f)^2 over the rows."""
    gram = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for rows in torch.split(hidden, _CHUNK):
        gram += rows.double().T @ rows.double()
    directions: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return directions[:, :rank].float().contiguous()


def pema_loss(
    adapter: PEMAAdapter,
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "rows width"],
    tokens: Int[Tensor, " rows"],
    kappa: float,
) -> Float[Tensor, ""]:
    """Return the loss of stage 2: kappa * MSE(B_rct A f, f) + (1 - kappa) * CE(head(B_pd A f), y), in nats."""
    reconstruction = F.mse_loss(adapter.reconstruct(hidden), hidden.to(adapter.A))
    return kappa * reconstruction + (1 - kappa) * F.cross_entropy(head(adapter(hidden)), tokens)


def fit_adapter(
    adapter: PEMAAdapter,
    memory: PEMAMemory,
    head: Callable[[Tensor], Tensor],
    *,
    kappa: float = 0.2,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Run both stages on `adapter`, in place, and return the mean loss of every epoch of stage 2; see `train_pema`."""
    kappa, learning_rate = check_fraction("kappa", kappa), check_float("learning_rate", learning_rate, gt=0)
    epochs, batch_size = check_int("epochs", epochs, minimum=1), check_int("batch_size", batch_size, minimum=1)
    parameters, device = list(adapter.parameters()), adapter.A.device
    adapter.B_rct.copy_(reconstruction_basis(memory.hidden, adapter.rank))
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(memory) // batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    with tqdm(total=steps, desc="PEMA", unit="step", leave=False, disable=not progress) as bar:
        for _ in range(epochs):
            total = 0.0
            for rows in torch.split(torch.randperm(len(memory), generator=generator), batch_size):
                batch = memory.hidden[rows].to(device), memory.tokens[rows].to(device)
                loss = pema_loss(adapter, head, *batch, kappa)
                optimizer.zero_grad()
                loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
                bar.update()
            losses.append(total / len(memory))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


@dataclass(frozen=True, kw_only=True)
class GradualUnrolling:
    """PEMA's share of a distribution, falling along the text: lambda_i = (lambda_max * (1 - i / source_length))^2.

    Examples:
        >>> GradualUnrolling(source_length=4, prompt_length=10).shares(width=12, rows=1)
        tensor([0.2025])

    i counts the generated tokens from 0; past the source's length the share is 0. It follows from the width of
    `input_ids`, so there is no count to keep.

    Args:
        source_length: tokens of the text that is rewritten, without instructions and padding; or one for each prompt.
        prompt_length: columns of `generate`'s `input_ids`, padding and instructions included.
        lambda_max: in [0, 1]; the paper uses 0.9.

    Source: Kim et al. 2024, section 3 (gradual unrolling). Deviation: the share stays at 0 where the formula's square
    would rise again.
    """

    source_length: int | Sequence[int]
    prompt_length: int
    lambda_max: float = 0.9

    def __post_init__(self) -> None:
        lengths = self._lengths()
        if not lengths:
            raise ValueError("source_length must name the tokens of at least one prompt, got none")
        for length in lengths:
            check_int("source_length", length, minimum=1)
        check_int("prompt_length", self.prompt_length, minimum=1)
        check_fraction("lambda_max", self.lambda_max)

    def shares(self, width: int, rows: int) -> Float[Tensor, " rows"]:
        """Return lambda_i for each of `rows` rows of `input_ids`, now `width` columns; a prompt's rows are adjacent."""
        lengths = self._lengths()
        if width < self.prompt_length:
            raise ValueError(
                f"prompt_length is {self.prompt_length}, but input_ids have {width} columns: pass the "
                "input_ids.shape[1] that generate() is given, padding included"
            )
        if len(lengths) > 1 and rows % len(lengths):
            raise ValueError(
                f"source_length names {len(lengths)} prompts, which {rows} rows cannot belong to in equal shares: give "
                "one length for each prompt of the batch"
            )
        left = 1 - (width - self.prompt_length) / torch.tensor(lengths, dtype=torch.float32)
        return (self.lambda_max * left.clamp_min(0)).square().repeat_interleave(rows // len(lengths))

    def _lengths(self) -> list[int]:
        return list(self.source_length) if isinstance(self.source_length, Iterable) else [self.source_length]


def interpolate(
    pema_logits: Float[Tensor, "rows vocab"],
    scores: Float[Tensor, "rows vocab"],
    weight: Float[Tensor, " rows"],
) -> Float[Tensor, "rows vocab"]:
    """Return log(lambda P_PEMA + (1 - lambda) P_LM), fp32, lambda = `weight`; a token at -inf in `scores` stays so."""
    log_lm = scores.float().log_softmax(-1)
    log_pema = pema_logits.float().masked_fill(scores == -math.inf, -math.inf).log_softmax(-1)
    weight = weight.to(log_lm)[:, None]
    return torch.logaddexp(log_pema + weight.log(), log_lm + (-weight).log1p())
