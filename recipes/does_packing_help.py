"""Does it help? Best-fit rows, concatenate-and-cut and padding at equal tokens, from the same beginnings.

    python recipes/does_packing_help.py --novels bleak_house.txt moby_dick.txt sherlock_holmes.txt

A small Llama (0.9 M parameters, rows of 256 tokens) is trained on functions of Python's standard library and on scenes
of novels, one pass over the same tokens in every arm. The last novel, and every tenth file of the library, are held
out; of their documents the first 256 tokens are scored, each document alone, behind a token that begins every document
in training too. The arms:

    cut       documents one after another, cut every 256 tokens; a row is read from its beginning, across documents
    best-fit  `pack()`: whole documents, apart
    padding   documents in random batches, apart, longer ones in pieces: computed by the collator without the places
              that padding takes, which changes no loss and no gradient

Padding sees the same pieces as best fit in other batches: their difference is what chance does.

Intervals are of 95 %, over documents and seeds drawn anew together, of paired differences. Every run is a line in
OUT/runs.jsonl as it ends, and runs that are there are not repeated.

What came with four novels: the first 15 tokens of documents 0.6 nats better packed than cut, later ones some hundredths
worse, all of them alike (docs/packing.md). Some 60 CPU seconds a run on one core, three arms a seed: a thousandth of
the size at which the paper measured its gains.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import textwrap
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_longtrunc import BestFitPackingCollator, pack
from hf_longtrunc.evaluation import append_records, read_records

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARMS = ("cut", "best-fit", "padding")
KINDS = ("code", "prose")
BOUNDS = (1, 16, 64, 128, 256)  # positions of the scored tokens; the first is given
BEGIN, END = 0, 1
VOCABULARY, ROWS = 1024, 4  # rows a step
Document = dict[str, list[int]]


@dataclass(frozen=True)
class Run:
    """One training: what it cost, and of every held-out document the loss summed between the `BOUNDS`."""

    arm: str
    seed: int
    steps: int
    tokens: int
    learned: int
    cpu_seconds: float
    code: list[list[float]]
    prose: list[list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, nargs="*", default=[], help="text files; the last is held out")
    parser.add_argument("--tokens", type=int, default=400_000, help="of training, half code and half prose")
    parser.add_argument("--held-out", type=int, default=200, help="documents scored of each kind")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("does_packing_help"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training, held_out = corpora(arguments.novels, arguments.tokens, arguments.held_out)
    done = read_records(arguments.out / "runs.jsonl", Run)
    for seed in map(int, arguments.seeds.split(",")):
        for arm in ARMS:
            if (arm, seed) not in {(run.arm, run.seed) for run in done}:
                done.append(trained(arm, seed, training, held_out, arguments.hidden, arguments.out))
                append_records(arguments.out / "runs.jsonl", done[-1:])
    for table in tables(done, training, held_out):
        Console(width=120).print(table)


def trained(
    arm: str, seed: int, documents: list[Document], held_out: dict[str, list[Document]], hidden: int, out: Path
) -> Run:
    since = time.process_time()
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(llama(hidden))
    rows = rows_of(arm, documents, seed)
    steps = -(-len(rows_of("cut", documents, seed)) // ROWS)
    settings = TrainingArguments(
        str(out), per_device_train_batch_size=-(-len(rows) // steps), num_train_epochs=1, learning_rate=3e-3,
        lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.1, seed=seed, logging_steps=50,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    collator = Counting(BOUNDS[-1], pad_token_id=END)
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator)
    trainer.train()
    seconds = round(time.process_time() - since, 1)
    scores = {kind: losses(model.eval(), held_out[kind]) for kind in KINDS}
    return Run(arm, seed, trainer.state.global_step, collator.tokens, collator.learned, seconds, **scores)


def rows_of(arm: str, documents: list[Document], seed: int) -> Any:
    """Return an arm's examples: the collator lays packed rows out, and takes a cut row for one document."""
    if arm == "best-fit":
        return pack(documents, BOUNDS[-1], min_piece=1, seed=seed)
    if arm == "padding":
        pieces = (document["input_ids"] for document in documents)
        return [{"input_ids": ids[i : i + BOUNDS[-1]]} for ids in pieces for i in range(0, len(ids), BOUNDS[-1])]
    order = np.random.default_rng(seed).permutation(len(documents))
    stream = [token for index in order for token in documents[index]["input_ids"]]
    return [{"input_ids": stream[i : i + BOUNDS[-1]]} for i in range(0, len(stream), BOUNDS[-1])]


class Counting(BestFitPackingCollator):
    """Counts the tokens and the targets of what it has laid out."""

    tokens = learned = 0

    def __call__(self, examples: Any) -> dict[str, Any]:
        """Collate examples."""
        batch = super().__call__(examples)
        self.tokens += sum(len(example["input_ids"]) for example in examples)
        self.learned += int((batch["labels"] != -100).sum())
        return batch


