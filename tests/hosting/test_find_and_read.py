"""Folders with a finder: a long chat is answered from the passage that its question points at, and says which."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_longtrunc import LMInfinite, Passage
from hf_longtrunc.asking.prompt import PROMPT, fill_prompt
from hf_longtrunc.hosting import HostSettings, hosted_generate
from hf_longtrunc.hosting.find_and_read import parse_chat, question_span
from hf_longtrunc.models import cache_of
from tests.command_line import letter_tokenizer
from tests.conftest import tiny_config

pytest.importorskip("bm25s", reason="the ask extra is not installed")
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!:'0123456789\n"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TECHNIQUE = LMInfinite(num_sink_tokens=4, window_length=400)
SETTINGS = HostSettings(technique=TECHNIQUE, finder="bm25", cache_bytes=0).to_json()
NEW = {"max_new_tokens": 5, "do_sample": False}
FACTS = ["The peacock belonged to Hester Quill.", "Number 4711 was painted on the trunk of Silas Dunnock."]
FILLER = "It rained upon the marshes, and nobody on the road had seen the coach. "
LONG = f"{FILLER * 9}{FACTS[0]} {FILLER * 8}{FACTS[1]} {FILLER * 5}"


def letters():
    tokenizer = letter_tokenizer(["<pad>", "<s>", "</s>", "<unk>"], LETTERS)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["</s>"]})
    return tokenizer


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(3)
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    model = LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer))).eval()
    reference = copy.deepcopy(model)
    with TECHNIQUE(reference):
        yield model, tokenizer, reference


def rendered(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def users(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def ask(host, messages, settings=SETTINGS, **options):
    model, tokenizer, _ = host
    ids = rendered(tokenizer, messages)
    output = hosted_generate(
        settings, model, ids, tokenizer=tokenizer, return_dict_in_generate=True, **{**NEW, **options}
    )
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids.expand(len(output.sequences), -1))
    return output.sequences[:, ids.shape[1] :].tolist(), output.reading, output


def patched(host, messages, **options):
    ids = rendered(host[1], messages)
    return host[2].generate(ids, **{**NEW, **options})[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("question", ["What number was on the trunk of Silas?", "Was the peacock of Hester Quill?"])
def test_the_passage_is_read_and_handed_back(host, question):
    system = [{"role": "system", "content": "Be brief."}]
    message = f"{LONG}\n{question}"
    answer, reading, output = ask(host, [*system, *users(message)])
    (passage,) = reading["passages"]
    assert (passage["source"], message[passage["start"] : passage["end"]]) == ("0", passage["text"])
    assert FACTS["Silas" in question] in passage["text"]
    short = [*system, *users(fill_prompt(PROMPT, [Passage(**{**passage, "source": ""})], question))]
    assert answer == patched(host, short)
    assert answer != patched(host, [*system, *users(message)])
    read, kept = (rendered(host[1], each).shape[1] for each in ([*system, *users(message)], short))
    assert (reading["read"], reading["kept"], reading["forgotten"]) == (read, kept, read - kept)
    assert cache_of(output) is None
    beams, _, _ = ask(host, [*system, *users(message)], num_beams=2, num_return_sequences=2)
    assert beams == patched(host, short, num_beams=2, num_return_sequences=2)


def test_later_turns_find_in_earlier_messages_and_not_in_their_questions(host):
    first = f"{LONG}\nWhat number was painted on the trunk?"
    said = [first, "I do not know.", "My own trunk is green, and has no lock at all.", "Good."]
    for question, source in (("What number was painted on the trunk?", "0"), ("Is the lock on my green trunk?", "2")):
        _, reading, _ = ask(host, users(*said, question))
        (passage,) = reading["passages"]
        chosen = users(*said)[int(passage["source"]) * 2]["content"]
        assert chosen[passage["start"] : passage["end"]] == passage["text"]
        assert int(passage["source"]) == int(source) // 2
        assert "?" not in passage["text"]


def test_the_best_passage_of_all_messages_is_read(host):
    worse = f"{FILLER * 9}Some number was painted on a trunk. {FILLER * 4}"
    question = "What number was painted on the trunk?"
    for said, source in (([LONG, "Good.", worse, "Good."], "0"), ([worse, "Good.", LONG, "Good."], "1")):
        _, reading, _ = ask(host, users(*said, question))
        assert [passage["source"] for passage in reading["passages"]] == [source]
        assert FACTS[1] in reading["passages"][0]["text"]
    _, alone, _ = ask(host, users(f"{FILLER * 20}\nGood.", "Good.", worse, "Good.", question))
    assert [passage["source"] for passage in alone["passages"]] == ["1"]  # it stands out too


def test_where_nothing_is_found_the_technique_reads(host, caplog):
    for question in ("Zyx?", "Please summarize the whole story."):
        messages = users(f"{LONG}\n{question}")
        answer, reading, _ = ask(host, messages)
        assert answer == patched(host, messages)
        assert reading.get("passages", ()) == ()
        assert reading["forgotten"] > 0
    assert "forgotten: the model sees the first 4" in caplog.text
    short = users("Who had the trunk?")
    answer, reading, _ = ask(host, short)
    assert answer == patched(host, short)
    assert "passages" not in reading
    assert reading["forgotten"] == 0


def test_calls_with_several_rows_or_a_prompt_that_is_no_chat(host):
    model, tokenizer, reference = host
    ids = rendered(tokenizer, users(f"{LONG}\nWho had the trunk?"))
    for other in (ids.repeat(2, 1), ids[:, :-3]):
        wanted = reference.generate(other, **NEW)
        assert torch.equal(hosted_generate(SETTINGS, model, other, tokenizer=tokenizer, **NEW), wanted)


def test_lengths_count_the_whole_prompt(host):
    messages = users(f"{LONG}\nWho had the trunk of Silas?")
    length = rendered(host[1], messages).shape[1]
    answers, _, _ = ask(host, messages, max_length=length + 3, max_new_tokens=None)
    assert [len(each) for each in answers] == [3]


def test_a_tokenizer_without_a_template_and_one_from_the_folder(host, tmp_path):
    model, _, reference = host
    tokenizer = letters()
    text = f"{LONG}\nWhat number was on the trunk?"
    ids = tokenizer(text, return_tensors="pt").input_ids
    chat = parse_chat(tokenizer, ids[0].tolist())
    assert (chat.messages, chat.closes) == ([text], "\nAnswer:")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="pass tokenizer="):
        hosted_generate(SETTINGS, loaded, ids, **NEW)
    tokenizer.save_pretrained(tmp_path)
    found = hosted_generate(SETTINGS, loaded, ids, return_dict_in_generate=True, **NEW)
    (passage,) = found.reading["passages"]
    assert FACTS[1] in passage["text"]
    prompt = f"{fill_prompt(PROMPT, [Passage(**{**passage, 'source': ''})], text[len(LONG) + 1 :])}"
    wanted = reference.generate(tokenizer(f"{prompt}\nAnswer:", return_tensors="pt").input_ids, **NEW)
    assert found.sequences[0, -5:].tolist() == wanted[0, -5:].tolist()


@pytest.mark.parametrize(
    ("message", "question"),
    [
        ("Who?", "Who?"),
        ("Thank you very much.", None),
        ("Now tell me who saw it.", "Now tell me who saw it."),
        (f"{FILLER * 20}\nWho saw it?", "Who saw it?"),
        (f"Who saw it?\n{FILLER * 20}", "Who saw it?"),
        (f"Who saw it?\n{FILLER * 20}\nWho heard it?", "Who heard it?"),
        (f"{FILLER * 20}Who saw it?", "Who saw it?"),
        (f"{FILLER * 20}\n\nNow tell me who saw it.", "Now tell me who saw it."),
        (f"{FILLER * 20}\nNow tell me who saw it.", "Now tell me who saw it."),
        (f"{FILLER * 20}and by the\n\nNow tell me who saw it.", "Now tell me who saw it."),
        (f"{FILLER * 20}and by the road\nwent home.", None),
        (FILLER * 20, None),
        ((FILLER * 20).replace(". ", "? ").replace("\n", ""), f"{FILLER[:-2]}?"),
    ],
)
def test_the_question_in_a_message(message, question):
    span = question_span(message)
    assert (None if span is None else message[slice(*span)].strip()) == question


def test_prompts_come_apart_as_they_were_put_together(host):
    tokenizer = host[1]
    draw = torch.Generator().manual_seed(1)
    for turns in (1, 3, 5):
        texts = [
            "".join(LETTERS[i] for i in torch.randint(0, len(LETTERS), (30,), generator=draw)) for _ in range(turns)
        ]
        for before in ([], [{"role": "system", "content": "Be kind."}]):
            chat = parse_chat(tokenizer, rendered(tokenizer, [*before, *users(*texts)])[0].tolist())
            assert chat.messages == texts[::2]
            assert chat.head + chat.opens + chat.messages[0] + "</s>" in (
                tokenizer.apply_chat_template([*before, *users(*texts)], tokenize=False)
            )
    assert parse_chat(tokenizer, tokenizer("no chat", add_special_tokens=False).input_ids) is None


@pytest.mark.real_model
def test_a_real_template_comes_apart(real_tokenizer):
    ids = rendered(real_tokenizer, users("A\n b ", "yes", "Who is it?"))
    assert parse_chat(real_tokenizer, ids[0].tolist()).messages == ["A\n b ", "Who is it?"]
