"""GRPO on truncated samples: log-probabilities of the kept sets against those of the full vocabulary, seed by seed.

    pip install "trl>=1.16"
    python recipes/grpo_truncated.py --out grpo

A tiny Llama (two layers, 64 words) is taught by TRL's GRPOTrainer to write words of even number, each a step above the
one before. Both arms draw through the same sampler from the same seeds; one scores under the kept sets
(`attach_truncation`), the other under the full vocabulary, as TRL does by itself. After training both are judged by the
mean reward of 256 samples drawn through the sampler, and of 256 drawn without it.

Cost: a quarter of an hour on one CPU core; `--steps 5 --seeds 0` tries it in seconds.
Expect: rewards that rise in both arms; the recipe compares them.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from hf_longtrunc import (
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    PLessLogitsProcessor,
    TopNSigmaLogitsProcessor,
    attach_processors,
    attach_truncation,
    sampling_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS, LENGTH, GROUP, PROMPTS = 64, 12, 8, 4
SAMPLERS: dict[str, Callable[[], Any]] = {
    "p-less": PLessLogitsProcessor,
    "eta 0.05": lambda: EtaLogitsProcessor(0.05),
    "epsilon 0.02": lambda: EpsilonLogitsProcessor(0.02),
    "top-n-sigma 1": lambda: TopNSigmaLogitsProcessor(1.0),
}
ARMS = ("kept sets", "full vocabulary")


def main(
    out: Annotated[Path, typer.Option(help="Folder of curves.jsonl and curves.png.")] = Path("grpo"),
    samplers: Annotated[str, typer.Option(help="Of " + ", ".join(SAMPLERS) + ".")] = "p-less,eta 0.05",
    seeds: Annotated[str, typer.Option(help="One run of each arm a seed.")] = "0,1,2,3,4",
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    updates: Annotated[int, typer.Option(help="Optimizer steps on one batch of samples.")] = 1,
) -> None:
    warnings.simplefilter("ignore")  # trainers' own
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("trl").setLevel(logging.ERROR)
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    for sampler in samplers.split(","):
        for seed in map(int, seeds.split(",")):
            for arm in ARMS:
                runs.append(run(sampler, seed, arm, steps, learning_rate, updates))
                print(json.dumps({key: value for key, value in runs[-1].items() if key != "rewards"}), flush=True)
    with open(out / "curves.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in runs)
    report(runs)
    plot(runs, out / "curves.png")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=inner, pad_token="w0", eos_token="w1", unk_token="w0")


def reward(completions: list[str], **_: Any) -> list[float]:
    """Return the share of words that are even and, but for the first, greater than the word before."""
    found = []
    for text in completions:
        words = [int(word[1:]) for word in text.split() if word[1:].isdigit()]
        pairs = zip([-1, *words], words, strict=False)
        found.append(sum(word % 2 == 0 and word > last for last, word in pairs) / LENGTH)
    return found


def run(sampler: str, seed: int, arm: str, steps: int, learning_rate: float, updates: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        initializer_range=0.15,
    )  # fmt: skip
    words = tokenizer()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=steps, seed=seed,
            learning_rate=learning_rate, lr_scheduler_type="constant", gradient_checkpointing=False, logging_steps=1,
            max_completion_length=LENGTH, num_generations=GROUP, per_device_train_batch_size=GROUP * PROMPTS,
            num_iterations=updates, disable_tqdm=True, log_completions=False,
        )  # fmt: skip
        prompts = Dataset.from_dict({"prompt": [f"w{2 * n + 3}" for n in range(8)] * 64})
        trainer: Any = GRPOTrainer(
            LlamaForCausalLM(config), reward_funcs=reward, args=settings, train_dataset=prompts, processing_class=words
        )
        trainer.remove_callback(PrinterCallback)
        processor = SAMPLERS[sampler]()
        attach = attach_truncation if arm == ARMS[0] else lambda trainer, each: attach_processors(trainer.model, each)
        with attach(trainer, [processor]):
            trainer.train()
        logged = [entry for entry in trainer.state.log_history if "reward" in entry]
        return {
            "sampler": sampler,
            "seed": seed,
            "arm": arm,
            "truncated": judged(trainer.model, words, [processor]),
            "untruncated": judged(trainer.model, words, []),
            "importance_ratio": logged[0].get("truncation/importance_ratio"),
            "seconds": round(time.perf_counter() - started, 1),
            "rewards": [round(entry["reward"], 4) for entry in logged],
        }


def judged(model: Any, words: Any, processors: list[Any]) -> float:
    """Return the mean reward of 256 samples."""
    torch.manual_seed(0)
    ids = torch.tensor([[2 * n + 3] for n in range(8)]).repeat(32, 1)
    model.eval()
    options = {"max_new_tokens": LENGTH, "attention_mask": torch.ones_like(ids)}
    drawn = model.generate(ids, **sampling_settings(model), **options, logits_processor=processors)
    return round(statistics.mean(reward(words.batch_decode(drawn[:, 1:], skip_special_tokens=True))), 4)


def report(runs: list[dict[str, Any]]) -> None:
    print(
        "mean reward over seeds (standard error), judged through the sampler and without it; area: mean over training"
    )
    for sampler in dict.fromkeys(each["sampler"] for each in runs):
        area: dict[str, list[float]] = {}
        for arm in ARMS:
            own = [each for each in runs if (each["sampler"], each["arm"]) == (sampler, arm)]
            area[arm] = [statistics.mean(each["rewards"]) for each in own]
            figures = [[each["truncated"] for each in own], [each["untruncated"] for each in own], area[arm]]
            names = ("through", "without", "area")
            shown = ", ".join(f"{name} {said(each)}" for name, each in zip(names, figures, strict=True))
            print(f"{sampler}, {arm}: {shown}; {len(own)} seeds")
        ahead = sum(kept > full for kept, full in zip(area[ARMS[0]], area[ARMS[1]], strict=True))
        ratios = [each["importance_ratio"] for each in runs if (each["sampler"], each["arm"]) == (sampler, ARMS[0])]
        print(
            f"{sampler}: the kept sets' area is larger in {ahead} of {len(area[ARMS[0]])} seeds; importance ratio "
            f"against the full distribution at the first step {statistics.mean(ratios):.3f}"
        )


def said(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ({error:.3f})"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    samplers = list(dict.fromkeys(each["sampler"] for each in runs))
    figure, panels = plt.subplots(
        1, len(samplers), figsize=(5 * len(samplers), 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, sampler in zip(panels[0], samplers, strict=True):
        for arm, color in zip(ARMS, ("#0072b2", "#d55e00"), strict=True):
            curves = [each["rewards"] for each in runs if (each["sampler"], each["arm"]) == (sampler, arm)]
            for curve in curves:
                panel.plot(curve, color=color, linewidth=0.6, alpha=0.35)
            panel.plot([statistics.mean(each) for each in zip(*curves, strict=True)], color=color, label=arm)
        panel.set_title(sampler)
        panel.set_xlabel("optimizer step")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("mean reward of a batch")
    panels[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
