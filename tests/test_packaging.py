"""What a package index shows: links that it can follow, made from one setting."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.test_docs import ROOT

METADATA = runpy.run_path(str(ROOT / "scripts" / "metadata.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("repository", ["", "https://example.org/who/hf_longtrunc/"])
def test_the_readme_of_a_package_has_no_relative_target(tmp_path, repository):
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    metadata: dict = {}
    METADATA["Metadata"](str(tmp_path), {"repository": repository}).update(metadata)
    text = metadata["readme"]["text"]
    assert not re.findall(r"\]\((?!https?://|#)", text)
    assert len(text.split()) > 0.9 * len(README.split())
    base = repository.rstrip("/")
    assert ("urls" in metadata) == bool(repository)
    if repository:
        assert metadata["urls"]["Issues"] == f"{base}/issues"
        assert f"({base}/raw/HEAD/docs/evidence/perplexity/perplexity.png)" in text
        assert f"({base}/blob/HEAD/docs/choosing.md)" in text
