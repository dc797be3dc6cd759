"""`ask`: find passages, read them right before the question, answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc import GuidanceLogitsProcessor
from hf_longtrunc.arguments import check_float, check_int
from hf_longtrunc.asking.index import TextIndex
from hf_longtrunc.asking.passages import CONTEXT, GUIDANCE, UNITS
from hf_longtrunc.asking.prompt import (
    PROMPT,
    chat_ids,
    check_prompt,
    fill_prompt,
    is_about_the_whole,
    what_is_asked,
    without_passages,
)
from hf_longtrunc.asking.rerank import Reranker
from hf_longtrunc.models import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers.generation.streamers import BaseStreamer

    from hf_longtrunc.asking.finders import Finder
    from hf_longtrunc.asking.passages import Passage

_SPREAD = 8  # units that stand for a whole text
NOT_FOUND = "no passage stands out; answered without the text"


@dataclass(frozen=True)
class Answer:
    """An answer with the passages it was read from.

    Attributes:
        question: as it was asked.
        text: the answer.
        passages: those that were read, the best first; the prompt has the best last.
        found: whether a passage stands out for the question. If not, the question was read alone.
        tokens_read: tokens of the prompt.
        seconds: to find, read and answer.
        peak_bytes: the most memory that this process has held by then, on a GPU if the model is there; None where
            nothing tells.
    """

    question: str
    text: str
    passages: tuple[Passage, ...]
    found: bool
    tokens_read: int
    seconds: float
    peak_bytes: int | None


def ask(
    model: Any,
    tokenizer: Any,
    text: str | Mapping[str, str] | TextIndex,
    questions: str | Sequence[str],
    *,
    finder: Finder | None = None,
    count: int = 1,
    context: int = CONTEXT,
    hops: int = 1,
    rerank: int = UNITS,
    guidance: float = GUIDANCE,
    prompt: str = PROMPT,
    follow_up: bool = False,
    before: Sequence[tuple[str, str]] = (),
    max_new_tokens: int = 64,
    on_passages: Callable[[Sequence[Passage]], object] | None = None,
    streamer: BaseStreamer | None = None,
    progress: bool = False,
) -> list[Answer]:
    """Answer questions about a text of any length: find the passages that stand out, and let the model read only those.

    The model reads a few hundred tokens a question however long the text is. Where no passage stands out it is asked
    without the text, and `Answer.found` says so. A question about the whole text (a summary, the narrator) reads eight
    units at even distances; a small model answers few of these.

    Args:
        model: a causal LM that generates; it decodes greedily, in eval mode.
        tokenizer: of it; its chat template is used if it has one.
        text: one text, documents by name, or a `TextIndex` that was made or loaded before.
        questions: one or several.
        finder: finds the passages; None takes `default_finder()`. Not with a `TextIndex`.
        count: passages at most. More than one made SmolLM2-135M-Instruct answer worse.
        context: a unit is read with the one before or after it, each of at most so many characters, if the question
            becomes likelier with it; the one after it also if it begins with a pronoun such as "it".
        hops: 2 looks again with the words of the first passage, and reads both.
        rerank: the model compares so many of the finder's best units, see `Reranker`; 1 takes the finder's best.
        guidance: an answer's probabilities are p(passage, question)^guidance / p(question)^(guidance - 1), so that what
            the model would say anyway counts less (Shi et al. 2024, equation 4, whose alpha is guidance - 1). 1 leaves
            this out; else a token costs a second forward.
        prompt: holds {passages} and {question}.
        follow_up: each question may refer to the one before it, and is read with that turn if it does. Other questions
            are read alone, as earlier turns made the answers of SmolLM2-135M-Instruct worse.
        before: questions and answers of earlier calls, which the first question may refer to.
        max_new_tokens: of an answer.
        on_passages: called with the passages of a question before its answer is generated.
        streamer: gets the tokens of the answers as they are made.
        progress: show a bar while the text is indexed.

    Returns:
        An answer a question.

    Raises:
        TypeError: an argument of another kind; an encoder-decoder.
        ValueError: an empty text or question, a prompt without its two marks, a finder together with an index.

    Examples:
        >>> from hf_longtrunc import load_pretrained
        >>> model, tokenizer = load_pretrained()  # doctest: +SKIP
        >>> ask(model, tokenizer, novel, "Who stole the bishop's peacock?")[0].text  # doctest: +SKIP
    """
    _check_model(model, tokenizer)
    if not isinstance(questions, Iterable):
        raise TypeError(f"questions must be a text or a list of texts, got {questions!r}")
    asked = [questions] if isinstance(questions, str) else list(questions)
    for question in asked:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"questions must be texts that ask something, got {question!r}")
    check_prompt(prompt)
    for name, value, least in (("count", count, 1), ("context", context, 0), ("max_new_tokens", max_new_tokens, 1)):
        check_int(name, value, minimum=least)
    check_int("hops", hops, minimum=1, maximum=2)
    check_float("guidance", guidance, minimum=0)
    if isinstance(text, TextIndex):
        if finder is not None:
            raise ValueError("finder goes with a text: a TextIndex has its own finder already")
        index = text
    else:
        index = TextIndex(text, default_finder() if finder is None else finder, progress=progress)
    reranker = Reranker(model, tokenizer, check_int("rerank", rerank, minimum=1))
    turns, answers = [_turn(each) for each in before], []
    with evaluating(model):
        for question in asked:
            since = time.perf_counter()
            passages, read_with = find_passages(
                index, question, turns, count=count, context=context, hops=hops, reranker=reranker
            )
            if on_passages is not None:
                on_passages(passages)
            ids = chat_ids(tokenizer, read_with, fill_prompt(prompt, passages, question))
            alone = chat_ids(tokenizer, read_with, without_passages(prompt, question)) if passages else []
            said = _greedy(model, ids, alone, guidance, max_new_tokens, streamer)
            answer = str(tokenizer.decode(said, skip_special_tokens=True)).strip()
            if follow_up:
                turns.append((question, answer))
            seconds, memory = time.perf_counter() - since, peak_bytes(model)
            answers.append(Answer(question, answer, tuple(passages), bool(passages), len(ids), seconds, memory))
    return answers


def find_passages(
    index: TextIndex,
    question: str,
    turns: Sequence[tuple[str, str]] = (),
    *,
    count: int = 1,
    context: int = CONTEXT,
    hops: int = 1,
    reranker: Reranker | None = None,
) -> tuple[list[Passage], list[tuple[str, str]]]:
    """Return the passages for a question, the best first, and the turn before it if it is a follow-up; see `ask`."""
    if is_about_the_whole(question):
        return index.spread(_SPREAD), []
    how: dict[str, Any] = {"count": count, "context": context, "hops": hops, "reranker": reranker}
    asked = what_is_asked(question)
    subject = index.subject(asked, [what_is_asked(said) for said, _ in turns])
    found, before = index.find(asked, **how), []
    if subject is not None:
        following = index.find(asked, before=subject, **how)
        if following and (not found or following[0].score >= found[0].score):
            found, before = following, list(turns[-1:])
    return found, before


def default_finder(encoder: str | None = None) -> Finder:
    """Return the finder that found most on wordings that nothing was chosen on: by meaning, and a little by words.

    Args:
        encoder: a hub id or a folder; None takes all-MiniLM-L6-v2.
    """
    from hf_longtrunc.asking.finders import BM25, Fused, SentenceEncoder
    from hf_longtrunc.pretrained import load_encoder

    return Fused(SentenceEncoder(*load_encoder(encoder)), BM25())


def peak_bytes(model: Any) -> int | None:
    """Return the most memory that this process has held, on a GPU if the model is there; None where nothing tells."""
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    try:
        import resource
    except ImportError:  # on Windows
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(held) * (1 if sys.platform == "darwin" else 2**10)


def _check_model(model: Any, tokenizer: Any) -> None:
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise TypeError(
            f"model must be a transformers causal LM, got {model if isinstance(model, str) else type(model).__name__}; "
            "load one with load_pretrained(name)"
        )
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"model must be a causal LM, got {type(model).__name__}, an encoder-decoder: with Unlimiformer() it reads "
            "a text of any length itself"
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer must be the model's tokenizer, got {type(tokenizer).__name__}")


def _turn(turn: Any) -> tuple[str, str]:
    if isinstance(turn, str) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
        raise TypeError(f"before must hold pairs of a question and its answer, got {turn!r}")
    question, answer = turn
    return question, answer


def _greedy(
    model: Any, ids: list[int], alone: list[int], guidance: float, max_new_tokens: int, streamer: BaseStreamer | None
) -> list[int]:
    prompt = torch.tensor([ids], device=model.device)
    guided = []
    if alone and guidance != 1:
        guided.append(GuidanceLogitsProcessor(model, guidance, prompt, torch.tensor([alone], device=model.device)))
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        logits_processor=guided,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    answer: list[int] = output[0, len(ids) :].tolist()
    return answer
