"""A long English text that every Python brings along, for a demonstration without a network."""

from __future__ import annotations

from importlib import import_module


def python_reference() -> str:
    """Return the language reference that `help()` reads from, every paragraph once: about 400,000 characters.

    It is technical prose with code in it, the same for all users of one Python version and slightly different in the
    next. A model has very likely seen it in training, so its perplexity is low and says nothing about the model; how
    it changes with the position still does.

    Raises:
        FileNotFoundError: this Python was installed without `pydoc_data`.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise FileNotFoundError("this Python has no pydoc_data.topics to take a text from: name a text file") from error
    paragraphs = "\n\n".join(topics[name].strip() for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))
