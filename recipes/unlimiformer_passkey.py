"""A model trained on 32 tokens reads 65,536: passkeys under Unlimiformer against truncation.

    python recipes/unlimiformer_passkey.py

A BART of one encoder and one decoder layer learns, on texts of 32 tokens, to say the key that stands somewhere among
filler: three digits, units, tens and hundreds being different tokens. Then it is asked for keys anywhere in much longer
texts, unchanged: cut to its 32 positions, as any BART would be, and under Unlimiformer, each head attending to its 32,
8 or 1 best states. Half of the training steps skip the encoder's layer (layerdrop): with it alone the model learns to
write the key into every state of its window, and fails in windows without a key.

Cost: a minute on one CPU core. Expect 1.00 under Unlimiformer at every length and k, and 0.00 for truncation, which
never sees the key.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from hf_longtrunc import Unlimiformer

if TYPE_CHECKING:
    from collections.abc import Sequence

PAD, BOS, EOS = range(3)
KEY = 3  # digits, each place with ten tokens of its own
FILLER = range(3 + 10 * KEY, 100)
TRAINED = 32  # tokens
_RATE = 8e-3


class Texts(NamedTuple):
    """Texts [rows, tokens] and their keys [rows, KEY + 1], with an end of sequence."""

    input_ids: Tensor
    labels: Tensor


def passkey_texts(rows: int, tokens: int, generator: torch.Generator) -> Texts:
    """Return texts of filler that hold a key at a random place."""
    ids = torch.randint(FILLER.start, FILLER.stop, (rows, tokens), generator=generator)
    key = 3 + torch.randint(0, 10, (rows, KEY), generator=generator) + 10 * torch.arange(KEY)
    place = torch.randint(0, tokens - KEY + 1, (rows, 1), generator=generator) + torch.arange(KEY)
    ids.scatter_(1, place, key)
    return Texts(ids, torch.cat([key, torch.full((rows, 1), EOS)], dim=1))


def tiny_bart() -> Any:
    """Return an untrained BART of 32 positions."""
    config = BartConfig(
        vocab_size=FILLER.stop, d_model=64, max_position_embeddings=TRAINED, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, init_std=0.1, encoder_layerdrop=0.5, dropout=0.0, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS, decoder_start_token_id=BOS, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def train(model: Any, steps: int, generator: torch.Generator) -> float:
    """Train on texts of 32 tokens and return the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    model.train()
    for _ in track(range(steps), description="training"):
        texts = passkey_texts(64, TRAINED, generator)
        loss = model(input_ids=texts.input_ids, labels=texts.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return float(loss.detach())


def accuracy(model: Any, texts: Texts, top_k: Sequence[int]) -> list[float]:
    """Return the share of texts with a correct key, for each top_k; the texts are encoded once, four at a time."""
    said: dict[int, list[Tensor]] = {k: [] for k in top_k}
    for ids in torch.split(texts.input_ids, 4):
        encoded = None
        for k in top_k:
            with Unlimiformer(top_k=k, encode_batch=512)(model), torch.no_grad():
                encoded = encoded or model.get_encoder()(input_ids=ids)
                mask = torch.ones_like(ids)
                said[k].append(model.generate(encoder_outputs=encoded, attention_mask=mask, max_new_tokens=KEY))
    right = [torch.cat(said[k])[:, 1 : KEY + 1] == texts.labels[:, :KEY] for k in top_k]
    return [share.all(1).double().mean().item() for share in right]


def main(
    lengths: Annotated[str, typer.Option(help="Tokens of the texts.")] = "32,1024,65536",
    top_k: Annotated[str, typer.Option(help="States that a head attends to.")] = "32,8,1",
    keys: Annotated[int, typer.Option(help="Texts per length.")] = 40,
    steps: Annotated[int, typer.Option(help="Training steps, 64 texts each.")] = 250,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    generator, console, model = torch.Generator().manual_seed(seed), Console(), tiny_bart()
    since = time.perf_counter()
    loss = train(model, steps, generator)
    seconds = time.perf_counter() - since
    console.print(f"trained {steps} steps at {TRAINED} tokens in {seconds:.0f} s, loss {loss:.4f}")
    ks = [int(k) for k in top_k.split(",")]
    table = Table("tokens", "truncated to 32", *(f"Unlimiformer, k = {k}" for k in ks), title="passkeys found")
    for length in (int(length) for length in lengths.split(",")):
        texts = passkey_texts(keys, length, generator)
        cut = texts._replace(input_ids=texts.input_ids[:, :TRAINED])
        found = [*accuracy(model, cut, [TRAINED]), *accuracy(model, texts, ks)]
        table.add_row(f"{length:,}", *(f"{share:.2f}" for share in found))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
