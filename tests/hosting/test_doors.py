"""An exported folder in each host that loads it: every door answers as the context manager does."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TextIteratorStreamer, pipeline

from hf_longtrunc import DualChunkAttention, LMInfinite
from hf_longtrunc.hosting import export, serve
from tests.command_line import invoke, letter_tokenizer
from tests.conftest import tiny_config
from tests.hosting.server import served

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,"
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
TECHNIQUES = {
    "lm-infinite": LMInfinite(num_sink_tokens=4, window_length=32),
    "dual-chunk": DualChunkAttention(chunk_length=24, trained_length=32),
}
NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = letter_tokenizer(["<pad>", "<s>", "</s>", "<unk>"], LETTERS)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "</s>"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def modules_elsewhere(tmp_path, monkeypatch):
    """Where transformers copies code that it is told to trust."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(params=TECHNIQUES)
def exported(request, chat_folder, tmp_path):
    return export(chat_folder, tmp_path / "exported", TECHNIQUES[request.param])


def prompts(count: int) -> list[str]:
    """Texts of 60 to 160 letters, past the window of 32."""
    letters = torch.randint(0, len(LETTERS), (count, 160), generator=torch.Generator().manual_seed(5)).tolist()
    return ["".join(LETTERS[i] for i in row[: 60 + 5 * number]) for number, row in enumerate(letters)]


