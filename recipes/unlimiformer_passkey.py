"""A model trained on 32 tokens reads 65,536: passkeys under Unlimiformer against truncation.

    python recipes/unlimiformer_passkey.py

A BART of one encoder and one decoder layer learns, on texts of 32 tokens, to say the key that stands somewhere among
filler: three digits, units, tens and hundreds being different tokens. Then it is asked for keys anywhere in much longer
texts, unchanged: cut to its 32 positions, as any BART would be, and under Unlimiformer, each head attending to its 32,
8 or 1 best states.

Cost: about a minute on one CPU core, most of it for encoding 65,536 tokens forty times for each k. Expect 1.00 under
Unlimiformer at every length and k, and 0.00 for truncation, which never sees the key.
"""

from __future__ import annotations

import time
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from hf_longtrunc import Unlimiformer

PAD, BOS, EOS = range(3)
KEY = 3  # digits, each place with ten tokens of its own
FILLER = range(3 + 10 * KEY, 100)
TRAINED = 32  # tokens


class Texts(NamedTuple):
    """Texts [rows, tokens] and their keys [rows, KEY + 1], an end of sequence behind."""

    input_ids: Tensor
    labels: Tensor


def passkey_texts(rows: int, tokens: int, generator: torch.Generator) -> Texts:
    """Return texts of filler that hold a key at a random place."""
    ids = torch.randint(FILLER.start, FILLER.stop, (rows, tokens), generator=generator)
    key = 3 + torch.randint(0, 10, (rows, KEY), generator=generator) + 10 * torch.arange(KEY)
    place = torch.randint(0, tokens - KEY + 1, (rows, 1), generator=generator) + torch.arange(KEY)
    ids.scatter_(1, place, key)
    return Texts(ids, torch.cat([key, torch.full((rows, 1), EOS)], dim=1))


def tiny_bart(layers: int = 1) -> BartForConditionalGeneration:
    """Return an untrained BART of 32 positions."""
    config = BartConfig(
        vocab_size=FILLER.stop, d_model=64, max_position_embeddings=TRAINED, encoder_layers=layers,
        decoder_layers=layers, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, init_std=0.1, dropout=0.0, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        decoder_start_token_id=BOS, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def train(model: BartForConditionalGeneration, steps: int, generator: torch.Generator) -> float:
    """Train on texts of 32 tokens and return the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    model.train()
    for _ in track(range(steps), description="training"):
        texts = passkey_texts(64, TRAINED, generator)
        loss = model(input_ids=texts.input_ids, labels=texts.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return loss.item()


def accuracy(model: BartForConditionalGeneration, texts: Texts) -> float:
    """Return the share of texts whose whole key is said."""
    said = model.generate(texts.input_ids, max_new_tokens=KEY, do_sample=False)
    return float((said[:, 1 : KEY + 1] == texts.labels[:, :KEY]).all(1).double().mean())


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
        found = [accuracy(model, texts._replace(input_ids=texts.input_ids[:, :TRAINED]))]
        for k in ks:
            with Unlimiformer(top_k=k, encode_batch=512)(model):
                parts = [Texts(*some) for some in zip(*(part.split(4) for part in texts), strict=True)]
                found.append(sum(accuracy(model, some) * len(some.labels) for some in parts) / keys)
        table.add_row(f"{length:,}", *(f"{share:.2f}" for share in found))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