@torch.no_grad()
def losses(model: Any, documents: list[Document]) -> list[list[float]]:
    """Return every document's summed loss between the `BOUNDS`, documents apart."""
    sums = []
    for document in documents:
        ids = torch.tensor([document["input_ids"][: BOUNDS[-1]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none")
        parts = [loss[first - 1 : last - 1] for first, last in pairwise(BOUNDS)]
        sums.append([round(float(part.sum()), 3) for part in parts])
    return sums


# -- documents ---------------------------------------------------------------------------------------------------------


def corpora(novels: list[Path], tokens: int, held_out: int) -> tuple[list[Document], dict[str, list[Document]]]:
    """Return the documents of training, and those held out by kind."""
    rng = np.random.default_rng(0)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = {
        "code": [text for i, file in enumerate(files) if i % 10 for text in functions(file)],
        "prose": [text for novel in novels[:-1] for text in scenes(novel, rng)],
    }
    unseen = {
        "code": [text for file in files[::10] for text in functions(file)],
        "prose": [text for novel in novels[-1:] for text in scenes(novel, rng)],
    }
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([*texts["code"], *texts["prose"]], VOCABULARY, special_tokens=["<begin>", "<end>"])
    training = []
    for kind in KINDS:
        wanted = tokens // 2
        for index in rng.permutation(len(texts[kind])).tolist():
            if wanted > 0:
                training.append(encoded(tokenizer, texts[kind][index]))
                wanted -= len(training[-1]["input_ids"])
    chosen = {kind: rng.permutation(len(unseen[kind]))[:held_out].tolist() for kind in KINDS}
    return training, {kind: [encoded(tokenizer, unseen[kind][i]) for i in chosen[kind]] for kind in KINDS}


def encoded(tokenizer: Any, text: str) -> Document:
    return {"input_ids": [BEGIN, *tokenizer.encode(text).ids, END]}


def functions(file: Path) -> list[str]:
    """Return a module's functions and methods of three lines or more, each as it stands by itself."""
    source = file.read_text(encoding="utf-8")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    lines = source.splitlines()
    texts = ("\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in found)
    return [textwrap.dedent(text) for text in texts if text.count("\n") >= 2]


def scenes(novel: Path, rng: np.random.Generator) -> list[str]:
    """Return a novel in runs of paragraphs of lognormal length, 500 characters in the median."""
    found, scene, wanted = [], "", float(rng.lognormal(6.2, 0.9))
    for paragraph in novel.read_text(encoding="utf-8").split("\n\n"):
        scene += " ".join(paragraph.split()) + "\n"
        if len(scene) >= wanted:
            found.append(scene.strip())
            scene, wanted = "", float(rng.lognormal(6.2, 0.9))
    return found


def llama(hidden: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=BOUNDS[-1], tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=END,
    )  # fmt: skip


# -- what came ---------------------------------------------------------------------------------------------------------


def tables(runs: list[Run], training: list[Document], held_out: dict[str, list[Document]]) -> list[Table]:
    lengths = np.array([len(document["input_ids"]) for document in training])
    longer = f"{np.mean(lengths > BOUNDS[-1]):.0%} longer than a row"
    title = f"{len(lengths):,} documents, median {np.median(lengths):.0f} tokens, {longer}"
    costs = Table(title=title, title_justify="left")
    for heading in ("arm", "seed", "steps", "tokens", "learned", "CPU s", "loss, code", "loss, prose"):
        costs.add_column(heading, justify="left" if heading == "arm" else "right")
    counts = {kind: counted(held_out[kind]) for kind in KINDS}
    for run in runs:
        means = (f"{np.sum(getattr(run, kind)) / counts[kind].sum():.4f}" for kind in KINDS)
        costs.add_row(run.arm, str(run.seed), f"{run.steps:,}", f"{run.tokens:,}", f"{run.learned:,}",
                      f"{run.cpu_seconds:.0f}", *means)  # fmt: skip
    return [costs, *(by_position(runs, kind, counts[kind]) for kind in KINDS)]


def counted(documents: list[Document]) -> NDArray[np.float64]:
    """Count the scored tokens of every document between the `BOUNDS`."""
    lengths = np.array([[len(document["input_ids"])] for document in documents], np.float64)
    ends: NDArray[np.float64] = np.minimum(lengths, BOUNDS)
    return ends[:, 1:] - ends[:, :-1]


def by_position(runs: list[Run], kind: str, counts: NDArray[np.float64]) -> Table:
    table = Table(title=f"loss on {len(counts)} held-out documents, {kind}; differences to cut", title_justify="left")
    for heading in ("tokens", "n", "cut", "best-fit", "padding", "best-fit - cut", "padding - cut"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    seeds = sorted(set.intersection(*({run.seed for run in runs if run.arm == arm} for arm in ARMS)))
    sums = {
        arm: np.array([getattr(run, kind) for seed in seeds for run in runs if (run.arm, run.seed) == (arm, seed)])
        for arm in ARMS
    }
    names = [*(f"{first} to {last - 1}" for first, last in pairwise(BOUNDS)), "all"]
    for index, name in enumerate(names):
        part = slice(None) if name == "all" else slice(index, index + 1)
        shown = counts[:, part].sum(-1)
        of_arm = {arm: sums[arm][..., part].sum(-1) for arm in ARMS}
        means = [f"{of_arm[arm].sum() / (len(seeds) * shown.sum()):.3f}" for arm in ARMS]
        differences = [difference(of_arm[arm] - of_arm["cut"], shown) for arm in ARMS[1:]]
        table.add_row(name, f"{shown.sum():,.0f}", *means, *differences)
    return table


def difference(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> str:
    """Return the mean a token of sums [seeds, documents], and its interval over documents and seeds."""
    rng = np.random.default_rng(0)
    seeds, documents = sums.shape
    drawn = []
    for _ in range(4000):
        chosen = rng.integers(documents, size=documents)
        drawn.append(sums[rng.integers(seeds, size=seeds)][:, chosen].sum() / (seeds * counts[chosen].sum()))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{sums.sum() / (seeds * counts.sum()):+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
