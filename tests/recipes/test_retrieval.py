from __future__ import annotations

import io
import random
import re
import uuid
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import matplotlib as mpl
import pytest
import torch
from rich.console import Console

from hf_longtrunc.evaluation import read_records, wilson_interval
from instruments.haystack import Haystack
from instruments.passkey import passkey_tasks
from instruments.retrieval import (
    KeyValuePrompts,
    NeedlePrompts,
    RetrievalRecord,
    VariablePrompts,
    plot_retrieval,
    retrieval_table,
    run_retrieval,
)

mpl.use("agg")


def batteries(tokenizer, text=None):
    return [
        NeedlePrompts(tokenizer, text),
        NeedlePrompts(tokenizer, text, keys=4),
        NeedlePrompts(tokenizer, text, keys=3, values=2, queries=2),
        VariablePrompts(tokenizer, text, chains=2, hops=2),
        KeyValuePrompts(tokenizer),
    ]


def tokens(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@pytest.mark.parametrize("filler", ["repeated", "text"])
def test_needles_stand_at_their_depths_in_their_order_and_the_length_is_exact(tokenizer, prose, filler):
    haystack = Haystack(tokenizer, None if filler == "repeated" else prose)
    draw = random.Random(0)
    for length in [*range(300, 330), 1500]:
        needles = [(draw.choice([0, 0.2, 0.2, 0.5, 1]), f"Needle {n} is here.") for n in range(4)]
        ids = haystack.prompt(length, "Open.", needles, "Asked?", draw)
        text = tokenizer.decode(ids)
        assert len(ids) == length
        order = sorted(range(4), key=lambda n: (needles[n][0], n))
        assert [int(n) for n in re.findall(r"Needle (\d) is here\.", text)] == order
        assert text.startswith("<|start|>Open.")
        assert text.endswith(" Asked?")
        if length == 1500:
            bare = re.sub(r" Needle \d is here\.", "|", text.removeprefix("<|start|>Open.").removesuffix(" Asked?"))
            pieces = [tokens(tokenizer, piece) for piece in bare.split("|")]
            for n, place in zip(order, range(4), strict=True):
                assert sum(pieces[: place + 1]) / sum(pieces) == pytest.approx(needles[n][0], abs=0.04)


@pytest.mark.parametrize("filler", ["repeated", "text"])
def test_every_expected_string_stands_in_the_prompt_once_and_the_depth_is_the_first_ones(tokenizer, prose, filler):
    for prompts in batteries(tokenizer, None if filler == "repeated" else prose):
        for task in passkey_tasks([2600], [0, 0.5, 0.8], keys_per_cell=2):
            ids, expected = prompts(task)
            text = tokenizer.decode(ids)
            assert len(ids) == task.length or (
                prompts.filler == "pairs" and task.length - 110 < len(ids) <= task.length
            )
            assert len(expected) == len(set(expected))
            for string in expected:
                assert 1 <= text.count(string) <= 2  # a variable stands on the right of the next one too
            first = text.index(expected[0]) / len(text)
            assert first == pytest.approx(task.depth, abs=0.16)


def test_the_numbers_of_the_asked_words_are_expected_and_no_others(tokenizer):
    prompts = NeedlePrompts(tokenizer, keys=5, values=2, queries=2)
    ids, expected = prompts(passkey_tasks([2000], [0.5], keys_per_cell=1)[0])
    text = tokenizer.decode(ids)
    said = re.findall(r"One of the magic numbers for (\S+) is (\d{7})\.", text)
    assert len(said) == 10
    asked = re.search(r"What are all magic numbers for (\S+) and (\S+)\?", text).groups()
    assert sorted(expected) == sorted(number for word, number in said if word in asked)
    assert len(expected) == 4


def test_the_expected_variables_hold_the_asked_value_and_are_all_that_do(tokenizer):
    for task in passkey_tasks([1500], [0, 0.4, 1], keys_per_cell=3):
        ids, expected = VariablePrompts(tokenizer, chains=3, hops=3)(task)
        text = tokenizer.decode(ids)
        values = {}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text):
            values[name] = source if source.isdigit() else values[source]  # in order: never used before it is set
        assert len(values) == 12
        asked = re.search(r"hold the value (\d+)\?", text)[1]
        assert sorted(expected) == sorted(name for name, value in values.items() if value == asked)


def test_pairs_are_uuids_and_the_asked_one_is_among_them(tokenizer):
    for depth in (0, 0.5, 1):
        ids, (value,) = KeyValuePrompts(tokenizer)(passkey_tasks([1500], [depth], keys_per_cell=1)[0])
        text = tokenizer.decode(ids)
        pairs = re.findall(r'"(\S{36})": "(\S{36})"\n', text)
        assert all(uuid.UUID(part).version == 4 for pair in pairs for part in pair)
        assert len(dict(pairs)) == len(pairs) > 5
        key = re.search(r'The value of the key "(\S{36})" is "$', text)[1]
        assert dict(pairs)[key] == value
        assert [place for place, pair in enumerate(pairs) if pair[0] == key] == [round(depth * (len(pairs) - 1))]


