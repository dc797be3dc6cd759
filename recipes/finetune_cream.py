"""Train at the short window, serve at the long one: CREAM against contiguous positions, PoSE and no training at all.

    python recipes/finetune_cream.py --texts novels/*.txt --eval-text moby_dick.txt --checkpointing --out finetune_cream
    accelerate launch --multi_gpu --num_processes 4 recipes/finetune_cream.py --texts ... --arms cream --lora 16

Every arm starts from the same weights, is scaled by `extend_context` (stock rope_parameters), trained by Trainer on
rows of the model's own window, and saved as an ordinary checkpoint to OUT/arm. Loaded from there, it reads a text that
was not trained on, up to factor x window: perplexity by position, and passkeys by length and depth. "unmodified" is
neither scaled nor trained, "untrained" scaled only. Records are appended to OUT/perplexity.jsonl and OUT/passkey.jsonl.

With the defaults an arm sees 120 x 8 x 8192 tokens (SmolLM2-135M-Instruct, 8192 -> 32768). Read the retrieval by depth
first: perplexity is no proof, contiguous training gives similar figures. Not yet run on a GPU in this form.
"""

from __future__ import annotations

import argparse
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_longtrunc import (
    BestFitPackingCollator,
    CreamCollator,
    check_packed,
    extend_context,
    load_pretrained,
    pack,
    trained_length,
    verify_positions,
)
from hf_longtrunc.evaluation import append_records, compare_losses, perplexity_records, perplexity_table
from instruments.passkey import PasskeyPrompts, passkey_table, passkey_tasks, plot_passkey, run_passkey

ARMS = ("unmodified", "untrained", "contiguous", "pose", "cream")


def main() -> None:
    arguments = options()
    perplexities: list[Any] = []
    answers: list[Any] = []
    for arm in arguments.arms.split(","):
        is_main = prepare(arm, arguments) if arm != "unmodified" else int(os.environ.get("RANK", "0")) == 0
        if is_main:
            model, tokenizer = load_pretrained(source(arm, arguments), device="cpu" if arguments.cpu else None)
            perplexities += perplexity(model, tokenizer, arm, arguments)
            answers += retrieval(model, tokenizer, arm, arguments)
    if perplexities:
        console = Console()
        console.print(perplexity_table(perplexities))
    if answers:
        console.print(passkey_table(answers))
        plot_passkey(answers)[0].figure.canvas.print_figure(arguments.out / "passkey.png", dpi=150)


def source(arm: str, arguments: argparse.Namespace) -> str | Path | None:
    """Return the model that the evaluation of an arm loads: its checkpoint, or the model that all arms started from."""
    model: str | None = arguments.model
    return model if arm == "unmodified" else arguments.out / arm


# -- training ----------------------------------------------------------------------------------------------------------


def prepare(arm: str, arguments: argparse.Namespace) -> bool:
    """Scale, train and save one arm in all processes; return whether this is the process that goes on with it."""
    training = training_arguments(arguments, arm)
    torch.manual_seed(arguments.seed)
    model: Any
    model, tokenizer = load_pretrained(arguments.model, dtype=torch.float32, device=training.device)
    window = arguments.window or trained_length(model.config)
    model.config.max_position_embeddings = window
    extend_context(model, arguments.factor, arguments.method, tokenizer=tokenizer)
    if arm != "untrained":
        model = train(model, tokenizer, arm, window, training, arguments)
    if training.process_index == 0:
        model.save_pretrained(arguments.out / arm)
        tokenizer.save_pretrained(arguments.out / arm)
    return bool(training.process_index == 0)


def train(model: Any, tokenizer: Any, arm: str, window: int, training: Any, arguments: argparse.Namespace) -> Any:
    rows: Any
    if arguments.packed:
        documents = paragraphs(arguments.texts, tokenizer)
        rows = pack(documents, window, tokenizer, row_multiple=training.world_size * arguments.batch)
        inner: Any = BestFitPackingCollator(window, tokenizer, model=model)
        batch = {name: tensor.to(model.device) for name, tensor in inner([rows[0]]).items()}
        check_packed(model, {**batch, "use_cache": False})
    else:
        rows, inner = windows(arguments.texts, tokenizer, window), default_data_collator
    if arguments.lora:
        model = with_lora(model, arguments.lora)
    collator = CreamCollator(inner, window, arguments.factor, scheme=arm, seed=arguments.seed)
    with collator.attach(model):
        verify_positions(model)
        Trainer(model, training, train_dataset=rows, data_collator=collator, callbacks=[collator]).train()
    return model.merge_and_unload() if arguments.lora else model


