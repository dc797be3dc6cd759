"""A long English text that ships with Python, for examples without a network."""

from __future__ import annotations

from importlib import import_module


def python_reference() -> str:
    """Return the language reference of `help()`, each paragraph once: about 400,000 characters of prose and code.

    Models have very likely seen it in training: its perplexity is low; compare it at different positions only.

    Raises:
        FileNotFoundError: this Python was installed without `pydoc_data`.

    Examples:
        >>> len(python_reference()) > 300_000
        True
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise FileNotFoundError("this Python has no pydoc_data.topics to take a text from: name a text file") from error
    paragraphs = "\n\n".join(topics[name].strip() for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))
