"""What a package index shows: links that it can follow, made from one setting."""

from __future__ import annotations

import re
import runpy
from types import SimpleNamespace

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


def test_the_pages_link_to_the_repository_and_have_a_sitemap_once_addresses_are_set():
    hooks = runpy.run_path(str(ROOT / "scripts" / "pages.py"))
    for repository, documentation in [("", ""), ("https://example.org/who/what", "https://example.org/pages")]:
        config = SimpleNamespace(repo_url=None, repo_name=None, site_url=None)
        hooks["set_addresses"](config, repository, documentation)
        assert config.repo_url == (repository or None)
        assert config.site_url == (f"{documentation}/" if documentation else None)


def test_a_notebook_links_to_pages_from_where_it_is_built():
    hooks = runpy.run_path(str(ROOT / "scripts" / "pages.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri="notebooks/sampling.ipynb"))
    built = hooks["on_page_content"]('<a href="../eta.md">, <a href="../results/sampling.md#which-sampler">', page)
    assert built == '<a href="../../eta/">, <a href="../../results/sampling/#which-sampler">'


@pytest.mark.parametrize("source", ["eta.md", "howto/add_a_sampler.md"])
def test_a_page_with_the_default_model_says_how_to_take_another(source):
    hooks = runpy.run_path(str(ROOT / "scripts" / "pages.py"))
    page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
    link = "../" * source.count("/") + "howto/your_model.md"
    assert f"]({link})" in hooks["on_page_markdown"]("model, tokenizer = load_pretrained()", page)
    assert hooks["on_page_markdown"]("no model", page) == "no model"
