"""Answer a chat that is longer than the window from the passage that its last question asks for.

A host passes a prompt as tokens. The chat template separates the user's messages, which are searched; the end of the
last one is the question. The question and the best passage become a short chat, which the model reads instead.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hf_longtrunc import BM25, Passage, SentenceEncoder, TextIndex, load_encoder
from hf_longtrunc.asking.passages import CONTEXT, LONGEST, sentence_spans
from hf_longtrunc.asking.prompt import PROMPT, fill_prompt, is_about_the_whole
from hf_longtrunc.asking.rerank import Reranker
from hf_longtrunc.templates import template_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from hf_longtrunc.asking.finders import Finder

FINDERS = ("encoder", "bm25")
_MARKS = ("longtrunc-question", "longtrunc-answer", "longtrunc-follow-up")
_APART = re.compile("([.!?\u2026\u3002\"'\u201d\u2019)\\]]|\n[ \t]*\n)\\s*$")
_TEXTS = 32  # indexed messages that are kept, for the next question about them


class Chat(NamedTuple):
    """A rendered chat, taken apart.

    Attributes:
        head: the text before the user's first message, such as a system prompt.
        opens: the template's text before a message of the user.
        messages: those of the user.
        closes: the template's text between the last message and the answer.
    """

    head: str
    opens: str
    messages: list[str]
    closes: str


def find_and_shorten(
    model: Any, tokenizer: Any, ids: Tensor, finder: str, salt: object
) -> tuple[Tensor, list[Passage]] | None:
    """Return a shorter prompt [1, m] with the passage that a prompt's last question points at, and that passage.

    Args:
        model: that answers; it compares the best passages, see `hf_longtrunc.asking.rerank`.
        tokenizer: of it.
        ids: a prompt [1, n]: a chat rendered by the tokenizer's template, or a text if it has none.
        finder: one of `FINDERS`.
        salt: texts that were indexed before are found by calls of the same salt.

    Returns:
        (ids, []) if no passage stands out; None if no question is found, or one about the whole text.
    """
    chat = parse_chat(tokenizer, ids[0].tolist())
    span = question_span(chat.messages[-1]) if chat is not None else None
    if chat is None or span is None:
        return None
    question = chat.messages[-1][slice(*span)]
    if is_about_the_whole(question):
        return None
    reranker, best = Reranker(model, tokenizer), list[Passage]()
    for number, document in searched(chat.messages):
        for passage in indexed(document, finder, salt).find(question, context=CONTEXT, reranker=reranker):
            if not best or passage.score > best[0].score:
                best = [replace(passage, source=str(number))]
    if not best:
        return ids, []
    message = fill_prompt(PROMPT, [replace(best[0], source="")], question)
    text = f"{chat.head}{chat.opens}{message}{chat.closes}"
    short = tokenizer(text, add_special_tokens=not chat.opens, return_tensors="pt", verbose=False).input_ids
    return short.to(ids.device), best


def parse_chat(tokenizer: Any, ids: list[int]) -> Chat | None:
    """Return the parts of a prompt; None if the tokenizer's chat template did not make it."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    text = tokenizer.decode(ids, skip_special_tokens=not has_template, clean_up_tokenization_spaces=False)
    if not has_template:
        return Chat("", "", [text], "\nAnswer:")
    from jinja2 import TemplateError

    turns = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), _MARKS, strict=True)]
    try:
        first, between, again, closes = template_parts(tokenizer, turns, *_MARKS)
    except (ValueError, TemplateError):
        return None
    shared = next((n for n in range(len(again), 0, -1) if first.endswith(again[-n:])), 0)
    opens = again[len(again) - shared :]
    ends = "|".join(re.escape(each) for each in (closes, between))
    messages = re.findall(f"{re.escape(opens)}(.*?)(?:{ends})", text, re.DOTALL) if opens else []
    if not messages or text.count(opens) != len(messages) or not text.endswith(closes):
        return None
    return Chat(text.partition(opens)[0], opens, messages, closes)


def question_span(message: str) -> tuple[int, int] | None:
    r"""Return (start, end) of the question in a message; None if none is seen.

    A message of at most 600 characters is the question if it has a question mark or more than five words: "Thank you."
    asks nothing. Of a longer one the question is the last line, the first line or the last sentence that ends in a
    question mark, in this order, or else a last line of more than five words after a blank one or the end of a
    sentence.

    Examples:
        >>> message = "It rained, and nobody went out. " * 30 + "\nWho went out?"
        >>> message[slice(*question_span(message))]
        'Who went out?'
    """
    if len(message) <= LONGEST:
        return (0, len(message)) if _asks(message) else None
    lines = [found.span() for found in re.finditer(r"\S[^\n]*", message)]
    *_, sentence = sentence_spans(message)
    for start, end in (lines[-1], lines[0], sentence):
        if end - start <= LONGEST and message[start:end].rstrip().endswith("?"):
            return start, end
    start, end = lines[-1]
    is_apart = _APART.search(message[:start]) is not None
    return (start, end) if is_apart and end - start <= LONGEST and _asks(message[start:end]) else None


def _asks(text: str) -> bool:
    return "?" in text or "\uff1f" in text or len(text.split()) > 5


def searched(messages: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the messages that are searched, their questions blanked, so that positions stay."""
    for number, message in enumerate(messages):
        start, end = question_span(message) or (0, 0)
        if end - start == len(message):  # a short one: said, unless it asks or is the question
            is_said = number < len(messages) - 1 and not message.rstrip().endswith("?")
            start, end = (0, 0) if is_said else (start, end)
        document = f"{message[:start]}{' ' * (end - start)}{message[end:]}".rstrip()
        if document:
            yield number, document


@lru_cache(maxsize=_TEXTS)
def indexed(document: str, finder: str, salt: object) -> TextIndex:
    """Return the index of a message; the last ones are kept for calls of the same salt."""
    return TextIndex(document, _finder(finder))


@lru_cache(maxsize=len(FINDERS))
def _finder(name: str) -> Finder:
    if name == "bm25":
        return BM25()
    with torch.inference_mode(False):
        return SentenceEncoder(*load_encoder())
