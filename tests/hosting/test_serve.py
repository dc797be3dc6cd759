"""`hf-longtrunc serve`: passages on request, several clients at once, and a server that is killed."""

from __future__ import annotations

import hashlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import LMInfinite
from hf_longtrunc.hosting import export, serve
from hf_longtrunc.hosting.find_and_read import indexed
from tests.command_line import invoke
from tests.conftest import tiny_config
from tests.hosting.server import served
from tests.hosting.test_find_and_read import FACTS, LONG, TECHNIQUE, TEMPLATE as CHAT, letters, users

pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
openai = pytest.importorskip("openai", reason="transformers[serving] is not installed")
QUESTION = "What number was on the trunk of Silas?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = letters()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(3)
    model = LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    model.save_pretrained(folder / "model")
    return export(folder / "model", folder / "endless", TECHNIQUE, finder="bm25").folder


def client_of(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)


def ask(address, folder, messages, wanted="passages", stream=False):
    """Return the text of an answer and its field, sent whole or as a stream."""
    headers = {"X-Longtrunc": wanted} if wanted else {}
    asked = {"model": str(folder), "messages": messages, "max_tokens": 4, "temperature": 0, "extra_headers": headers}
    with client_of(address) as client:
        if not stream:
            reply = client.chat.completions.create(**asked)
            assert reply.usage.prompt_tokens == reply.longtrunc["read"]
            return reply.choices[0].message.content, reply.longtrunc
        *parts, last = client.chat.completions.create(stream=True, **asked)
        assert not any(hasattr(part, "longtrunc") for part in parts)
        return "".join(part.choices[0].delta.content or "" for part in parts), last.longtrunc


def test_passages_come_with_the_answer_where_they_are_asked_for(folder):
    message = f"{LONG}\n{QUESTION}"
    with served(folder, serve) as address:
        answer, said = ask(address, folder, users(message))
        assert ask(address, folder, users(message), stream=True) == (answer, said)
        (passage,) = said.pop("passages")
        assert FACTS[1] in passage["text"] == message[passage["start"] : passage["end"]]
        assert said["kept"] + said["forgotten"] == said["read"]
        assert ask(address, folder, users(message), wanted=None) == (answer, said)
        _, short = ask(address, folder, users(QUESTION))
        assert (short["forgotten"], short["passages"]) == (0, None)
        _, traced = ask(address, folder, users("No question. " * 100), wanted="attention")
        assert sum(each["share"] for each in traced["attended"]) == pytest.approx(1, abs=1e-3)


def test_a_finder_that_is_not_installed_is_told_before_the_server_starts(folder, monkeypatch):
    indexed.cache_clear()
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ModuleNotFoundError, match=r'BM25 needs bm25s: run pip install "hf_longtrunc\[ask\]"'):
        serve(folder)
    told = invoke("serve", folder)
    assert (told.exit_code, "hf_longtrunc[ask]" in told.stderr) == (2, True)


def test_four_clients_at_once_get_what_each_gets_alone(folder):
    questions = [QUESTION, "Was the peacock of Hester Quill?", "Zyx?", "Who?"]
    chats = [users(f"{LONG[: -100 * n or None]}\n{each}") for n, each in enumerate(questions)]

    def talk(number):
        messages, said = list(chats[number]), []
        for turn in range(3):
            said.append(ask(address, folder, messages, stream=number % 2 == 1))
            messages += [{"role": "assistant", "content": "Good."}, *users(f"And turn {turn}?")]
        return said

    with served(folder, serve) as address:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(talk, range(4)))
        urllib.request.urlopen(urllib.request.Request(f"{address}/reset", method="POST")).close()  # the model goes
        assert [talk(number) for number in range(4)] == together
    assert len({str(each) for each in together}) == 4


def test_odd_requests_and_the_one_after_them(folder):
    with (
        served(folder, serve) as address,
        client_of(address) as client,
    ):
        right = ask(address, folder, users("Who?"))
        asked = {"model": str(folder), "messages": users(LONG), "max_tokens": 200}
        with client.chat.completions.create(stream=True, **asked) as stream:
            next(iter(stream))  # and hangs up
        assert ask(address, folder, users("Who?")) == right
        with pytest.raises(openai.BadRequestError, match="takes passages, attention; got passage"):
            ask(address, folder, users("Who?"), wanted="passage")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**asked, "model": "no/such"})
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**{**asked, "messages": []})
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        parts = [{"role": "user", "content": [{"type": "text", "text": "Who?"}, image]}]
        assert ask(address, folder, parts) == right  # transformers' own server leaves the image out
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        called = client.chat.completions.create(**{**asked, "messages": users(f"{LONG}\n{QUESTION}"), "tools": [tool]})
        assert called.longtrunc["forgotten"] > 0
        assert ask(address, folder, users("Who?")) == right


def test_a_server_that_is_killed_loses_nothing_on_disk(folder, tmp_path):
    made = export(folder.parent / "model", tmp_path / "endless", LMInfinite(num_sink_tokens=4, window_length=32))
    before = contents(made.folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    command = ["-m", "hf_longtrunc", "serve", str(made.folder), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_for(f"{address}/health", process)
        answer = ask(address, made.folder, users(LONG[:300]))
        with client_of(address) as client:
            asked = {"model": str(made.folder), "messages": users(LONG[:200]), "max_tokens": 900}
            with client.chat.completions.create(stream=True, **asked) as stream:
                next(iter(stream))
                process.send_signal(signal.SIGKILL)  # in the middle of an answer
    finally:
        process.kill()
        process.wait()
    assert contents(made.folder) == before
    with served(made.folder, serve) as again:  # verifies the folder first
        assert ask(again, made.folder, users(LONG[:300])) == answer


def wait_for(address, process):
    for _ in range(600):
        assert process.poll() is None, "the server ended by itself"
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start within a minute")


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
