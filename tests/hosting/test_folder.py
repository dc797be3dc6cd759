"""Exported folders: what is in them, how they are checked, what is refused."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_longtrunc import DualChunkAttention, LMInfinite, StreamingLLM, TopBlocks, TopK
from hf_longtrunc.hosting import HostSettings, export, serve, verify_export
from tests.command_line import invoke, model_folder  # noqa: F401

TECHNIQUE = LMInfinite(num_sink_tokens=4, window_length=32)


@pytest.mark.parametrize(
    "settings",
    [
        HostSettings(technique=LMInfinite(window_length=7)),
        HostSettings(technique=LMInfinite(window_length=9, retrieval=TopK(k=3, rows=None)), sampler="eta=0.002"),
        HostSettings(
            technique=DualChunkAttention(retrieval=TopBlocks(ending_ids=(5, 6))),
            sampler="p-less",
            cache_bytes=0,
        ),
        HostSettings(technique=StreamingLLM(window_length=9), finder="bm25"),
    ],
    ids=repr,
)
def test_settings_come_back(settings):
    assert HostSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "must be JSON with a format number"),
        ("[]", "must be JSON with a format number"),
        ('{"format": 2}', "format 2, this version of hf_longtrunc reads 1: upgrade"),
        ('{"format": 1}', "cannot read the settings"),
        ('{"format": 1, "technique": {"name": "lm-infinite", "future": 3}}', "cannot read the settings.*future"),
        ('{"format": 1, "technique": {"name": "os.system"}}', "cannot read the settings.*os.system"),
        ('{"format": 1, "technique": {"name": "top-k"}}', "technique must be one of LMInfinite"),
        ('{"format": 1, "technique": {"name": "dual-chunk"}, "sampler": "etta"}', "sampler must be a name or NAME=NUM"),
        ('{"format": 1, "technique": {"name": "lm-infinite"}}', "must have a window_length here"),
    ],
)
def test_settings_that_cannot_be_read(text, said):
    with pytest.raises(ValueError, match=said):
        HostSettings.from_json(text)


def test_what_is_in_a_folder(model_folder, tmp_path):  # noqa: F811
    made = export(model_folder, tmp_path / "out", TECHNIQUE, sampler="eta=0.01")
    assert (made.folder / "model.safetensors").is_symlink()
    assert not (made.folder / "config.json").is_symlink()
    card = (made.folder / "README.md").read_text()
    for part in (
        made.sha256,
        "the first 4 and the last 32 tokens",
        '"sampler": "eta=0.01"',
        "To undo it",
        "2308.16137",
    ):
        assert part in card
    config = GenerationConfig.from_pretrained(made.folder)
    assert (config.do_sample, config.top_k, config.top_p) == (True, 0, 1.0)
    copied = export(model_folder, tmp_path / "copied", LMInfinite(), weights="copy")
    assert copied.settings.technique == LMInfinite(window_length=256)  # the trained one, from the config
    streaming = export(model_folder, tmp_path / "streaming", StreamingLLM(), weights="none")
    assert streaming.settings.technique.window_length == 256 - 4  # its sinks are counted too
    assert not any(path.is_symlink() for path in copied.folder.rglob("*"))
    assert (copied.folder / "generation_config.json").read_bytes() == (
        (tmp_path / ".." / model_folder / "generation_config.json").read_bytes()
    )
    state, own = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (copied.folder, model_folder))
    assert all(bool((state[name] == own[name]).all()) for name in own)
    assert list(tmp_path.glob(".*")) == []


def test_the_sampler_joins_what_is_sampled(model_folder, tmp_path):  # noqa: F811
    made = export(model_folder, tmp_path / "out", TECHNIQUE, sampler="top-n-sigma=0.0001")
    model = AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=True).eval()
    ids = model.dummy_inputs["input_ids"][:1]
    drawn = [model.generate(ids, max_new_tokens=5).tolist() for _ in range(2)]  # nothing but the first token is kept
    assert drawn == 2 * [model.generate(ids, max_new_tokens=5, do_sample=False).tolist()]


def test_verify(model_folder, tmp_path):  # noqa: F811
    made = export(model_folder, tmp_path / "out", TECHNIQUE)
    assert verify_export(made.folder) == made
    code = made.folder / "custom_generate" / "generate.py"
    written = code.read_text()
    for changed in (
        written.replace("return hosted_generate", "print(1); return hosted_generate"),
        written + "\n",
        written.replace('"window_length": 32', '"window_length":  32'),
    ):
        code.write_text(changed)
        with pytest.raises(ValueError, match="is not what this version of hf_longtrunc writes"):
            verify_export(made.folder)
    for broken in ("def", "SETTINGS = open('x')", "x = 1"):
        code.write_text(broken)
        with pytest.raises(ValueError, match="is no code that hf_longtrunc wrote"):
            verify_export(made.folder)
    code.write_text(written.replace('"window_length": 32', '"window_length": 64'))
    assert verify_export(made.folder).sha256 != made.sha256  # other settings: the file of those
    code.write_text(written)
    (made.folder / "modeling.py").write_text("")
    with pytest.raises(ValueError, match=r"holds other code: modeling\.py"):
        verify_export(made.folder)
    (made.folder / "modeling.py").unlink()
    (made.folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "a/b--c.D"}}))
    with pytest.raises(ValueError, match="names code of the model's own"):
        verify_export(made.folder)


def test_refusals(model_folder, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(TypeError, match=r"technique must be one of LMInfinite\(...\), StreamingLLM"):
        export(model_folder, tmp_path / "out", TopK())
    with pytest.raises(TypeError, match="technique must be one of"):
        export(model_folder, tmp_path / "out", LMInfinite)
    with pytest.raises(ValueError, match="weights must be one of"):
        export(model_folder, tmp_path / "out", TECHNIQUE, weights="move")
    with pytest.raises(FileNotFoundError, match="a model is a folder or a hub id"):
        export(tmp_path / "none", tmp_path / "out", TECHNIQUE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        export(model_folder, tmp_path / "full", TECHNIQUE)
    made = export(model_folder, tmp_path / "out", TECHNIQUE, weights="copy")
    with pytest.raises(ValueError, match="was exported already"):
        export(made.folder, tmp_path / "again", TECHNIQUE)
    (made.folder / "custom_generate" / "generate.py").rename(made.folder / "modeling.py")
    with pytest.raises(ValueError, match="code of the model's own"):
        export(made.folder, tmp_path / "again", TECHNIQUE)
    with pytest.raises(FileNotFoundError, match="is no exported folder"):
        verify_export(model_folder)
    for broken in ({"finder": "bm52"}, {"finder": "bm25", "technique": DualChunkAttention()}):
        with pytest.raises(ValueError, match=r"finder must be one of 'encoder', 'bm25'|finder goes with LMInfinite"):
            export(model_folder, tmp_path / "x", **{"technique": TECHNIQUE, **broken})
    with pytest.raises(FileNotFoundError, match="holds code alone: export it with weights"):
        serve(export(model_folder, tmp_path / "code", TECHNIQUE, weights="none").folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="model 'no/such' could not be fetched"):
        export("no/such", tmp_path / "x", TECHNIQUE)
    assert not (tmp_path / "again").exists()


def test_the_command_line(model_folder, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    said = invoke("export", model_folder, out, "--window", 32, "--sinks", 4, "--sampler", "eta=0.002")
    made = verify_export(out)
    assert made.settings == HostSettings(technique=TECHNIQUE, sampler="eta=0.002")
    assert made.sha256 in said.stdout
    assert made.sha256 in invoke("verify", out, "--sha256", made.sha256).stdout
    refused = invoke("verify", out, "--sha256", "0" * 64)
    assert refused.exit_code == 2
    assert f"has code with SHA-256 {made.sha256}" in refused.stderr
    assert invoke("export", model_folder, out).exit_code == 2
    assert invoke("export", model_folder, tmp_path / "x", "--technique", "dual-chunk", "--window", 3).exit_code == 2
    assert invoke("export", model_folder, tmp_path / "x", "--finder", "bm25").exit_code == 2
    for retrieval in ("passages", "for-chat"):
        technique = {"passages": "dual-chunk", "for-chat": "streaming-llm"}[retrieval]
        result = invoke("export", model_folder, tmp_path / "x", "--technique", technique, "--retrieval", retrieval)
        assert result.exit_code == 2
        assert f"{retrieval} does not go with --technique {technique}" in result.stderr
    passages = ("--retrieval", "passages", "--finder", "bm25", "--weights", "none")
    told = invoke("export", model_folder, tmp_path / "x", "--window", 32, *passages)
    assert "next: model.generate(ids, custom_generate=" in told.stderr
    assert verify_export(tmp_path / "x").settings.finder == "bm25"
    assert json.loads(invoke("verify", out, "--json").stdout)["technique"] == repr(TECHNIQUE)
