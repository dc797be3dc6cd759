"""CREAM in some minutes on a CPU: a toy model learns at 64 tokens, and then to read 512 without ever seeing 512.

    python recipes/cream_tiny.py --seeds 0,1

A small Llama is trained on texts of 64 tokens: 16 cards, each a key with its value, somewhere in filler, then eight
questions, each a key that its value is to follow. The RoPE base is raised for a window eight times as long
(`extend_context`, ntk), and each arm trains on texts of the same 64 tokens. Then texts of 64 to 512 tokens are asked
eight questions; a text counts if all eight answers are right. The trap is CREAM's ids given as bare `position_ids`:
transformers takes them for three packed documents.

Cost: some 10 CPU minutes a seed, 135 s an arm. Expect at 512 tokens, seeds 0 and 1: CREAM 0.78 and 0.50, PoSE 0.77
and 0.71, without training 0.07 and 0.09, contiguous 0.07 and 0.15, the trap 0.05 and 0.05.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longtrunc import CreamCollator, extend_context, verify_positions

WINDOW, FACTOR = 64, 8
CARDS = KEYS = VALUES = FILLER = 16
QUESTIONS = 8
ARMS = ("cream", "pose", "contiguous", "trap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--pretraining", type=int, default=400, help="steps at 64 tokens")
    parser.add_argument("--steps", type=int, default=1200, help="steps of each arm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--arms", default=",".join(ARMS))
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    for seed in map(int, arguments.seeds.split(",")):
        console.print(f"seed {seed}: texts whose eight answers are right at 64, 128, 256, 512 tokens, and CPU seconds")
        since = time.process_time()
        torch.manual_seed(seed)
        model = LlamaForCausalLM(toy_llama())
        train(model, arguments.pretraining, arguments.batch, torch.Generator().manual_seed(seed))
        report(console, "pretrained", model, since)
        extend_context(model, FACTOR, "ntk")
        report(console, "ntk, no training", model, time.process_time())
        for arm in arguments.arms.split(","):
            since = time.process_time()
            report(console, f"ntk + {arm}", trained(model, arm, seed, arguments), since)


def trained(model: Any, arm: str, seed: int, arguments: argparse.Namespace) -> Any:
    """Return a copy of the model, trained on texts of the window's length with an arm's positions."""
    model = copy.deepcopy(model)
    collator = CreamCollator(stack, WINDOW, FACTOR, "cream" if arm == "trap" else arm, seed).attach(model)
    verify_positions(model)
    generator = torch.Generator().manual_seed(1000 + seed)
    if arm == "trap":
        collator.detach()
        train(model, arguments.steps, arguments.batch, generator, lambda rows: bare(collator, rows))
    else:
        train(model, arguments.steps, arguments.batch, generator, collator)
        collator.detach()
    return model


def stack(rows: Any) -> dict[str, Tensor]:
    batch = torch.stack(list(rows))
    return {"input_ids": batch[:, 0], "labels": batch[:, 1]}


def bare(collator: CreamCollator, rows: Any) -> dict[str, Tensor]:
    """Give CREAM's ids as position_ids, and no mask: what one must not do."""
    batch = stack(rows)
    return {**batch, "position_ids": collator.rope_ids(batch)}


def train(model: Any, steps: int, batch: int, generator: torch.Generator, collate: Any = stack) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = model(**collate(texts(batch, WINDOW, QUESTIONS, generator)), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Any, length: int) -> float:
    model.eval()
    batch = stack(texts(256, length, QUESTIONS, torch.Generator().manual_seed(7777)))
    answers = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    return float(((answers == labels) | (labels == -100)).all(-1).float().mean())


def report(console: Console, name: str, model: Any, since: float) -> None:
    seconds = time.process_time() - since
    scores = "  ".join(f"{accuracy(model, length):.2f}" for length in (64, 128, 256, 512))
    console.print(f"  {name:<18} {scores}  {seconds:5.0f}")


def texts(rows: int, length: int, questions: int, generator: torch.Generator) -> list[Tensor]:
    """Draw texts, each [2, length]: tokens, and labels that are -100 but for the answers."""
    return [text(length, questions, generator) for _ in range(rows)]


def text(length: int, questions: int, generator: torch.Generator) -> Tensor:
    def draw(n: int, of: int) -> Tensor:
        return torch.randperm(of, generator=generator)[:n]

    keys, values, asked = draw(CARDS, KEYS), draw(CARDS, VALUES), draw(questions, CARDS)
    body = length - 2 * questions
    first_key = FILLER + KEYS * VALUES
    tokens = torch.randint(FILLER, (length,), generator=generator)
    tokens[draw(CARDS, body)] = FILLER + keys * VALUES + values  # a card is one token, of one key and one value
    tokens[body::2], tokens[body + 1 :: 2] = first_key + keys[asked], first_key + KEYS + values[asked]
    labels = torch.where(torch.arange(length) % 2 == (body + 1) % 2, tokens, -100)
    labels[:body] = -100
    return torch.stack([tokens, labels])


def toy_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=FILLER + KEYS * VALUES + KEYS + VALUES,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
    )


if __name__ == "__main__":
    main()
