"""Finders against naive references."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hf_longtrunc import BM25, Fused, SentenceEncoder, load_encoder
from hf_longtrunc.asking.finders import content_words

UNITS = [
    "The parson was carried off by measles within the week.",
    "Upon the trunk somebody had painted the number seven.",
    "It rained.",
    "The trunk stood in the hall, and the parson sat upon the trunk.",
    "Nobody came to the inn that night but a wet dog.",
]


class Fixed:
    """A finder whose scores are given."""

    identity = "fixed"

    def __init__(self, scores, threshold=0.0):
        self.scores, self.threshold, self.saved = torch.tensor(scores), threshold, "nothing"

    def read(self, units, saved=None, *, progress=False):
        from hf_longtrunc.asking.finders import Scorer

        self.saved = saved
        return Scorer(lambda question: self.scores.clone(), {"own": torch.ones(1)})


def test_bm25_is_that_of_its_definition():
    pytest.importorskip("bm25s")
    question, asked = "Which number was painted on the trunk of Ezra?", ["which", "number", "painted", "trunk", "ezra"]
    stop = {"the", "was", "by", "and", "in", "that", "it", "but", "to", "upon", "had", "off"}
    words = [[w.strip(".,").lower() for w in unit.split()] for unit in UNITS]
    words = [
        [w for w in unit if len(w) > 1 and w not in {"the", "was", "by", "and", "in", "that", "it", "but", "to"}]
        for unit in words
    ]
    assert stop
    mean = sum(map(len, words)) / len(words)
    idf = {w: math.log(1 + (5 - n + 0.5) / (n + 0.5)) for w in asked for n in [sum(w in unit for unit in words)]}
    expected = [
        sum(idf[w] * unit.count(w) / (unit.count(w) + 1.5 * (1 - 0.75 + 0.75 * len(unit) / mean)) for w in asked)
        for unit in words
    ]
    found = BM25().read(UNITS).score(question)
    torch.testing.assert_close(found, torch.tensor(expected) / sum(idf.values()), rtol=1e-4, atol=1e-5)
    assert found.argmax() == 1
    assert BM25().read(UNITS).score("Quousque tandem?").tolist() == [0.0] * 5
    assert BM25().read(UNITS).score("and the").tolist() == [0.0] * 5


def test_a_score_is_the_cosine_of_means_of_texts_alone_less_their_mean(encoder_folder):
    model, tokenizer = load_encoder(encoder_folder, dtype=torch.float32, device="cpu")
    finder = SentenceEncoder(model, tokenizer)
    reading = finder.read(UNITS)
    alone = []
    for text in [*UNITS, "Who sat upon the trunk?"]:
        with torch.no_grad():
            mean = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].mean(0)
        alone.append(mean / mean.norm())
    torch.testing.assert_close(reading.tensors["vectors"].float(), torch.stack(alone[:-1]), atol=2e-3, rtol=0)
    mean = sum(alone[:-1]) / (5 + 16)  # 16 units' worth of nothing
    expected = torch.cosine_similarity(torch.stack(alone[:-1]) - mean, (alone[-1] - mean)[None])
    torch.testing.assert_close(reading.score("Who sat upon the trunk?"), expected, atol=2e-3, rtol=0)
    again = finder.read(UNITS, reading.tensors)
    assert torch.equal(again.score("Who?"), reading.score("Who?"))


def test_the_identity_of_an_encoder_is_that_of_its_weights(encoder_folder):
    model, tokenizer = load_encoder(encoder_folder, device="cpu")
    first = SentenceEncoder(model, tokenizer).identity
    for dtype in (torch.float32, torch.bfloat16):
        assert SentenceEncoder(*load_encoder(encoder_folder, dtype=dtype, device="cpu")).identity == first
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3, 2] += 1e-2
    assert SentenceEncoder(model, tokenizer).identity != first


def test_fused_adds_weighted_scores():
    one, other = Fixed([0.9, 0.1, 0.5]), Fixed([3.0, 9.0, 8.0])
    fused = Fused(one, other, weights=(2, 0.5), threshold=1)
    found = fused.read(["unit"] * 3, {"0.own": torch.ones(1), "1.own": torch.zeros(1)})
    assert found.score("?").tolist() == pytest.approx([1.8 + 1.5, 0.2 + 4.5, 1.0 + 4.0])
    assert (one.saved, other.saved) == ({"own": torch.ones(1)}, {"own": torch.zeros(1)})
    assert sorted(found.tensors) == ["0.own", "1.own"]
    assert (fused.identity, fused.threshold) == ("2 fixed + 0.5 fixed", 1)
    assert Fused(one, other).identity != fused.identity
    with pytest.raises(ValueError, match="at least two finders, got 1"):
        Fused(one)
    with pytest.raises(ValueError, match="weights must be one for each of 2 finders, got 3"):
        Fused(one, other, weights=(1, 2, 3))


def test_a_threshold_is_a_number():
    with pytest.raises(TypeError, match="threshold must be a number, got 'high'"):
        BM25(threshold="high")


def test_a_model_is_no_tokenizer():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="an encoder and its tokenizer, got Linear and Linear"):
        SentenceEncoder(model, model)


def test_units_without_a_word_score_nothing():
    scores = BM25().read(["It is.", "..."]).score("Was it he?")
    assert scores.tolist() == [0.0, 0.0]


def test_relevance_is_the_coverage_of_content_words_and_the_cosine_without_names(encoder_folder):
    pytest.importorskip("bm25s")
    model, tokenizer = load_encoder(encoder_folder, dtype=torch.float32, device="cpu")
    question, passage = "What painted trunk did Ezra own?", f"{UNITS[1]} Ezra did."
    words = content_words(question, ["Ezra"])
    assert [question[start:end] for start, end in words] == ["painted", "trunk"]  # own is a function word there

    def states(text):
        with torch.no_grad():
            return model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]

    asked, read = (torch.nn.functional.normalize(states(text), dim=1) for text in (question, passage))
    places = tokenizer(question, return_offsets_mapping=True).offset_mapping
    means = []
    for start, end in words:
        own = [n for n, (a, b) in enumerate(places) if a < b and start <= a < end]
        means.append(sum(max(float(asked[n] @ each) for each in read) for n in own) / len(own))
    one, other = (states(text.replace("Ezra", "he")).mean(0) for text in (question, passage))
    expected = sum(means) / 2 + float(torch.cosine_similarity(one, other, dim=0))
    finder = SentenceEncoder(model, tokenizer, least_relevance=0.4)
    assert finder.relevance(question, ["Ezra"], passage) == pytest.approx(expected, abs=1e-4)
    assert finder.relevance(question, [], passage) != pytest.approx(expected, abs=1e-4)


def test_fused_finders_judge_by_the_first(encoder_folder):
    pytest.importorskip("bm25s")
    encoder = SentenceEncoder(*load_encoder(encoder_folder, device="cpu"), least_relevance=0.4)
    asked = ("What painted trunk did Ezra own?", ["Ezra"], UNITS[3])
    assert BM25().relevance(*asked) == 0.5
    assert BM25().relevance(*asked[:2], UNITS[1]) == 1
    assert BM25().relevance("Was it he?", [], UNITS[1]) == 1  # no content word
    for first, second in ((encoder, BM25()), (BM25(), encoder)):
        fused = Fused(first, second)
        assert fused.relevance(*asked) == first.relevance(*asked)
        assert fused.least_relevance == first.least_relevance
    assert Fused(Fixed([1.0]), BM25()).least_relevance is None  # nobody judges


def test_many_texts_are_read_in_few_shapes_and_each_as_if_alone(encoder_folder):
    model, tokenizer = load_encoder(encoder_folder, dtype=torch.float32, device="cpu")
    finder, shapes = SentenceEncoder(model, tokenizer), []
    draw, words = random.Random(0), ["the", "old", "trunk", "of", "Ezra", "sat", "in", "rain"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(900)]

    def note(module, args, kwargs):
        shapes.append(kwargs["input_ids"].shape)

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    vectors = finder.encode(texts)
    hook.remove()
    lengths = {columns for _, columns in shapes}
    assert all(columns % 16 == 0 for columns in lengths)
    assert all(rows == 2048 // columns for rows, columns in shapes[:-1])
    assert len(set(shapes)) <= len(lengths) + 1
    for n in draw.sample(range(900), 20):
        torch.testing.assert_close(vectors[n], finder.encode([texts[n]])[0], atol=1e-5, rtol=0)
    assert finder.encode([]).shape == (0, model.config.hidden_size)
    assert finder.encode(texts[:3], dtype=torch.float16).dtype == torch.float16
