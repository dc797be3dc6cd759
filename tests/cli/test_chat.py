"""`hf-longtrunc chat`: through a pseudo-terminal and through a pipe, on a tiny model that never ends by itself."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from threading import Event

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import EtaLogitsProcessor, sampler_names
from hf_longtrunc.cli.chat import ChatSession, processors_of, technique_of
from hf_longtrunc.cli.conversation import Conversation, _sizes
from tests.asking.test_index import SENTENCES, TEXT, ByWord
from tests.command_line import invoke, letter_tokenizer
from tests.conftest import tiny_config

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}s{% endif %}{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}."
    "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def tokenizer():
    return letter_tokenizer(["<pad>", "<s>", "</s>", "<unk>"], "abcdefghijklmnopqrstuvwxyz .-")


@pytest.fixture
def model(tokenizer):
    return LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer))).eval()


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def conversation(model, tokenizer, system=None, *, window=None, blocks=False):
    return Conversation(model, tokenizer, system, technique_of(model, tokenizer, window, 4, blocks))


def only_letters(input_ids, scores):
    return scores.index_fill(1, torch.tensor([0, 1, 2, 3, 30, 31, 32]), -1e9)


class Fed:
    """Notes every token that a model is fed."""

    def __init__(self, model):
        self.tokens = []
        model.register_forward_pre_hook(lambda module, args, kwargs: self.note(kwargs), with_kwargs=True)

    def note(self, kwargs):
        self.tokens += kwargs["input_ids"][0].tolist()


def test_every_token_is_fed_once_as_the_whole_template_has_it(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    talk, fed, messages = conversation(model, tokenizer), Fed(model), []
    for text in ("one", "two", "longtrunc-reply"):
        assert talk.say(text, Event())
        replies = list(talk.reply([only_letters], Event(), 5))
        assert len(replies) == 5
        messages += [{"role": "user", "content": text}]
        # The letter tokenizer's decoder sets blanks between tokens.
        messages += [{"role": "assistant", "content": "".join(replies).replace(" ", "")}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert fed.tokens == ids(tokenizer, whole)[:-1]  # the dot that ends the reply comes with the next turn
    assert talk.seen == len(fed.tokens)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 3


def test_system_comes_first_and_reset_forgets(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    talk, fed = conversation(model, tokenizer, "q"), Fed(model)
    talk.say("one", Event())
    assert fed.tokens == ids(tokenizer, "sq.uone.a")
    talk.reset()
    assert (talk.seen, talk.mebibytes, talk.messages) == (0, 0, [])
    talk.say("one", Event())
    assert fed.tokens == 2 * ids(tokenizer, "sq.uone.a")


def test_a_long_text_is_read_in_pieces_of_which_the_last_is_whole():
    assert _sizes(600) == [88, 256, 256]
    assert _sizes(512) == [256, 256]
    assert _sizes(3) == [3]


def test_a_reply_is_that_of_generate_whatever_the_pieces(model, tokenizer, monkeypatch):
    monkeypatch.setattr("hf_longtrunc.cli.conversation._CHUNK", 16)
    text = "the road to the sea was long and nobody had walked on it for years"
    talk = conversation(model, tokenizer, window=24)
    talk.say(text, Event())
    written = "".join(talk.reply(None, Event(), 20))
    expected = model.generate(torch.tensor([ids(tokenizer, text)]), max_new_tokens=20, do_sample=False)
    assert written.strip() == tokenizer.decode(expected[0, len(text) :])


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ messages[0]['content'] }}", "does not repeat"), ("{{ raise_exception('no user') }}", "refuses .* no user")],
)
def test_templates_that_carry_no_conversation(model, tokenizer, template, said):
    talk = conversation(model, tokenizer)
    talk.say("one", Event())
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=said):
        talk.say("two", Event())


def test_with_blocks_everything_is_kept_and_read(tokenizer):
    model = LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer), num_hidden_layers=6)).eval()
    talk = conversation(model, tokenizer, window=64, blocks=True)
    talk.say("the road to the sea was long " * 8, Event())
    held = talk.mebibytes
    assert len(list(talk.reply([], Event(), 60))) == 60
    assert talk.mebibytes > held


def test_the_model_ends_its_reply_and_the_end_is_not_shown(model, tokenizer):
    model.generation_config.eos_token_id = list(range(4, len(tokenizer)))
    talk = conversation(model, tokenizer)
    talk.say("one", Event())
    assert (
        list(talk.reply([lambda ids, scores: scores.index_fill(1, torch.tensor([0, 1, 2, 3]), -1e9)], Event(), 5)) == []
    )
    assert talk.seen == 3


def test_the_memory_is_constant(model, tokenizer):
    talk = conversation(model, tokenizer, window=32)
    talk.say("one", Event())
    held = []
    for _ in talk.reply([EtaLogitsProcessor(0.01)], Event(), 300):
        held.append(talk.mebibytes)
    assert talk.seen == 303
    assert len(set(held[50:])) == 1


def test_an_interrupted_reply_stays_and_the_conversation_goes_on(model, tokenizer):
    talk, stop = conversation(model, tokenizer), Event()
    talk.say("one", Event())
    for count, _ in enumerate(talk.reply([], stop), 1):
        if count == 7:
            stop.set()
    assert talk.seen == 3 + 7
    assert not talk.say("two", stop)
    assert talk.seen == 10
    assert talk.say("two", Event())
    assert talk.seen == 13


def test_a_reading_that_takes_its_time_shows_how_far_it_is(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("hf_longtrunc.cli.conversation._CHUNK", 8)
    talk = conversation(model, tokenizer)
    model.register_forward_pre_hook(lambda module, inputs: time.sleep(0.3))
    talk.say("the road to the sea was long", Event(), progress=True)
    assert re.search(r"reading:\s+71%.*20/28", capsys.readouterr().err)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_reading_that_is_interrupted_keeps_what_was_read(model, tokenizer, monkeypatch, template):
    """The next message continues a conversation in which the user said as much, and the model nothing."""
    monkeypatch.setattr("hf_longtrunc.cli.conversation._CHUNK", 8)
    tokenizer.chat_template = template
    talk, fed, text = conversation(model, tokenizer), Fed(model), "the road to the sea was long"

    class AfterTwoPieces(Event):
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 2

    assert not talk.say(text, AfterTwoPieces())
    content = text[: talk.seen - len("su" if template else "")]
    assert 0 < len(content) < len(text)
    assert talk.messages == [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]
    assert talk.unread == len(ids(tokenizer, f"su{text}.a" if template else text)) - talk.seen
    assert talk.say("two", Event())
    whole = f"su{content}.a.utwo.a" if template else f"{content}two"
    assert fed.tokens == ids(tokenizer, whole)
    assert talk.unread == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "name must be one of eta"),
        ("etta 1", "name must be one of eta, .* got .?etta.?; chat also takes bat, top-p"),
        ("eta much", "eta takes a number, got much"),
        ("eta 0", "epsilon must be a number above 0 and below 1"),
        ("bat 2", "epsilon must be a number above 0 and below 1"),
        ("plain 3", "plain takes no value, got 3"),
        ("p-less 3", "p-less takes no value, got 3"),
        ("top-p 7", "top_p"),
    ],
)
def test_samplers_that_are_none(text, said):
    with pytest.raises(ValueError, match=said):
        processors_of(text, None)


@pytest.mark.parametrize("name", [*sampler_names(), "bat 0.01", "top-p", "min-p", "plain"])
def test_every_sampler_speaks(model, tokenizer, name):
    talk = conversation(model, tokenizer)
    talk.say("one", Event())
    assert len(list(talk.reply(processors_of(name, model), Event(), 3))) == 3


def test_through_a_pipe(model_folder, tmp_path):
    (tmp_path / "a text").write_text("the keeper had not spoken", encoding="utf-8")
    taken, saved = tmp_path / "taken", tmp_path / "saved.jsonl"
    taken.touch()
    said = f"""hello
        /sampler greedy
        /file {tmp_path / "a text"}
        what was it

        /save {saved}
        /save {taken}
        /sampler etta
        /file {tmp_path / "missing"}
        /colour
        /reset
        /status
        /quit
        never read"""
    result = invoke(
        "chat", "--model", model_folder, "--max-new-tokens", "6", "--window", "64", input=said, columns=None
    )
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2
    notes = result.stderr.splitlines()
    assert re.fullmatch(r"11 tokens seen, cache 0\.\d\d MiB \(constant\), [\d,.]+ tokens/s", notes[0])
    assert notes[1] == "sampling by greedy"
    assert notes[2].endswith("a text: 25 characters, read with your next message")
    # 11 of the first turn, a text of 25, two newlines, a message of 11, a reply of 6
    assert notes[3].startswith("55 tokens seen")
    assert notes[4] == f"4 messages: {saved}"
    assert "File exists" in notes[5]
    assert notes[6].startswith("/sampler: name must be one of eta")
    assert "no such file" in notes[7]
    assert notes[8] == "/colour: no such command: /colour; /help lists them"
    assert notes[9:] == ["forgotten", notes[10]]
    assert notes[10].startswith("0 tokens seen, cache 0.00 MiB (constant)")
    messages = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "the keeper had not spoken\n\nwhat was it"


# Whoever runs the tests in the background of a shell script has Ctrl-C ignored, and a child inherits that.
LISTENING = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('hf_longtrunc', run_name='__main__', alter_sys=True)"
)
PROMPT = r"\?2004h[^>]*>"  # bracketed paste is turned on first


class Terminal:
    """`hf-longtrunc chat` on a pseudo-terminal."""

    def __init__(self, *options, columns=80):
        self.screen, theirs = pty.openpty()
        command = [sys.executable, "-c", LISTENING, "chat", *options]
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(command, **streams, start_new_session=True, env=environment)
        os.close(theirs)
        self.shown = ""

    def wait_for(self, pattern, seconds=300):
        """Read on until the pattern is shown; return its match and forget what was shown up to its end."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown[-2000:]
            if select.select([self.screen], [], [], 1)[0]:
                self.shown += os.read(self.screen, 1 << 16).decode("utf-8", errors="replace")
        self.shown = self.shown[match.end() :]
        return match

    def interrupt_prompt(self):
        """Press Ctrl-C until there is a new prompt: one that comes before it waits for a key may be lost."""
        for _ in range(60):
            self.process.send_signal(signal.SIGINT)
            with suppress(AssertionError):
                return self.wait_for(PROMPT, seconds=1)
        raise AssertionError(self.shown)

    def type(self, text):
        os.write(self.screen, text.encode())


