"""Does packing help? Best-fit rows, concatenate-and-cut and padding, trained on equal tokens from the same weights.

    python recipes/does_packing_help.py --novels bleak_house.txt moby_dick.txt sherlock_holmes.txt

A small Llama (rows of 256 tokens) trains for one pass on functions of Python's standard library and on scenes of
novels. The last novel and every tenth file of the library are held out. The first 256 tokens of each held-out document
are scored, alone, after a token that begins each document in training too. The arms:

    cut       concatenated documents, cut every 256 tokens; attention crosses document boundaries
    best-fit  `pack()`: whole documents, apart
    padding   documents in random batches, apart, longer ones in pieces (computed without padding, with the same loss)

"padding" has the same pieces as "best-fit" in other batches: their difference is chance. A cut row seldom begins with a
document, so the "cut" model is also scored after 128 tokens of other documents, as in its training.

Each model then continues the headers of held-out functions. Counted are names that are read but bound by nothing:
parameter, assignment, import, builtin or module of the library. The held-out functions are counted too, since people
use module-level names.

Intervals are 95 %, of paired differences, by a bootstrap over documents and seeds. Each run appends a line to
OUT/runs.jsonl; a second call skips runs that are there.

Cost: 4 minutes a run on one core for 2 M parameters (`--hidden 192`) and 1.2 M tokens, nine runs. Closer to the paper,
some three hours with AVX512_BF16, on six novels and one held out:

    python recipes/does_packing_help.py --novels NOVELS --hidden 256 --tokens 5000000 --bf16
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
from instruments.bound_names import bound_before

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

ARMS = ("cut", "best-fit", "padding")
KINDS = ("code", "prose")
BOUNDS = (1, 16, 64, 128, 256)  # positions of the scored tokens; the first is given
BEHIND = 128  # tokens of other documents in front of one
BEGIN, END = 0, 1
HEADER, WRITTEN = 64, 160  # tokens of a function's header at most, and written on from it
NO_CODE = {"site-packages", "test", "tests", "idle_test"}
VOCABULARY, ROWS = 1024, 4  # rows a step
Document = dict[str, list[int]]


@dataclass(frozen=True)
class Run:
    """One training: its cost, and each held-out document's loss summed between the `BOUNDS`.

    `behind` is the loss of documents after others, by kind, for the arm "cut" only. `names` are counts for each
    function that the model wrote: names read, names that nothing has bound, lines, and lines of Python.
    """

    arm: str
    seed: int
    parameters: int
    steps: int
    tokens: int
    learned: int
    cpu_seconds: float
    code: list[list[float]]
    prose: list[list[float]]
    behind: dict[str, list[list[float]]]
    names: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, nargs="*", default=[], help="text files; the last is held out")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="of training, half code and half prose")
    parser.add_argument("--held-out", type=int, default=200, help="documents scored of each kind")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--bf16", action="store_true", help="train under autocast: 1.4 times as fast with AVX512_BF16")
    parser.add_argument("--out", type=Path, default=Path("does_packing_help"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, training, held_out = corpora(arguments.novels, arguments.tokens, arguments.held_out)
    done = read_records(arguments.out / "runs.jsonl", Run)
    for seed in map(int, arguments.seeds.split(",")):
        for arm in ARMS:
            if (arm, seed) not in {(run.arm, run.seed) for run in done}:
                done.append(trained(arm, seed, training, held_out, tokenizer, arguments))
                append_records(arguments.out / "runs.jsonl", done[-1:])
    for table in [*tables(done, training, held_out), names_table(done, held_out["code"], tokenizer)]:
        Console(width=120).print(table)


def trained(
    arm: str, seed: int, documents: list[Document], held_out: dict[str, list[Document]], tokenizer: Any, options: Any
) -> Run:
    since = time.process_time()
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(llama(options.hidden))
    rows = rows_of(arm, documents, seed)
    steps = -(-len(rows_of("cut", documents, seed)) // ROWS)
    settings = TrainingArguments(
        str(options.out), per_device_train_batch_size=-(-len(rows) // steps), num_train_epochs=1, learning_rate=3e-3,
        lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.1, seed=seed, logging_steps=50,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        bf16=options.bf16,
    )  # fmt: skip
    collator = Counting(BOUNDS[-1], pad_token_id=END)
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator)
    trainer.train()
    seconds = round(time.process_time() - since, 1)
    model.eval()
    scores: dict[str, Any] = {
        kind: losses(model, [document["input_ids"] for document in held_out[kind]]) for kind in KINDS
    }
    behind = {kind: losses(model, *behind_others(held_out[kind])) for kind in KINDS if arm == "cut"}
    names = [bound_before(text) for text in written(model, held_out["code"], tokenizer, seed)]
    counts = model.num_parameters(), trainer.state.global_step, collator.tokens, collator.learned
    return Run(arm, seed, *counts, seconds, **scores, behind=behind, names=names)


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
    """Counts the tokens and the targets of its batches."""

    tokens = learned = 0

    def __call__(self, examples: Any) -> dict[str, Any]:
        """Collate examples."""
        batch = super().__call__(examples)
        self.tokens += sum(len(example["input_ids"]) for example in examples)
        self.learned += int((batch["labels"] != -100).sum())
        return batch


@torch.no_grad()
def losses(model: Any, documents: list[list[int]], first: int = 0) -> list[list[float]]:
    """Return every document's summed loss between the `BOUNDS`, documents apart; they begin at token `first`."""
    sums = []
    for document in documents:
        ids = torch.tensor([document[: BOUNDS[-1]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none")[first:]
        parts = [loss[begin - 1 : end - 1] for begin, end in pairwise(BOUNDS)]
        sums.append([round(float(part.sum()), 3) for part in parts])
    return sums


def behind_others(documents: list[Document]) -> tuple[list[list[int]], int]:
    """Return each document after `BEHIND` tokens of the documents before it, and `BEHIND`."""
    stream = [token for document in documents for token in document["input_ids"]]
    stream = stream[-BEHIND:] + stream
    ends = np.cumsum([len(document["input_ids"]) for document in documents]).tolist()
    return [stream[begin : end + BEHIND] for begin, end in pairwise([0, *ends])], BEHIND


# -- names -------------------------------------------------------------------------------------------------------------


def written(model: Any, documents: list[Document], tokenizer: Any, seed: int) -> list[str]:
    """Return functions that the model wrote from the headers of these."""
    torch.manual_seed(seed)
    prompts = [ids[:header] for ids, header in with_headers(documents, tokenizer)]
    texts = []
    for begin in range(0, len(prompts), 50):
        part = prompts[begin : begin + 50]
        longest = max(map(len, part))
        ids = torch.tensor([[END] * (longest - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part])
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=WRITTEN, do_sample=True, temperature=0.7, top_k=0,
            pad_token_id=END, eos_token_id=END,
        )  # fmt: skip
        rows = [row[longest - len(prompt) :] for row, prompt in zip(out.tolist(), part, strict=True)]
        texts += [whole_lines(row, tokenizer) for row in rows]
    return texts


def with_headers(documents: list[Document], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Return functions, and how many of their tokens precede the first statement; those with short headers alone."""
    found = []
    for document in documents:
        text = tokenizer.decode(document["input_ids"])
        try:  # it is a function
            line = ast.parse(text).body[0].body[0].lineno
        except SyntaxError:  # a text in it stands further left than the function
            continue
        header = "\n".join(text.splitlines()[: line - 1])
        number = 1 + len(tokenizer.encode(header).ids)
        if 1 < number <= HEADER:
            found.append((document["input_ids"], number))
    return found


def whole_lines(ids: list[int], tokenizer: Any) -> str:
    """Return the text up to the token that ends it, without a line that was cut off."""
    text: str = tokenizer.decode(ids)
    return text if END in ids else text.rpartition("\n")[0]


# -- documents ---------------------------------------------------------------------------------------------------------


def corpora(novels: list[Path], tokens: int, held_out: int) -> tuple[Any, list[Document], dict[str, list[Document]]]:
    """Return a tokenizer, the documents of training, and those held out by kind."""
    rng = np.random.default_rng(0)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if not NO_CODE & set(file.relative_to(root).parts))
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
        if wanted > 0:
            raise SystemExit(f"the {kind} ends {wanted:,} tokens too early: fewer --tokens, or more --novels")
    chosen = {kind: rng.permutation(len(unseen[kind]))[:held_out].tolist() for kind in KINDS}
    return tokenizer, training, {kind: [encoded(tokenizer, unseen[kind][i]) for i in chosen[kind]] for kind in KINDS}


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
    for heading in ("arm", "seed", "parameters", "steps", "tokens", "learned", "tokens/s", "code", "prose"):
        costs.add_column(heading, justify="left" if heading == "arm" else "right")
    counts = {kind: counted(held_out[kind]) for kind in KINDS}
    for run in runs:
        means = (f"{np.sum(getattr(run, kind)) / counts[kind].sum():.4f}" for kind in KINDS)
        costs.add_row(run.arm, str(run.seed), f"{run.parameters:,}", f"{run.steps:,}", f"{run.tokens:,}",
                      f"{run.learned:,}", f"{run.tokens / run.cpu_seconds:,.0f}", *means)  # fmt: skip
    by_kind = [by_position(runs, kind, counts[kind]) for kind in KINDS]
    return [costs, *by_kind, *(behind_table(runs, kind, counts[kind]) for kind in KINDS)]


def counted(documents: list[Document]) -> NDArray[np.float64]:
    """Count the scored tokens of every document between the `BOUNDS`."""
    lengths = np.array([[len(document["input_ids"])] for document in documents], np.float64)
    ends: NDArray[np.float64] = np.minimum(lengths, BOUNDS)
    return ends[:, 1:] - ends[:, :-1]


def by_position(runs: list[Run], kind: str, counts: NDArray[np.float64]) -> Table:
    table = Table(title=f"loss on {len(counts)} held-out documents, {kind}; differences to cut", title_justify="left")
    for heading in ("tokens", "n", "cut", "best-fit", "padding", "best-fit - cut", "padding - cut"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    for name, part in parts():
        sums = {arm: of_seeds(runs, arm, lambda run: getattr(run, kind))[..., part].sum(-1) for arm in ARMS}
        shown = counts[:, part].sum(-1)
        means = [f"{mean(sums[arm], shown):.3f}" for arm in ARMS]
        differences = [difference(sums[arm], shown, sums["cut"], shown) for arm in ARMS[1:]]
        table.add_row(name, f"{shown.sum():,.0f}", *means, *differences)
    return table


def behind_table(runs: list[Run], kind: str, counts: NDArray[np.float64]) -> Table:
    title = f"the model of cut where documents stand behind {BEHIND} tokens of others, {kind}"
    table = Table(title=title, title_justify="left")
    for heading in ("tokens", "cut, alone", "cut, behind others", "best-fit, alone", "best-fit - cut, behind others"):
        table.add_column(heading, justify="left" if heading == "tokens" else "right")
    for name, part in parts()[: BOUNDS.index(BOUNDS[-1] - BEHIND)]:
        shown = counts[:, part].sum(-1)
        alone, best = (of_seeds(runs, arm, lambda run: getattr(run, kind))[..., part].sum(-1) for arm in ARMS[:2])
        behind = of_seeds(runs, "cut", lambda run: run.behind[kind])[..., part].sum(-1)
        means = [f"{mean(sums, shown):.3f}" for sums in (alone, behind, best)]
        table.add_row(name, *means, difference(best, shown, behind, shown))
    return table


def names_table(runs: list[Run], documents: list[Document], tokenizer: Any) -> Table:
    texts = [ids[: header + WRITTEN] for ids, header in with_headers(documents, tokenizer)]
    people = np.array([[bound_before(whole_lines(ids, tokenizer)) for ids in texts]])
    title = f"names read in functions from {len(texts)} held-out headers, {WRITTEN} tokens each"
    table = Table(title=title, title_justify="left")
    for heading in ("written by", "lines", "Python", "names read", "not bound before", "share", "difference to cut"):
        table.add_column(heading, justify="left" if heading == "written by" else "right")
    cut = of_seeds(runs, "cut", lambda run: run.names)
    for name, found in [("people", people), *((arm, of_seeds(runs, arm, lambda run: run.names)) for arm in ARMS)]:
        reads, unbound, lines, parsed = found.sum((0, 1)).tolist()
        apart = difference(found[..., 1], found[..., 0], cut[..., 1], cut[..., 0]) if name in ARMS[1:] else ""
        table.add_row(name, f"{lines:,}", f"{parsed / lines:.1%}", f"{reads:,}", f"{unbound:,}",
                      f"{unbound / max(reads, 1):.1%}", apart)  # fmt: skip
    return table


def parts() -> list[tuple[str, slice]]:
    names = [f"{first} to {last - 1}" for first, last in pairwise(BOUNDS)]
    return [*((name, slice(index, index + 1)) for index, name in enumerate(names)), ("all", slice(None))]


def of_seeds(runs: list[Run], arm: str, what: Callable[[Run], Any]) -> NDArray[np.float64]:
    """Return something of an arm's runs, [seeds, documents, ...], of the seeds that every arm was trained with."""
    seeds = sorted(set.intersection(*({run.seed for run in runs if run.arm == each} for each in ARMS)))
    return np.array([what(run) for seed in seeds for run in runs if (run.arm, run.seed) == (arm, seed)])


def mean(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """Return the mean of sums [seeds, documents] over counts [documents] or [seeds, documents]."""
    return float(sums.sum() / max(np.broadcast_to(counts, sums.shape).sum(), 1))


def difference(
    sums: NDArray[np.float64], counts: NDArray[np.float64], base: NDArray[np.float64], of_base: NDArray[np.float64]
) -> str:
    """Return the difference of two means, and its interval over documents and seeds, drawn for both together."""
    rng = np.random.default_rng(0)
    arrays = [np.broadcast_to(array, sums.shape) for array in (sums, counts, base, of_base)]
    drawn = []
    for _ in range(4000):
        seeds, documents = (rng.integers(size, size=size) for size in sums.shape)
        a, b, c, d = (array[np.ix_(seeds, documents)].sum() for array in arrays)
        drawn.append(a / max(b, 1) - c / max(d, 1))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{mean(sums, counts) - mean(base, of_base):+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
