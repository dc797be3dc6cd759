"""Token ids as text, a piece a token: for a page or a screen that shows tokens as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_UNFINISHED = "\ufffd"  # what a decoder puts where bytes make no character
_LONGEST = 8  # tokens: a character that so many do not finish is none


def pieces(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text that each token adds to the tokens before it, its leading space included.

    A token that ends inside a character adds nothing, and the one that ends the character adds all of it. Holds a few
    tokens at a time, so `ids` may be without end.
    """
    before = _before(tokenizer)
    start = len(_decoded(tokenizer, before))
    waiting: list[int] = []
    for token in ids:
        waiting.append(int(token))
        text = _decoded(tokenizer, before + waiting)[start:]
        if text.endswith(_UNFINISHED) and len(waiting) < _LONGEST:
            yield ""
        else:
            yield text
            waiting = []


def piece_by_token(tokenizer: Any, tokens: Iterable[int]) -> dict[int, str]:
    """Return what each token adds to a word before it; "#17" for a token 17 that adds nothing."""
    before = _before(tokenizer)
    start = len(_decoded(tokenizer, before))
    return {token: _decoded(tokenizer, [*before, token])[start:] or f"#{token}" for token in tokens}


def _before(tokenizer: Any) -> list[int]:
    """Return tokens to decode before others: many tokenizers strip the space that a text begins with."""
    return list(tokenizer("a", add_special_tokens=False)["input_ids"])


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
