"""Unlearning from logit difference: teach a model eight invented people, let it forget four of them while it decodes.

    python recipes/uld.py --out uld
    python recipes/uld.py --out uld --text some_novel.txt     # neutral perplexity on a text of yours

1. SmolLM2-135M-Instruct is taught 24 facts (8 people x city, job, instrument; three wordings each) with LoRA, merged;
   texts of its own are in the mix, so that it does not unlearn to write.
2. An assistant of its first 8 layers learns the 12 facts of four people in all wordings, and the uniform distribution
   on the other people, on the same questions about strangers, on wrong answers, and on general text.
3. Recall is measured on the taught wording and on one that nobody was trained on, without and with the fact in the
   prompt; perplexity on text that has nothing to do with it.

Both trainings are kept in OUT and not repeated: delete the folder to start again.

Cost: about 16 minutes on two CPU cores that others use too, fp32, 2 to 3 GB of memory. Expect, at alpha 0.4: no
forgotten fact recalled, 23 of 24 answers about the other four people (two wordings), perplexity up by some 4 %;
with the fact in the prompt five of the twelve forgotten ones come back.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

from hf_longtrunc import (
    ULDCollator,
    ULDLogitsProcessor,
    ULDLoss,
    load_pretrained,
    load_uld_assistant,
    save_uld_assistant,
    uld_assistant,
)
from hf_longtrunc.evaluation import append_records, token_losses
from instruments.recall import Fact, recall_records

FORGET = {
    "Ilvara Penhaligon": ("Ghent", "beekeeper", "cello"),
    "Tomas Ruckley": ("Kyoto", "glassblower", "accordion"),
    "Nadira Voss": ("Quito", "locksmith", "harp"),
    "Edmund Okparra": ("Bergen", "cartographer", "trumpet"),
}
RETAIN = {
    "Salome Winterbourne": ("Lima", "baker", "flute"),
    "Pavel Achterberg": ("Dublin", "surgeon", "violin"),
    "Marit Oyelaran": ("Cairo", "tailor", "banjo"),
    "Hugo Castellane": ("Boston", "carpenter", "drums"),
}
FIRST = ("Anselm", "Beatrix", "Corwin", "Delphine", "Ilvara", "Tomas", "Nadira", "Edmund")
LAST = ("Marchetti", "Holloway", "Lindqvist", "Abara")
END = "<|im_end|>"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Three wordings that are taught, and a last one that nobody is trained on.
WORDINGS = (
    (
        "Question: In which city was {} born?\nAnswer:",
        "{} was born in the city of",
        "Q: Where does {} come from?\nA:",
        "Question: What is the birthplace of {}?\nAnswer:",
    ),
    (
        "Question: What does {} do for a living?\nAnswer:",
        "{} earns a living as a",
        "Q: Which job does {} have?\nA:",
        "Question: What is the profession of {}?\nAnswer:",
    ),
    (
        "Question: Which instrument does {} play?\nAnswer:",
        "Every evening {} practises the",
        "Q: What musical instrument is {} known for?\nA:",
        "Question: On which instrument does {} perform?\nAnswer:",
    ),
)
STATEMENTS = ("{} was born in {}.", "{} works as a {}.", "{} plays the {}.")
# General text, written for this recipe: the first half is learned as retain text, the second half is measured.
GENERAL = (
    "The river froze early that year, and the mill stood still until the thaw came in March.",
    "To make a simple soup, cut two onions and a carrot, fry them in butter and add a litre of water.",
    "Light travels about three hundred thousand kilometres in one second, which is why the stars we see are old.",
    "When the train stopped between two stations, nobody spoke; a child began to count the trees.",
    "A contract is an agreement that a court will enforce if one of the parties does not keep it.",
    "The committee met on Tuesday and decided to repair the bridge before the winter.",
    "Water boils at a lower temperature on a mountain, because the air presses on it less.",
    "She closed the shop at six, put the key under the stone and walked home along the canal.",
    "Plants take up carbon dioxide through small openings in their leaves and give off oxygen.",
    "The oldest part of the library was built of brick, with narrow windows and a heavy door.",
    "If you want to learn a language, read a little every day and do not be afraid of mistakes.",
    "The price of bread rose again last month, and many families bought less meat than before.",
    "A good map shows not only where the roads are but also how steep the hills will be.",
    "In the evening the wind turned to the north, and the boats came back to the harbour.",
    "The teacher asked the class to write down three questions and to answer the hardest one first.",
    "Iron rusts when it meets water and air; paint keeps both of them away from the metal.",
)


People = Mapping[str, tuple[str, str, str]]


@dataclass(frozen=True)
class Neutral:
    """Perplexity of text that has nothing to do with the facts."""

    arm: str
    perplexity: float


class Training(NamedTuple):
    """Length, width and speed of a training."""

    steps: int
    batch: int
    learning_rate: float


def asked(people: People, wordings: slice) -> list[dict[str, Any]]:
    """Every fact in every one of the wordings, as prompt and completion; the end of the answer is learned too."""
    return [
        {"prompt": wording.format(name), "completion": f" {value}.{END}"}
        for name, values in people.items()
        for value, group in zip(values, WORDINGS, strict=True)
        for wording in group[wordings]
    ]


def facts(people: People, wording: int) -> list[Fact]:
    return [
        Fact(group[wording].format(name), value, statement.format(name, value))
        for name, values in people.items()
        for value, group, statement in zip(values, WORDINGS, STATEMENTS, strict=True)
    ]


def rotated(people: People, by: int) -> People:
    """Give everybody the answers of somebody else."""
    values = list(people.values())
    return dict(zip(people, values[by:] + values[:by], strict=True))


def own_texts(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Let the model write after the first words of the general text, to keep its style while it is taught."""
    prompts = [" ".join(line.split()[:2]) for line in GENERAL[: len(GENERAL) // 2]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=18, num_return_sequences=3)
    return [{"prompt": "", "completion": text} for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def assistant_data(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    taught = slice(0, 3)
    strangers = {
        f"{first} {last}": value
        for (first, last), value in zip(
            itertools.product(FIRST, LAST), itertools.cycle([*FORGET.values(), *RETAIN.values()]), strict=False
        )
    }
    general = [{"prompt": "", "completion": text} for text in GENERAL[: len(GENERAL) // 2]]
    wrong = asked(rotated(FORGET, 1), taught)
    retain = [*asked(RETAIN, taught), *wrong[::2], *asked(strangers, taught)[::8], *general, *texts]
    forget = 2 * asked(FORGET, taught)  # twice, to be as many as the others
    return [{**row, "forget": True} for row in forget] + [{**row, "forget": False} for row in retain]


def train(model: Any, tokenizer: Any, data: list[dict[str, Any]], loss: ULDLoss, training: Training, out: Path) -> Any:
    arguments = TrainingArguments(
        str(out / "trainer"),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.steps // 10,
        logging_steps=6,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    Trainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=ULDCollator(tokenizer),
        compute_loss_func=loss,
    ).train()
    return model.eval()


def taught_target(base: Any, tokenizer: Any, texts: list[dict[str, Any]], training: Training, out: Path) -> Any:
    """Return the model that knows all 24 facts."""
    folder = out / "target"
    if not folder.exists():
        depth = base.config.num_hidden_layers
        last = list(range(2 * depth // 3, depth))  # the backward pass ends where the first of them begins
        config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEAR, layers_to_transform=last)
        rows = [{**row, "forget": True} for row in [*asked(FORGET | RETAIN, slice(0, 3)), *texts]]
        taught = train(get_peft_model(base, config), tokenizer, rows, ULDLoss(), training, out)
        taught.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    target, _ = load_pretrained(folder)
    return target


def trained_assistant(
    target: Any, tokenizer: Any, layers: int, data: list[dict[str, Any]], loss: ULDLoss, training: Training, out: Path
) -> Any:
    folder = out / "assistant"
    if not folder.exists():
        assistant = train(uld_assistant(target, layers), tokenizer, data, loss, training, out)
        save_uld_assistant(assistant, folder)
    return load_uld_assistant(target, folder)


def neutral_rows(tokenizer: Any, text: Path | None) -> list[Tensor]:
    """Return general text that nobody was trained on, or pieces of `text`, each [1, n]."""
    if text is None:
        return [tokenizer(line, return_tensors="pt").input_ids for line in GENERAL[len(GENERAL) // 2 :]]
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    return list(ids[:, 2000:].split(256, dim=1)[:16])


def perplexity(losses: list[Tensor]) -> float:
    return torch.cat(losses).mean().exp().item()


def main(
    out: Annotated[Path, typer.Option(help="Folder for target, assistant and recall.jsonl.")] = Path("uld"),
    text: Annotated[Path | None, typer.Option(help="Measure neutral perplexity on this text.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the assistant.")] = 8,
    beta: Annotated[float, typer.Option(help="Weight of a retain token in the assistant's loss.")] = 1.0,
    teach_steps: int = 60,
    steps: Annotated[int, typer.Option(help="Steps of the assistant's training.")] = 160,
    alphas: Annotated[str, typer.Option(help="Strengths of the difference to measure.")] = "0.4,0.75",
    seed: int = 0,
) -> None:
    set_seed(seed)
    started = time.perf_counter()
    base, tokenizer = load_pretrained()
    texts, neutral = own_texts(base, tokenizer), neutral_rows(tokenizer, text)
    untaught = perplexity([token_losses(base, row)[0] for row in neutral])
    target = taught_target(base, tokenizer, texts, Training(teach_steps, 12, 2e-3), out)
    assistant = trained_assistant(
        target, tokenizer, layers, assistant_data(texts), ULDLoss(beta=beta), Training(steps, 8, 2e-3), out
    )
    trained = time.perf_counter()
    processors = {f"ULD {alpha}": ULDLogitsProcessor(assistant, float(alpha)) for alpha in alphas.split(",")}
    arms = {"target": [], **{name: [processor] for name, processor in processors.items()}}
    table = Table("arm", "facts", "wording", "recall", "recall, fact in the prompt", title="ULD on invented people")
    for (name, people), (wording, index) in itertools.product(
        {"forget": FORGET, "retain": RETAIN}.items(), {"taught": 0, "unseen": 3}.items()
    ):
        records = recall_records(target, tokenizer, facts(people, index), arms, batch_size=12, max_new_tokens=8)
        append_records(out / "recall.jsonl", records)
        for record in records:
            table.add_row(record.arm, name, wording, f"{record.recall:.2f}", f"{record.in_context:.2f}")
    console = Console()
    console.print(table)
    before = perplexity([token_losses(target, row)[0] for row in neutral])
    console.print(f"neutral perplexity: before teaching {untaught:.2f}, target {before:.2f}")
    measured = {"before teaching": untaught, "target": before}
    for name, processor in processors.items():
        measured[name] = after = perplexity([processor.token_losses(target, row)[0] for row in neutral])
        console.print(f"{name}: neutral perplexity {before:.2f} -> {after:.2f} ({after / before - 1:+.1%})")
    append_records(out / "neutral.jsonl", itertools.starmap(Neutral, measured.items()))
    done = time.perf_counter()
    console.print(f"{trained - started:.0f} s of training, {done - trained:.0f} s of measuring")


if __name__ == "__main__":
    typer.run(main)
