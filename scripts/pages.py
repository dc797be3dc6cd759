"""Hooks of MkDocs: formulas as MathML, links of notebooks, addresses from pyproject.toml, a word on own models."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OWN_MODEL = "howto/your_model.md"
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def on_config(config: Any) -> Any:
    """Let a fenced block called `math` hold a formula in LaTeX, and set the addresses."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    addresses = project["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    set_addresses(config, addresses["repository"], addresses["documentation"])
    return config


def set_addresses(config: Any, repository: str, documentation: str) -> None:
    """Set the link to the repository, and the address from which sitemap.xml is made; an empty one sets nothing."""
    if repository:
        config.repo_url, config.repo_name = repository, "Repository"
    if documentation:
        config.site_url = documentation.rstrip("/") + "/"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Say on each page that loads the default model what it is, and how to take another."""
    source = page.file.src_uri
    if "load_pretrained()" not in markdown or source.endswith((".ipynb", OWN_MODEL)):
        return markdown
    link = "../" * source.count("/") + OWN_MODEL
    return f"{markdown}\n\n*`load_pretrained()` loads a small model for trying things: [take your own]({link}).*\n"


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Let a notebook's links to pages, which work in a checkout, work in the built site too."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="((?:\.\./)+[\w/-]+)\.md(#[\w-]+)?"', r'href="../\1/\2"', html)


def formula(source: str, *_: Any, **__: Any) -> str:
    """Return the MathML of one formula on a line of its own, which a narrow page scrolls."""
    return f'<div class="formula">{convert(source, display="block")}</div>'
