"""Formulas on the pages as MathML, which browsers draw by themselves: no script, no network. A hook of MkDocs."""

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Let a fenced block called `math` hold a formula in LaTeX."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def formula(source: str, *_: Any, **__: Any) -> str:
    """Return the MathML of one formula on a line of its own, which a narrow page scrolls."""
    return f'<div class="formula">{convert(source, display="block")}</div>'
