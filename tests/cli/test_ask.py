"""`hf-longtrunc ask` on a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from hf_longtrunc import DualChunkAttention, LMInfinite, load_pretrained
from tests.browser import data_of
from tests.command_line import invoke

TEMPLATE = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
QUESTIONS = ["[Why?]", "Who went to sea, and what is there that is surprising in this?"]


@pytest.fixture
def file(prose, tmp_path):
    (tmp_path / "text.txt").write_text(prose * 2, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture(scope="module")
def talking_folder(tiny_folder, tmp_path_factory):
    """Six layers of larger weights: its answers depend on the question."""
    folder = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(tiny_folder, folder)
    config = AutoConfig.from_pretrained(tiny_folder, num_hidden_layers=6, initializer_range=0.4)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat_folder(talking_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(talking_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def answers(file, folder, questions, *options):
    result = invoke("ask", file, *questions, "--model", folder, "--max-new-tokens", 9, "--json", *options)
    assert result.exit_code == 0, result.output
    return [found["answer"] for found in json.loads(result.stdout)["answers"]]


def alone(prompt, folder, arm):
    """The answer to one prompt that is read whole."""
    model, tokenizer = load_pretrained(folder)
    ids = torch.tensor([prompt(tokenizer)])
    with arm(model):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("options", "arm"),
    [
        ((), DualChunkAttention()),
        (("--lm-infinite",), LMInfinite()),
        (("--lm-infinite", "--window", "20", "--sinks", "2"), LMInfinite(num_sink_tokens=2, window_length=20)),
    ],
)
@pytest.mark.parametrize("is_chat", [False, True])
def test_each_answer_is_that_of_its_prompt_read_whole(file, talking_folder, chat_folder, options, arm, is_chat):
    folder, text = chat_folder if is_chat else talking_folder, file.read_text(encoding="utf-8")

    def prompt(question):
        before, behind = ("[", f"\n\n{question}]>") if is_chat else ("", f"\n\n{question}\nAnswer:")
        return lambda tokenizer: [
            *tokenizer(before, add_special_tokens=not is_chat).input_ids,
            *(id for part in (text, behind) for id in tokenizer(part, add_special_tokens=False).input_ids),
        ]

    expected = [alone(prompt(question), folder, arm) for question in QUESTIONS]
    assert expected[0] != expected[1]
    assert answers(file, folder, QUESTIONS, *options) == expected


def test_blocks_answer_each_question_as_if_it_were_the_only_one(file, talking_folder):
    together = answers(file, talking_folder, QUESTIONS, "--blocks")
    assert together == [answers(file, talking_folder, [question], "--blocks")[0] for question in QUESTIONS]
    assert together[0] != together[1]


def test_it_streams_to_stdout_and_says_what_was_read_on_stderr(file, talking_folder, prose):
    options = ("--model", talking_folder, "--max-new-tokens", 9)
    result = invoke("ask", "-", *QUESTIONS, *options, "--max-tokens", 80, input=prose * 2, columns=None)
    assert result.exit_code == 0, result.output
    file.write_text(prose * 2, encoding="utf-8")
    said = answers(file, talking_folder, QUESTIONS, "--max-tokens", 80)
    assert result.stdout.split() == " ".join(said).split()
    assert "reading 80 of " in result.stderr
    assert "dual chunk attention, 64 positions trained" in result.stderr
    assert all(question in result.stderr for question in QUESTIONS)


def test_an_answer_that_ends_at_once_is_told(file, tiny_folder, monkeypatch):
    monkeypatch.setattr("hf_longtrunc.evaluation.greedy.greedy_answer", lambda *_, **__: torch.tensor([], dtype=int))
    result = invoke("ask", file, "Why?", "--model", tiny_folder)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "the model ended its answer at once" in result.stderr


def test_an_empty_question_is_refused(file, tiny_folder):
    result = invoke("ask", file, "a question", " ", "--model", tiny_folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "a question is empty" in result.stderr


def test_a_template_that_says_nothing_of_the_user_is_refused(file, chat_folder, tmp_path):
    folder = tmp_path / "mute"
    shutil.copytree(chat_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "hello"
    tokenizer.save_pretrained(folder)
    result = invoke("ask", file, "a question", "--model", folder)
    assert result.exit_code == 2
    assert "chat template does not repeat what a user says" in result.stderr


def test_a_page_of_where_each_answer_read(file, chat_folder, tmp_path):
    page = tmp_path / "read.html"
    for options in ([], ["--blocks", "--window", "64"], ["--lm-infinite", "--window", "64"]):
        plain = answers(file, chat_folder, QUESTIONS, *options)
        assert answers(file, chat_folder, QUESTIONS, *options, "--page", page, "--force") == plain
        for number, question in enumerate(QUESTIONS, 1):
            data = data_of(tmp_path / f"read-{number}.html")
            assert data["prompt"] == question
            assert len(data["answer"]) == 9
            sums = [sum(max(0, share) for share in step["mass"]) / data["parts"] for step in data["answer"]]
            assert sums == pytest.approx([1] * 9, abs=0.01)
    assert not page.exists()
    taken = tmp_path / "read-1.html"
    refused = invoke("ask", file, *QUESTIONS, "--page", page, "--model", chat_folder)
    assert refused.exit_code == 2
    assert f"{taken}" in refused.stderr
    single = invoke("ask", file, "Why?", "--page", page, "--model", chat_folder, "--max-new-tokens", 2)
    assert single.exit_code == 0
    assert f"page: {page}" in single.stderr
