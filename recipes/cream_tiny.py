"""CREAM in some minutes on a CPU: a toy model learns at 64 tokens, and then to read 512 without ever seeing 512.

    python recipes/cream_tiny.py --seeds 0,1

A small Llama is trained on texts of 64 tokens: twelve cards, each a key with its value, somewhere in filler, then
twelve questions, each a key that its value is to follow. The RoPE base is raised for a window eight times as long
(`extend_context`, ntk), and each arm trains on texts of the same 64 tokens. Then texts of 64 to 512 tokens with
their cards in the first half are scored; a text counts if all twelve answers are right. In a last column the cards are
anywhere from 65 tokens before the questions on. The trap is CREAM's ids given as bare `position_ids`: transformers
takes them for three packed documents.

The base is 50: as in models of real size, the slowest wave is some times the trained window. With 10,000 six of the 16
planes hardly turn in 512 tokens, and little is left to extend.

Cost: some 2 CPU minutes a seed, 16 s an arm. Expect at 512 tokens, seeds 0 and 1: CREAM 0.93 and 1.00, PoSE 0.76
and 0.95, without training 0.00 and 0.09, contiguous 0.00 and 0.06, the trap 0.00 and 0.00; at 64 all 0.97 and more.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longtrunc import CreamCollator, extend_context, verify_positions

WINDOW, FACTOR = 64, 8
LENGTHS = 64, 128, 256, 512
FILLER, CARDS, VALUES = 16, 12, 8  # words of filler; cards, one for every key; values that a card may have
FIRST_CARD = FILLER
FIRST_KEY = FIRST_CARD + CARDS * VALUES
FIRST_VALUE = FIRST_KEY + CARDS
ARMS = ("cream", "pose", "contiguous", "trap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--pretraining", type=int, default=500, help="steps before the window is extended")
    parser.add_argument("--steps", type=int, default=500, help="steps of each arm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scored", type=int, default=256, help="texts of a figure")
    parser.add_argument("--arms", default=",".join(ARMS))
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    for seed in map(int, arguments.seeds.split(",")):
        console.print(f"seed {seed}: texts all right at {LENGTHS} tokens; at 512, cards from 65 back on; CPU seconds")
        since = time.process_time()
        torch.manual_seed(seed)
        model = LlamaForCausalLM(toy_llama())
        train(model, arguments.pretraining, 1e-2, arguments.batch, torch.Generator().manual_seed(seed))
        report(console, "pretrained", model, since, arguments.scored)
        extend_context(model, FACTOR, "ntk")
        report(console, "ntk, no training", model, time.process_time(), arguments.scored)
        for arm in arguments.arms.split(","):
            since = time.process_time()
            report(console, f"ntk + {arm}", trained(model, arm, seed, arguments), since, arguments.scored)


def trained(model: Any, arm: str, seed: int, arguments: argparse.Namespace) -> Any:
    """Return a copy of the model, trained on texts of the window's length with an arm's positions."""
    model = copy.deepcopy(model)
    collator = CreamCollator(stack, WINDOW, FACTOR, scheme="cream" if arm == "trap" else arm, seed=seed)
    collator.attach(model)
    verify_positions(model)
    collate: Any = collator
    if arm == "trap":
        collator.detach()
        collate = partial(bare, collator)
    train(model, arguments.steps, 5e-3, arguments.batch, torch.Generator().manual_seed(1000 + seed), collate)
    collator.detach()
    return model


def stack(batch: Any) -> dict[str, Tensor]:
    return {"input_ids": batch[:, 0], "labels": batch[:, 1]}


def bare(collator: CreamCollator, rows: Any) -> dict[str, Tensor]:
    """Give CREAM's ids as position_ids, and no mask: what one must not do."""
    batch = stack(rows)
    return {**batch, "position_ids": collator.rope_ids(batch)}


def train(model: Any, steps: int, rate: float, batch: int, generator: torch.Generator, collate: Any = stack) -> None:
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
def accuracy(model: Any, length: int, room: int, scored: int) -> float:
    """Return the share of texts with all answers right; the cards are in the first `room` tokens."""
    model.eval()
    right = []
    generator = torch.Generator().manual_seed(7777)
    for start in range(0, scored, 64):
        batch = stack(texts(min(64, scored - start), length, generator, room))
        answers = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        right.append(((answers == labels) | (labels == -100)).all(-1))
    return float(torch.cat(right).float().mean())


def report(console: Console, name: str, model: Any, since: float, scored: int) -> None:
    seconds = time.process_time() - since
    scores = [accuracy(model, length, length // 2, scored) for length in LENGTHS]
    scores.append(accuracy(model, LENGTHS[-1], LENGTHS[-1] - 2 * CARDS - WINDOW, scored))
    console.print(f"  {name:<18} {'  '.join(f'{score:.2f}' for score in scores)}  {seconds:5.0f}")


def texts(rows: int, length: int, generator: torch.Generator, room: int | None = None) -> Tensor:
    """Draw texts [rows, 2, length]: tokens, and labels that are -100 but for the answers.

    The cards stand in the first `room` tokens; None: anywhere before the questions.
    """

    def shuffled(n: int) -> Tensor:
        return torch.rand(rows, n, generator=generator).argsort(-1)

    body = length - 2 * CARDS  # the rest are the questions, each of a key and its value
    places = shuffled(room or body)[:, :CARDS]
    values = torch.randint(VALUES, (rows, CARDS), generator=generator)
    asked = shuffled(CARDS)
    tokens = torch.randint(FILLER, (rows, length), generator=generator)
    # Card number i has key i. It is one token, of its key and its value.
    tokens.scatter_(1, places, FIRST_CARD + torch.arange(CARDS) * VALUES + values)
    tokens[:, body::2] = FIRST_KEY + asked
    tokens[:, body + 1 :: 2] = FIRST_VALUE + values.gather(1, asked)
    labels = torch.full_like(tokens, -100)
    labels[:, body + 1 :: 2] = tokens[:, body + 1 :: 2]
    return torch.stack([tokens, labels], dim=1)


def toy_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=FIRST_VALUE + VALUES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
    )


if __name__ == "__main__":
    main()