def expected(folder, technique, texts: list[str]) -> list[list[int]]:
    """What each text alone gets inside the context manager."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with technique(model):
        made = [model.generate(**tokenizer(text, return_tensors="pt"), **NEW)[0, len(text) :] for text in texts]
    return [each.tolist() for each in made]


def test_the_doors_of_generate_and_from_pretrained(exported, chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    texts = prompts(5)
    wanted = expected(chat_folder, exported.settings.technique, texts)
    plain = AutoModelForCausalLM.from_pretrained(chat_folder).eval()
    loaded = AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=True).eval()
    door = {"custom_generate": str(exported.folder), "trust_remote_code": True}
    for text, tokens in zip(texts, wanted, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert plain.generate(**inputs, **NEW, **door)[0, len(text) :].tolist() == tokens
        assert loaded.generate(inputs.input_ids, **NEW)[0, len(text) :].tolist() == tokens  # by position
        assert loaded.generate(**inputs, **NEW)[0, len(text) :].tolist() == tokens  # from the kept cache
        assert plain.generate(**inputs, **NEW)[0, len(text) :].tolist() != tokens  # unmodified: past what it can
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    assert loaded.generate(**batch, **NEW)[:, batch.input_ids.shape[1] :].tolist() == wanted


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together")  # pipelines, before 5.24
def test_the_door_of_pipelines(exported, chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    texts = prompts(4)
    wanted = expected(chat_folder, exported.settings.technique, texts)
    pipe = pipeline("text-generation", model=str(exported.folder), trust_remote_code=True)
    options = {"add_special_tokens": False, **NEW}
    for text, tokens in zip(texts, wanted, strict=True):
        (made,) = pipe(text, return_tensors=True, **options)
        assert made["generated_token_ids"][len(text) :] == tokens
    batch = pipe(texts, batch_size=2, return_tensors=True, **options)
    assert [made[0]["generated_token_ids"][-NEW["max_new_tokens"] :] for made in batch] == wanted
    chat = [{"role": "user", "content": texts[0]}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, return_tensors="pt").input_ids
    with exported.settings.technique(pipe.model):
        answer = type(pipe.model).generate(pipe.model, ids, **NEW)[0]
    assert pipe(chat, return_tensors=True, **options)[0]["generated_token_ids"] == answer.tolist()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    pipe(texts[1], streamer=streamer, **options)
    assert "".join(streamer) == tokenizer.decode(wanted[1])


def test_the_door_of_lm_eval(exported, chat_folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="the lm-eval extra is not installed")
    from lm_eval.api.instance import Instance

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    texts = prompts(4)
    wanted = [
        tokenizer.decode(each, skip_special_tokens=True)
        for each in expected(chat_folder, exported.settings.technique, texts)
    ]
    lm = huggingface.HFLM(
        pretrained=str(exported.folder), trust_remote_code=True, max_length=100_000, batch_size=2, device="cpu"
    )
    asked = [
        Instance("generate_until", {}, (text, {"until": ["<none>"], "max_gen_toks": 6, "do_sample": False}), number)
        for number, text in enumerate(texts)
    ]
    assert lm.generate_until(asked) == wanted


def test_the_door_of_serve(exported, chat_folder):
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    openai = pytest.importorskip("openai", reason="transformers[serving] is not installed")
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    texts = prompts(3)
    rendered = [f"<s>{text}</s><s>" for text in texts]
    model = AutoModelForCausalLM.from_pretrained(chat_folder).eval()
    with exported.settings.technique(model):
        ids = [tokenizer(text, return_tensors="pt").input_ids for text in rendered]
        made = [model.generate(each, **NEW)[0, each.shape[1] :] for each in ids]
    wanted = [tokenizer.decode(each, skip_special_tokens=True) for each in made]
    with served(exported.folder) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client:
        for text, prompt, answer in zip(texts, ids, wanted, strict=True):
            asked = {
                "model": str(exported.folder),
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 6,
                "temperature": 0,
            }
            reply = client.chat.completions.create(**asked)
            assert reply.choices[0].message.content == answer
            assert reply.usage.prompt_tokens == prompt.shape[1]
            parts = client.chat.completions.create(stream=True, **asked)
            assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == answer


def test_answers_of_our_serve_say_what_was_read(chat_folder, tmp_path):
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    made = export(chat_folder, tmp_path / "exported", TECHNIQUES["lm-infinite"])
    openai = pytest.importorskip("openai", reason="transformers[serving] is not installed")
    with served(made.folder, serve) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client:
        asked = {"model": str(made.folder), "max_tokens": 3, "temperature": 0}
        for length in (10, 100):
            messages = [{"role": "user", "content": "a" * length}]
            reply = client.chat.completions.create(messages=messages, **asked)
            read = reply.usage.prompt_tokens
            said = {"read": read, "kept": min(read, 36), "forgotten": max(0, read - 36), "window": 32}
            assert reply.longtrunc == said
            *before, last = client.chat.completions.create(messages=messages, stream=True, **asked)
            assert last.longtrunc == said
            assert not any(hasattr(part, "longtrunc") for part in before)
            assert client.completions.create(prompt="a" * length, **asked).longtrunc["read"] == length
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(messages=messages, **{**asked, "model": "another"})


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together")  # pipelines, before 5.24
def test_the_page(chat_folder, tmp_path, monkeypatch, capsys):
    """Its blocks in their order, as a reader runs them: export in the shell, then every host, with a server."""
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    monkeypatch.setattr("hf_longtrunc.pretrained.default_model_folder", lambda: chat_folder)
    monkeypatch.setattr("hf_longtrunc.pretrained.default_encoder_folder", lambda: chat_folder)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
    lines = re.findall(r"^hf-longtrunc (export [^#\n]*)", page, re.MULTILINE)
    assert [invoke(*line.split()).exit_code for line in lines] == [0, 0]
    blocks = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    with served("endless", serve) as address:
        left: list[dict[str, object]] = [{} for _ in blocks]  # a client that a block leaves open is seen by served()
        for block, names in zip(blocks, left, strict=True):
            exec(compile(block.replace("http://localhost:8000", address), "<documentation>", "exec"), names)
        (body,) = re.findall(r"-d '(.*?)'", page)
        asked = urllib.request.Request(
            f"{address}/v1/chat/completions", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as reply:
            assert json.load(reply)["longtrunc"]["window"] == 1024
    assert "'window': 1024" in capsys.readouterr().out


def test_a_folder_of_code_alone(chat_folder, tmp_path):
    made = export(chat_folder, tmp_path / "code", TECHNIQUES["lm-infinite"], weights="none")
    assert sorted(str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()) == [
        "README.md",
        "custom_generate/generate.py",
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    (text,) = prompts(1)
    answer = model.generate(
        **tokenizer(text, return_tensors="pt"), **NEW, custom_generate=str(made.folder), trust_remote_code=True
    )
    assert [answer[0, len(text) :].tolist()] == expected(chat_folder, TECHNIQUES["lm-infinite"], [text])


def test_without_the_package_the_folder_says_so(chat_folder, tmp_path, monkeypatch):
    made = export(chat_folder, tmp_path / "exported", TECHNIQUES["lm-infinite"])
    monkeypatch.setitem(sys.modules, "hf_longtrunc.hosting", None)
    AutoModelForCausalLM.from_pretrained(made.folder)
    with pytest.raises(ImportError, match="through the Python package hf_longtrunc, which is missing here or too old"):
        AutoModelForCausalLM.from_pretrained(made.folder, trust_remote_code=True)