def training_arguments(arguments: argparse.Namespace, arm: str) -> TrainingArguments:
    on_gpu = torch.cuda.is_available() and not arguments.cpu
    return TrainingArguments(
        str(arguments.out / arm),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulate,
        learning_rate=arguments.lr,
        warmup_steps=min(10, arguments.steps // 4),
        bf16=on_gpu,
        gradient_checkpointing=arguments.checkpointing,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
        use_cpu=arguments.cpu,
        ddp_backend="gloo" if arguments.cpu and "WORLD_SIZE" in os.environ else None,
        dataloader_pin_memory=on_gpu,
    )


def with_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    warnings.filterwarnings("ignore", message="the checkpoints of a PEFT adapter")  # merged before it is saved
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM"))


def windows(texts: list[Path], tokenizer: Any, window: int) -> list[dict[str, list[int]]]:
    """Cut each text into windows, its last part left out."""
    rows = []
    for text in texts:
        ids = read_ids(text, tokenizer)
        rows += [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    return [{"input_ids": row, "labels": row} for row in rows]


def paragraphs(texts: list[Path], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Make every paragraph a document."""
    parts = [part for text in texts for part in text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    return [{"input_ids": ids} for ids in tokenizer(parts, verbose=False).input_ids]


def read_ids(text: Path, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids
    return ids


# -- evaluation --------------------------------------------------------------------------------------------------------


def perplexity(model: Any, tokenizer: Any, arm: str, arguments: argparse.Namespace) -> list[Any]:
    """Measure perplexity by position up to factor x window, on the same stretches of the text for every arm."""
    window = read_window(model, arguments)
    ids = torch.tensor(read_ids(arguments.eval_text, tokenizer))
    starts = [int(start) for start in arguments.starts.split(",")]
    length = window * arguments.factor
    rows: Tensor = torch.stack([ids[start : start + length] for start in starts])
    arms: dict[str, Any] = {arm: nullcontext}
    losses = compare_losses(model, rows.to(model.device), arms, chunk=arguments.chunk, progress=True)
    edges = sorted({0, window // 2, window, window * 3 // 2, *range(window * 2, length + 1, window)})
    records = perplexity_records(model, losses, arms, edges)
    append_records(arguments.out / "perplexity.jsonl", records)
    return records


def retrieval(model: Any, tokenizer: Any, arm: str, arguments: argparse.Namespace) -> list[Any]:
    """Hide keys in the same text at several depths, for prompts within the window and past it."""
    window = read_window(model, arguments)
    whole = window * arguments.factor
    lengths = [int(n) for n in arguments.lengths.split(",") if n] or [window // 4, whole // 2, whole * 3 // 4]
    depths = [float(depth) for depth in arguments.depths.split(",")]
    prompts = PasskeyPrompts(tokenizer, arguments.eval_text.read_text(encoding="utf-8"))
    tasks = passkey_tasks(lengths, depths, keys_per_cell=arguments.keys, seed=arguments.seed)
    path = arguments.out / "passkey.jsonl"
    return run_passkey(model, prompts, tasks, {arm: nullcontext}, path=path, progress=True)


def read_window(model: Any, arguments: argparse.Namespace) -> int:
    """Return the window that the arms were trained at, which a scaled model's config holds multiplied."""
    if arguments.window:
        return int(arguments.window)
    is_scaled = Path(model.name_or_path).parent == arguments.out
    return trained_length(model.config) // (arguments.factor if is_scaled else 1)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="texts to train on")
    parser.add_argument("--eval-text", type=Path, required=True, help="a text that is not among them")
    parser.add_argument("--model", help="hub id or folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--window", type=int, help="train at so many tokens; the model's own window if left out")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--method", choices=("yarn", "ntk", "linear"), default="yarn")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=1, help="rows a process")
    parser.add_argument("--accumulate", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA adapters; 0 trains all weights")
    parser.add_argument("--packed", action="store_true", help="best-fit pack the paragraphs instead of cutting windows")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", default="2000,100000", help="where in the eval text each stretch begins")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens a forward in the evaluation")
    parser.add_argument("--lengths", default="", help="of passkey prompts; N/4, fN/2 and 3fN/4 if left out")
    parser.add_argument("--depths", default="0.1,0.3,0.5,0.7,0.9")
    parser.add_argument("--keys", type=int, default=4, help="keys a length and depth")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("finetune_cream"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
