"""Recall of facts: a model's answers without and with the fact in the prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_longtrunc.arguments import check_int
from hf_longtrunc.evaluation.records import ModelRecord, model_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fact:
    """A prompt that asks for `answer`, and a `statement` that gives it away when it is put in front of the prompt."""

    prompt: str
    answer: str
    statement: str


@dataclass(frozen=True)
class RecallRecord(ModelRecord):
    """Share of facts that one arm said: asked plainly (`recall`), and with the statement in front (`in_context`)."""

    arm: str
    facts: int
    recall: float
    in_context: float


def fact_recall(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    logits_processor: Sequence[Processor] = (),
    *,
    in_context: bool = False,
    max_new_tokens: int = 12,
    batch_size: int = 1,
) -> list[bool]:
    """Ask for each fact by greedy decoding; it is recalled if the answer stands in the text as whole words.

    Case is ignored.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer.
        facts: to ask for.
        logits_processor: handed to `generate`.
        in_context: put each fact's statement, and a newline, in front of its prompt.
        max_new_tokens: how long an answer may be.
        batch_size: prompts at a time. More than 1 are padded on the left with the tokenizer's padding token, which a
            processor with a second model must be able to tell from a BOS token.
    """
    batch_size = check_int("batch_size", batch_size, minimum=1)
    max_new_tokens = check_int("max_new_tokens", max_new_tokens, minimum=1)
    prompts = [f"{fact.statement}\n{fact.prompt}" if in_context else fact.prompt for fact in facts]
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    texts = [
        text for batch in batches for text in _continued(model, tokenizer, batch, logits_processor, max_new_tokens)
    ]
    return [_says(text, fact.answer) for text, fact in zip(texts, facts, strict=True)]


def recall_records(
    model: Any, tokenizer: Any, facts: Sequence[Fact], arms: Mapping[str, Sequence[Processor]], **options: Any
) -> list[RecallRecord]:
    """Run `fact_recall` without and with the statements, for each arm: a name and the processors that it decodes with.

    The first number shows suppression while decoding; the second whether the model still uses a fact in its prompt
    (Shumailov et al. 2024, arXiv 2407.00106). `options` go to `fact_recall`.
    """
    if not facts:
        raise ValueError("facts is empty: there is no recall of nothing")
    records = []
    for name, processors in arms.items():
        plain, context = (
            sum(fact_recall(model, tokenizer, facts, processors, in_context=given, **options)) / len(facts)
            for given in (False, True)
        )
        records.append(RecallRecord(name, len(facts), plain, context, **model_settings(model)))
    return records


def _continued(
    model: Any, tokenizer: Any, prompts: list[str], processors: Sequence[Processor], max_new_tokens: int
) -> list[str]:
    padding = {"padding": True, "padding_side": "left"} if len(prompts) > 1 else {}
    inputs = tokenizer(prompts, return_tensors="pt", **padding).to(model.device)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "logits_processor": list(processors)}
    ids = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    texts: list[str] = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _says(text: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None
