"""A tokenizer's chat template, taken apart where a user's texts stand in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def template_parts(tokenizer: Any, messages: Sequence[dict[str, str]], *marks: str) -> list[str]:
    """Return the template's text before, between and after `marks` in a conversation, up to the answer.

    Args:
        tokenizer: has a chat template.
        messages: the conversation; each mark stands once in it.
        marks: in the order of the conversation.

    Raises:
        ValueError: the chat template drops or repeats a mark.
    """
    rest = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    if any(rest.count(mark) != 1 for mark in marks):
        raise ValueError("the tokenizer's chat template does not repeat what a user says: take another tokenizer")
    parts = []
    for mark in marks:
        part, _, rest = rest.partition(mark)
        parts.append(part)
    return [*parts, rest]
