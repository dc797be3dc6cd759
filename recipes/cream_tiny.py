"""CREAM in some minutes on a CPU: a toy model learns at 64 tokens, and then to read 512 without ever seeing 512.

    python recipes/cream_tiny.py --seeds 0,1

A small Llama is trained on texts of 64 tokens: keys with their values somewhere in filler, then questions, each a key
that is to be followed by its value. Its RoPE base is raised for a window eight times as long (`extend_context`, ntk),
and each arm trains 300 steps more on texts of the same 64 tokens. Answers are then asked for in texts of 64 to 512
tokens. The trap is CREAM's ids given as bare `position_ids`: transformers takes them for three packed documents.

COST_AND_RESULT
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longtrunc import CreamCollator, extend_context, verify_positions

WINDOW, FACTOR = 64, 8
PAIRS, QUESTIONS = 16, 8
KEYS = VALUES = 32
FILLER = 16
ARMS = ("cream", "pose", "random", "contiguous", "trap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--pretraining", type=int, default=1500, help="steps at 64 tokens")
    parser.add_argument("--steps", type=int, default=300, help="steps of each arm")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--arms", default=",".join(ARMS))
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    for seed in map(int, arguments.seeds.split(",")):
        since = time.process_time()
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(toy_llama())
        train(model, arguments.pretraining, arguments.batch, 2e-3, generator)
        table = Table(title=f"seed {seed}: answers that are right, by length of the text", box=SIMPLE_HEAD)
        for heading in ("arm", "64", "128", "256", "512", "CPU s"):
            table.add_column(heading, justify="left" if heading == "arm" else "right")
        add_row(table, "pretrained", model, seed, since)
        extend_context(model, FACTOR, "ntk")
        add_row(table, "ntk, no training", model, seed, time.process_time())
        for arm in arguments.arms.split(","):
            since = time.process_time()
            add_row(table, f"ntk + {arm}", trained(model, arm, seed, arguments), seed, since)
        console.print(table)


def trained(model: Any, arm: str, seed: int, arguments: argparse.Namespace) -> Any:
    """Return a copy of the model, trained on texts of the window's length with an arm's positions."""
    model = copy.deepcopy(model)
    collator = CreamCollator(stack, WINDOW, FACTOR, "cream" if arm == "trap" else arm, seed).attach(model)
    verify_positions(model)
    generator = torch.Generator().manual_seed(1000 + seed)
    if arm == "trap":
        collator.detach()
        train(model, arguments.steps, arguments.batch, 1e-3, generator, lambda rows: bare(collator, rows))
    else:
        train(model, arguments.steps, arguments.batch, 1e-3, generator, collator)
        collator.detach()
    return model


def stack(rows: Any) -> dict[str, Tensor]:
    batch = torch.stack(list(rows))
    return {"input_ids": batch[:, 0], "labels": batch[:, 1]}


def bare(collator: CreamCollator, rows: Any) -> dict[str, Tensor]:
    """Give CREAM's ids as position_ids, and no mask: what one must not do."""
    batch = stack(rows)
    return {**batch, "position_ids": collator.rope_ids(batch)}


def train(model: Any, steps: int, batch: int, rate: float, generator: torch.Generator, collate: Any = stack) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = model(**collate(texts(batch, WINDOW, generator)), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Any, length: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(7777 + seed)
    model.eval()
    batch = stack(texts(128, length, generator))
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    asked = batch["labels"][:, 1:] != -100
    return float((logits.argmax(-1) == batch["labels"][:, 1:])[asked].float().mean())


def add_row(table: Table, name: str, model: Any, seed: int, since: float) -> None:
    seconds = time.process_time() - since
    scores = [f"{accuracy(model, length, seed):.2f}" for length in (64, 128, 256, 512)]
    table.add_row(name, *scores, f"{seconds:.0f}")


def texts(rows: int, length: int, generator: torch.Generator) -> list[Tensor]:
    """Draw texts, each [2, length]: tokens, and labels that are -100 but for the answers."""
    return [text(length, generator) for _ in range(rows)]


def text(length: int, generator: torch.Generator) -> Tensor:
    def draw(n: int, of: int) -> Tensor:
        return torch.randperm(of, generator=generator)[:n]

    keys, values = FILLER + draw(PAIRS, KEYS), FILLER + KEYS + draw(PAIRS, VALUES)
    body = length - 2 * QUESTIONS
    tokens = torch.randint(FILLER, (length,), generator=generator)
    # A pair's first token goes to a place out of body - PAIRS, moved on by the pairs before it: none overlap.
    places = draw(PAIRS, body - PAIRS).sort().values + torch.arange(PAIRS)
    asked = draw(QUESTIONS, PAIRS)
    tokens[places], tokens[places + 1] = keys, values
    tokens[body::2], tokens[body + 1 :: 2] = keys[asked], values[asked]
    labels = torch.full_like(tokens, -100)
    labels[body + 1 :: 2] = values[asked]
    return torch.stack([tokens, labels])


def toy_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=FILLER + KEYS + VALUES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        bos_token_id=None,
        eos_token_id=None,
    )


if __name__ == "__main__":
    main()