def test_a_long_file_is_talked_about_passage_by_passage(model, tokenizer, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("hf_longtrunc.asking.answers.default_finder", ByWord)
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_text("the sea", encoding="utf-8")
    long.write_text(TEXT, encoding="utf-8")
    talk = ChatSession(conversation(model, tokenizer, window=200), "greedy", 3, None)
    said = []
    say = talk.conversation.say
    monkeypatch.setattr(talk.conversation, "say", lambda text, *args, **kw: said.append(text) or say(text, *args, **kw))
    for line in (
        f"/file {short}",
        "what",
        "and",
        f"/file {long}",
        "is it three",
        "elephants",
        "/reset",
        "three",
        "/file",
    ):
        assert talk.handle(line)
    first, second, prompt, *last = said
    passage, using = prompt.split("\n\n")
    assert SENTENCES[2] in passage  # with the neighbours that the model takes
    assert using == "Using only the passage above, answer in a few words: is it three"
    assert [first, second, *last] == ["the sea\n\nwhat", "and", "elephants", "three"]
    told = capsys.readouterr().err
    assert "7 characters, read with your next message" in told
    assert f"{len(TEXT)} characters, of which each message reads the best passage, until /reset" in told
    assert told.count("no passage stands out") == 1
    assert told.count("growing") == 0
    assert "name a file: /file PATH" in told
    talk.conversation.handle.detach()


def test_an_interrupted_index_leaves_the_conversation_and_the_file_before(
    model, tokenizer, monkeypatch, capsys, tmp_path
):
    short, long = tmp_path / "short", tmp_path / "long"
    short.write_text("the sea", encoding="utf-8")
    long.write_text(TEXT, encoding="utf-8")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_longtrunc.TextIndex", interrupted)
    talk = ChatSession(conversation(model, tokenizer, window=200), "greedy", 3, None)
    assert talk.handle(f"/file {short}")
    assert talk.handle(f"/file {long}")
    assert "interrupted: /file did nothing" in capsys.readouterr().err
    assert talk.handle("what")
    assert talk.conversation.messages[0]["content"] == "the sea\n\nwhat"
    talk.conversation.handle.detach()


def test_through_a_terminal(model_folder, tmp_path):
    """No reply ends by itself here: Ctrl-C ends it, and the conversation goes on; at the prompt it ends nothing."""
    text = tmp_path / "text"
    text.write_text("the keeper had not spoken", encoding="utf-8")
    chat = Terminal("--model", model_folder, "--window", "64", "--status-every", "100")
    try:
        chat.wait_for(PROMPT)
        chat.type("hello\n")
        held = {chat.wait_for(r"tokens seen, cache ([\d.]+) MiB")[1] for _ in range(4)}
        assert len(held) == 1
        chat.process.send_signal(signal.SIGINT)
        first = chat.wait_for(r"([\d,]+) tokens seen[^\n]*\(interrupted\)")[1]
        chat.wait_for(PROMPT)
        chat.interrupt_prompt()
        chat.type(f"/file {text}\n")
        chat.wait_for("read with your next message")
        chat.wait_for(PROMPT)
        chat.type("again\n")
        chat.wait_for("tokens seen")
        chat.process.send_signal(signal.SIGINT)
        chat.wait_for("interrupted")
        chat.wait_for(PROMPT)
        chat.type("/reset\n")
        chat.wait_for("forgotten")
        chat.wait_for(PROMPT)
        chat.type("again\n")
        second = chat.wait_for(r"([\d,]+) tokens seen")[1]
        assert int(first.replace(",", "")) >= 400
        assert int(second.replace(",", "")) == 105
        chat.process.send_signal(signal.SIGINT)
        chat.wait_for("interrupted")
        chat.wait_for(PROMPT)
        chat.type("\x04")
        assert chat.process.wait(300) == 0
    finally:
        chat.process.kill()
        chat.process.wait()
        os.close(chat.screen)


def test_pasted_lines_are_one_message_and_the_arrow_brings_it_back(model_folder, tmp_path):
    """In 60 columns, with letters that take two."""
    saved = tmp_path / "saved.jsonl"
    chat = Terminal("--model", model_folder, "--window", "64", "--max-new-tokens", "3", columns=60)
    try:
        chat.wait_for(PROMPT)
        chat.type("\x1b[200~/one\rtwo 灯台 é\rthree\x1b[201~")
        chat.wait_for("three")
        chat.type("\r")
        chat.wait_for("tokens seen")
        chat.wait_for(PROMPT)
        chat.type("\x1b[A")
        chat.wait_for("three")
        chat.type(" four\r")
        chat.wait_for("tokens seen")
        chat.wait_for(PROMPT)
        chat.type("/help\r")
        chat.wait_for("its start stays")
        assert max(map(len, re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", chat.shown).splitlines()), default=0) <= 60
        chat.wait_for(PROMPT)
        chat.type(f"/save {saved}\r")
        chat.wait_for("4 messages")
    finally:
        chat.process.kill()
        chat.process.wait()
        os.close(chat.screen)
    said = [json.loads(line)["content"] for line in saved.read_text(encoding="utf-8").splitlines()]
    assert said[0] == "/one\ntwo 灯台 é\nthree"
    assert said[2].endswith("four")


def test_mistakes_are_told_before_the_model_is_loaded():
    result = invoke("chat", "--sampler", "etta", "--model", "no/such/model")
    assert result.exit_code == 2
    assert "etta; chat also takes bat" in result.stderr.replace("'", "")