def test_prompts_are_the_same_every_time_and_differ_by_trial_and_seed(tokenizer):
    for one, again in zip(batteries(tokenizer), batteries(tokenizer), strict=True):
        tasks = [task for seed in (0, 1) for task in passkey_tasks([1200], [0.5], keys_per_cell=2, seed=seed)]
        made = [one(task) for task in tasks]
        assert made == [again(task) for task in tasks]
        assert len({tuple(expected) for _, expected in made}) == 4


@pytest.mark.parametrize(
    ("says", "call"),
    [
        (
            "queries, the keys that are asked for, must be",
            lambda tokenizer: NeedlePrompts(tokenizer, keys=1, queries=2),
        ),
        ("values must be a whole number of at least 1", lambda tokenizer: NeedlePrompts(tokenizer, values=0)),
        ("keys must be a whole number from 1 to 240", lambda tokenizer: NeedlePrompts(tokenizer, keys=10_000)),
        ("hops must be a whole number of at least 1", lambda tokenizer: VariablePrompts(tokenizer, hops=0)),
        ("no sentence", lambda tokenizer: VariablePrompts(tokenizer, "")),
        ("length must be at least", lambda tokenizer: NeedlePrompts(tokenizer)(passkey_tasks([20], [0])[0])),
        ("length must be at least", lambda tokenizer: KeyValuePrompts(tokenizer)(passkey_tasks([20], [0])[0])),
        (
            "depths must be a number of at least 0 and of at most 1",
            lambda tokenizer: KeyValuePrompts(tokenizer)(passkey_tasks([900], [1.1])[0]),
        ),
        (
            "depths must be a number of at least 0 and of at most 1",
            lambda tokenizer: NeedlePrompts(tokenizer)(passkey_tasks([900], [-0.1])[0]),
        ),
    ],
)
def test_bad_input_is_named(tokenizer, says, call):
    with pytest.raises(ValueError, match=says):
        call(tokenizer)


def test_the_least_dictionary_has_one_pair(tokenizer):
    prompts = KeyValuePrompts(tokenizer)
    with pytest.raises(ValueError, match="at least") as refusal:
        prompts(passkey_tasks([20], [0])[0])
    least = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    # Each length draws its own uuids, whose tokens differ in number: near the least length, some fit.
    assert any(_fits(prompts, length) for length in range(least - 20, least + 20))


def _fits(prompts, length):
    try:
        return len(prompts(passkey_tasks([length], [0])[0])[0]) <= length
    except ValueError:
        return False


