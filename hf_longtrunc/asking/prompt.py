"""The prompt: the passages right before the question, in the model's chat template."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_longtrunc.asking.passages import Passage

PROMPT = "{passages}\n\nUsing only the passage above, answer in a few words: {question}"
_MARKS = re.compile(r"\{(?:passages|question)\}")
_WHOLE = re.compile(
    r"\b(summar\w+|synopsis|gist|main (idea|theme|point|topic|character)s?|narrator|"
    r"(whole|entire) (text|book|story|novel|document)|"
    r"what (is|was) (this|the) (text|book|story|novel|document) about)\b",
    re.IGNORECASE,
)


def check_prompt(prompt: str) -> str:
    """Return a template of a prompt.

    Raises:
        TypeError: it is no text.
        ValueError: {passages} or {question} does not stand in it exactly once.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a text with {{passages}} and {{question}} in it, got {prompt!r}")
    for mark in ("{passages}", "{question}"):
        if prompt.count(mark) != 1:
            raise ValueError(f"prompt must hold {mark} once, got it {prompt.count(mark)} times: {prompt!r}")
    return prompt


def fill_prompt(prompt: str, passages: Sequence[Passage], question: str) -> str:
    """Return the user's message: the passages, the best last, and the question; without passages the question alone."""
    if not passages:
        return question.strip()
    shown = [f"{each.source}: " * bool(each.source) + " ".join(each.text.split()) for each in passages[::-1]]
    parts = {"{passages}": "\n\n".join(shown), "{question}": question.strip()}
    return _MARKS.sub(lambda mark: parts[mark[0]], prompt)


def without_passages(prompt: str, question: str) -> str:
    """Return the user's message less the passages: its answer is the one that the model would give anyway.

    Examples:
        >>> without_passages(PROMPT, "Who was deaf?")
        'Using only the passage above, answer in a few words: Who was deaf?'
    """
    return prompt.replace("{passages}", "").replace("{question}", question.strip()).strip()


def chat_ids(tokenizer: Any, turns: Sequence[tuple[str, str]], user: str) -> list[int]:
    """Return the tokens up to where the answer begins, after earlier turns (question, answer).

    Without a chat template the turns are paragraphs, and the answer begins after "Answer:".
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        messages.append({"role": "user", "content": user})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids
    said = "".join(f"{question}\nAnswer: {answer}\n\n" for question, answer in turns)
    plain: list[int] = tokenizer(f"{said}{user}\nAnswer:", verbose=False).input_ids
    return plain


def is_about_the_whole(question: str) -> bool:
    """Whether a question asks about a text as a whole, in English words: a summary, the narrator, its theme."""
    return _WHOLE.search(question) is not None


def what_is_asked(question: str) -> str:
    """Return a question up to its last question mark, for finders: instructions that follow say nothing of the text.

    Examples:
        >>> what_is_asked("Ann had a hat. What colour was it? Answer in one word.")
        'Ann had a hat. What colour was it?'
        >>> what_is_asked("Tell me the colour of Ann's hat.")
        "Tell me the colour of Ann's hat."
    """
    end = max(question.rfind(mark) for mark in "?\uff1f\u061f")
    return question[: end + 1] if end > 0 else question
