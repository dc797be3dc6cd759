"""Package metadata that depend on where the repository is published: `repository` in pyproject.toml is the one place.

Hatchling calls it at every build. Relative targets of README.md, which a package index cannot follow, become absolute
ones; where no repository is set, links become their text, and pictures go.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = {
    "Homepage": "",
    "Documentation": "/tree/HEAD/docs",
    "Source": "",
    "Changelog": "/blob/HEAD/docs/changelog.md",
    "Issues": "/issues",
}


class Metadata(MetadataHookInterface):
    """Sets the project's URLs and its long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Change the metadata of pyproject.toml in place."""
        repository = str(self.config["repository"]).rstrip("/")
        if repository:
            metadata["urls"] = {name: repository + page for name, page in PAGES.items()}
            if documentation := str(self.config.get("documentation", "")):
                metadata["urls"]["Documentation"] = documentation
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository)}


def absolute(text: str, repository: str) -> str:
    """Return Markdown without relative targets."""

    def replaced(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if not repository:
            return "" if mark else label
        return f"{mark}[{label}]({repository}/{'raw' if mark else 'blob'}/HEAD/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", replaced, text)