class Reader:
    """A `generate` that repeats its prompt's last `sight` tokens, so it says all that stood there."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(name_or_path="reader", is_encoder_decoder=False)

    def __init__(self, sight):
        self.sight, self.prompts = sight, []

    def generate(self, input_ids, **kwargs):
        self.prompts.append(input_ids[0].tolist())
        return torch.cat([input_ids, input_ids[:, -self.sight :]], dim=1)


def test_the_score_is_the_share_of_expected_strings_in_the_answer(tokenizer):
    tasks = passkey_tasks([1500], [0.1, 0.9], keys_per_cell=1)
    arms = {"plain": nullcontext}
    for sight, scores in ((10**6, [1, 1]), (500, [0, 1])):
        records = run_retrieval(Reader(sight), [NeedlePrompts(tokenizer)], tasks, arms)
        assert [record.score for record in records] == scores
    several = [NeedlePrompts(tokenizer, values=8)]
    for record in run_retrieval(Reader(700), several, tasks, arms):
        share = sum(text in record.answer for text in record.expected) / 8
        assert 0 < record.score == share < 1


def test_arms_see_the_same_prompts_and_a_run_goes_on_where_it_was_cut_off(tokenizer, tmp_path):
    path, tasks = tmp_path / "retrieval.jsonl", passkey_tasks([1200], [0, 1], keys_per_cell=1)
    arms, entered = {}, []
    for name in ("a", "b"):

        @contextmanager
        def arm(model, name=name):
            entered.append(name)
            yield

        arms[name] = arm
    whole = Reader(9)
    first = run_retrieval(whole, batteries(tokenizer), tasks, arms)
    assert entered == ["a", "b"]
    assert whole.prompts[:10] == whole.prompts[10:]

    reader = Reader(9)
    generate = reader.generate
    reader.generate = lambda *args, **kwargs: generate(*args, **kwargs) if len(reader.prompts) < 7 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_retrieval(reader, batteries(tokenizer), tasks, arms, path=path)
    assert len(read_records(path, RetrievalRecord)) == 7
    rest = Reader(9)
    assert run_retrieval(rest, batteries(tokenizer), tasks, arms, path=path) == first
    assert reader.prompts + rest.prompts == whole.prompts
    assert run_retrieval(Reader(0), batteries(tokenizer), tasks, arms, path=path) == first


def test_table_and_heat_maps(tokenizer):
    tasks = passkey_tasks([1200, 1500], [0.1, 0.9], keys_per_cell=1)
    arms = {"one": nullcontext, "two": nullcontext}
    records = run_retrieval(Reader(400), batteries(tokenizer)[:2], tasks, arms)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(retrieval_table(records))
    row = next(line for line in console.export_text().splitlines() if "needle 1x1" in line and "1,500" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:4] == ["one", "needle 1x1, 1 asked", "repeated", "1,500"]
    assert cells[4:] == ["0.00", "1.00", "0.50", "0.09-0.91", "2 x 1"]
    console.print(retrieval_table(records[1:]))
    assert "1 │" in console.export_text()
    maps = plot_retrieval(records)
    assert [axes.get_title() for axes in maps[:2]] == [f"{arm}\nneedle 1x1, 1 asked\nrepeated" for arm in arms]
    assert maps[0].images[0].get_array().tolist() == [[0, 0], [1, 1]]
    assert len(maps) == 4


TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SAID = r"One of the magic numbers for (\S+) is (\d{7})\."
ASKED = r"What is the magic number for (\S+)\?"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("variant", ["plain", "question_first", "second_turn"])
def test_a_conversation_asks_for_one_word_in_prompts_of_the_exact_length(tokenizer, chat, variant):
    tokenizer.chat_template = TEMPLATE
    options = {} if variant == "plain" else {variant: True}
    prompts = NeedlePrompts(tokenizer, keys=3, chat=chat, **options)
    for task in passkey_tasks([900, 1000, 1001], [0.5, 1], keys_per_cell=2):
        ids, (expected,) = prompts(task)
        text = tokenizer.decode(ids)
        assert len(ids) == task.length
        said, asked = dict(re.findall(SAID, text)), re.findall(ASKED, text)
        assert len(said) == 3
        assert len(asked) == (2 if variant == "second_turn" else 1)
        assert said[asked[-1]] == expected
        assert text.count(expected) == 1
        start = f" The magic number for {asked[-1]} is"
        assert text.endswith("[end][assistant]" if chat else start)
        assert text.startswith("[user]Some magic" if chat else "<|start|>Some magic")
        assert (start in text) == (not chat)
        filler = text.index("The grass is green")
        assert (text.index("What is the magic number") < filler) == (variant == "question_first")
        if variant == "second_turn":
            answer = f"The magic number for {asked[0]} is {said[asked[0]]}."
            first, second = f"What is the magic number for {asked[0]}?", f"What is the magic number for {asked[1]}?"
            between = "[end][assistant]{}[end][user]" if chat else " {} "
            assert first + between.format(answer) + second in text


def test_variants_are_batteries_of_their_own(tokenizer):
    tokenizer.chat_template = TEMPLATE
    variants = [
        {},
        {"chat": True},
        {"question_first": True},
        {"second_turn": True},
        {"chat": True, "second_turn": True},
    ]
    names = [NeedlePrompts(tokenizer, keys=2, **variant).battery for variant in variants]
    assert names[0] == "needle 2x1, 1 asked"
    assert names[-1] == "needle 2x1, 1 asked, chat, second turn"
    assert len(set(names)) == len(names)


def test_at_depth_one_the_needle_is_the_last_sentence_before_the_question(tokenizer):
    for task in passkey_tasks([900], [1], keys_per_cell=3):
        ids, (expected,) = NeedlePrompts(tokenizer)(task)
        assert re.search(
            rf"is {expected}\. What is the magic number for \S+\? The magic number for \S+ is$", tokenizer.decode(ids)
        )


def test_what_a_variant_lacks_is_named(tokenizer):
    with pytest.raises(ValueError, match="chat needs a tokenizer with a chat template"):
        NeedlePrompts(tokenizer, chat=True)(passkey_tasks([900], [0])[0])
    for options in ({"keys": 1}, {"keys": 2, "queries": 2}, {"keys": 2, "question_first": True}):
        with pytest.raises(ValueError, match="second_turn asks for another word first"):
            NeedlePrompts(tokenizer, second_turn=True, **options)


@pytest.mark.parametrize("count", [1, 2, 7, 50, 10_000])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_the_interval_holds_the_shares_that_are_near_enough(share, count):
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share <= high <= 1
    for end in {low, high} - {0, 1}:
        distance = 1.959964 * (end * (1 - end) / count) ** 0.5
        assert abs(share - end) == pytest.approx(distance, abs=1e-7)
    inside, outside = (low + high) / 2, high + 1e-3
    assert abs(share - inside) <= 1.959964 * (inside * (1 - inside) / count) ** 0.5
    assert outside > 1 or abs(share - outside) > 1.959964 * (outside * (1 - outside) / count) ** 0.5


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    draw, covered = random.Random(0), 0
    for _ in range(2000):
        mean = sum(draw.random() < 0.8 for _ in range(20)) / 20
        low, high = wilson_interval(mean, 20)
        covered += low <= 0.8 <= high
    assert 0.93 < covered / 2000 < 0.975
    with pytest.raises(ValueError, match="count must be a whole number of at least 1"):
        wilson_interval(0.5, 0)
