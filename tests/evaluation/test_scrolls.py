"""SCROLLS: the official numbers, loading, prompts, runs and the command."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zipfile
from contextlib import contextmanager, nullcontext

import matplotlib as mpl
import pytest
from rich.console import Console
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.evaluation import read_records, scrolls, scrolls_metrics
from tests.command_line import invoke

mpl.use("agg")
pytest.importorskip("rouge_score")

OFFICIAL = {  # the benchmark's own example
    "predictions": ["exact match example", "hello there", "general kenobi"],
    "references": [["exact match example"], ["hello", "hi there"], ["commander kenobi"]],
}


def rows_of(references):
    return [{"id": str(n), "output": text} for n, texts in enumerate(references) for text in texts]


def score(task, predictions, references):
    return scrolls.evaluate(task, {str(n): text for n, text in enumerate(predictions)}, rows_of(references))


@pytest.mark.parametrize("task", ["gov_report", "summ_screen_fd", "qmsum"])
def test_the_official_example_rouge(task):
    result = score(task, **OFFICIAL)
    del result["rouge/rougeLsum"]
    assert result == {
        "rouge/rouge1": 72.2222,
        "rouge/rouge2": 33.3333,
        "rouge/rougeL": 72.2222,
        "rouge/geometric_mean": 55.8136,
        "num_predicted": 3,
        "mean_prediction_length_characters": 14.6667,
        "scrolls_score": 55.8136,
        "display_keys": ["rouge/rouge1", "rouge/rouge2", "rouge/rougeL"],
        "display": [72.2222, 33.3333, 72.2222],
    }


@pytest.mark.parametrize(
    ("task", "metric", "value"),
    [
        ("narrative_qa", "f1", 72.2222),
        ("qasper", "f1", 72.2222),
        ("quality", "exact_match", 33.3333),
        ("contract_nli", "exact_match", 33.3333),
    ],
)
def test_the_official_example_f1_and_exact_match(task, metric, value):
    assert score(task, **OFFICIAL) == {
        metric: value,
        "num_predicted": 3,
        "mean_prediction_length_characters": 14.6667,
        "scrolls_score": value,
        "display_keys": [metric],
        "display": [value],
    }


@pytest.mark.parametrize(
    ("prediction", "reference", "f1", "exact_match"),
    [
        ("the", "a", 0, 100),
        ("", "", 0, 100),
        ("U.S.", "us", 100, 100),
        ("the-cat", "cat", 0, 0),
        ("yes yes", "yes", 66.6667, 0),
        ("don't", "dont", 100, 100),
        ("na\u00efve", "naive", 0, 0),
        ("  The  Cat ", "cat", 100, 100),
        ("", "cat", 0, 0),
    ],
)
def test_f1_and_exact_match_of_a_pair(prediction, reference, f1, exact_match):
    assert score("qasper", [prediction], [[reference]])["f1"] == f1
    assert score("quality", [prediction], [[reference]])["exact_match"] == exact_match


def test_the_best_reference_counts_for_every_kind_of_rouge_apart():
    result = score("qmsum", ["a b c d e f"], [["a b x y z w q r", "a f e c b d"]])
    assert result["display"] == [100, 16.6667, 50]
    assert result["scrolls_score"] == 43.679


def test_the_geometric_mean_is_taken_of_the_means():
    result = score("gov_report", ["a b c", "x"], [["a b c"], ["x"]])
    assert result["display"] == [100, 50, 100]
    assert result["scrolls_score"] == 79.3701


def test_random_pairs_score_as_rouge_score_does_by_itself():
    """5,000 pairs with one to three references against rouge-score called with nothing of ours around it."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    draw = random.Random(0)
    forms = ["Running", "runs", "run", "jumped", "jumps"]  # a stemmer would take them for equal
    words = [*"abcd", *forms, "don't", "U.S.", "\u00e9t\u00e9", "42,", "\n", "...", ""]

    def text():
        return " ".join(draw.choices(words, k=draw.randrange(12)))

    for _ in range(50):
        predictions = [text() for _ in range(100)]
        references = [[text() for _ in range(draw.choice([1, 1, 2, 3]))] for _ in predictions]
        best = {kind: [] for kind in ("rouge1", "rouge2", "rougeL")}
        for prediction, several in zip(predictions, references, strict=True):
            for kind in best:
                best[kind].append(max(scorer.score(one, prediction)[kind].fmeasure for one in several))
        means = [100 * sum(values) / 100 for values in best.values()]
        result = score("gov_report", predictions, references)
        assert result["display"] == pytest.approx(means, abs=5.1e-5)
        geometric = (means[0] * means[1] * means[2]) ** (1 / 3)
        assert result["rouge/geometric_mean"] == pytest.approx(geometric, abs=5.1e-5)


def naive_f1(prediction, reference):
    def words(text):
        kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    left, right = words(prediction), words(reference)
    shared = 0
    rest = list(right)
    for word in left:
        if word in rest:
            rest.remove(word)
            shared += 1
    if not shared:
        return 0.0
    return 2 * (shared / len(left)) * (shared / len(right)) / (shared / len(left) + shared / len(right))


def test_random_pairs_score_as_a_naive_f1():
    draw = random.Random(1)
    words = ["the", "a", "An", "cat", "Cat.", "dog", "do-g", "-", "", "theatre", "42"]
    for _ in range(300):
        prediction, references = (
            " ".join(draw.choices(words, k=draw.randrange(7))),
            [" ".join(draw.choices(words, k=draw.randrange(7))) for _ in range(draw.choice([1, 2]))],
        )
        expected = 100 * max(naive_f1(prediction, reference) for reference in references)
        assert score("qasper", [prediction], [references])["f1"] == round(expected, 4)


def test_sentences_go_into_rouge_lsum_alone(monkeypatch):
    monkeypatch.setattr(scrolls_metrics, "_sentence_splitter", lambda: lambda text: text.replace(". ", ".\n"))
    prediction, reference = ["c d. a b."], [["a b. c d."]]
    split = score("gov_report", prediction, reference)
    monkeypatch.setattr(scrolls_metrics, "_sentence_splitter", lambda: None)
    whole = score("gov_report", prediction, reference)
    assert (split.pop("rouge/rougeLsum"), whole.pop("rouge/rougeLsum")) == (100, None)
    assert split == whole
    assert list(score("qmsum", prediction, reference))[:5] == [
        *("rouge/rouge1", "rouge/rouge2", "rouge/rougeL", "rouge/rougeLsum", "rouge/geometric_mean")
    ]


def test_several_rows_of_one_id_are_several_references():
    rows = [{"id": "q", "output": "red"}, {"id": "p", "output": "x"}, {"id": "q", "output": "dark blue"}] * 2
    assert scrolls.evaluate("qasper", {"p": "x", "q": "blue"}, rows)["f1"] == round((100 + 200 / 3) / 2, 4)


def test_missing_and_redundant_ids_are_named():
    rows = rows_of([["a"], ["b"], ["c"]])
    with pytest.raises(ValueError, match=r"exactly the rows' 3 ids, got 2 missing ids \('1', '2'\) and 1 redundant"):
        scrolls.evaluate("quality", {"0": "a", "x": "b"}, rows)
    many = {str(n): "" for n in range(20)}
    with pytest.raises(ValueError, match=r"17 redundant ids \('3', '4', '5', '6', '7', \.\.\.\)"):
        scrolls.evaluate("quality", many, rows)


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, "task must be one of gov_report", lambda: scrolls.evaluate("squad", {}, [])),
        (ValueError, "at least one example", lambda: scrolls.evaluate("quality", {}, [])),
        (
            ValueError,
            "outputs? .*private|private",
            lambda: scrolls.evaluate("quality", {}, [{"id": "0", "output": None}]),
        ),
        (TypeError, "ids to texts, got '0': 3", lambda: scrolls.evaluate("quality", {"0": 3}, rows_of([["3"]]))),
        (ValueError, "seven tasks", lambda: scrolls.benchmark({"quality": {}})),
        (ValueError, "limit", lambda: scrolls.Rows("quality", ".", limit=0)),
        (ValueError, "task must be one of", lambda: scrolls.Rows("squad", ".")),
        (ValueError, "task must be one of", lambda: scrolls.run(None, None, "squad", [], {})),
        (FileNotFoundError, "there is no nowhere", lambda: scrolls.Rows("quality", "nowhere")),
    ],
)
def test_bad_input_is_named(error, says, call):
    with pytest.raises(error, match=says):
        call()


def test_the_benchmarks_score_is_the_mean_of_the_seven():
    results = {task: score(task, **OFFICIAL) for task in scrolls.METRICS}
    whole = scrolls.benchmark(results)
    assert whole["scrolls_score"] == pytest.approx((3 * 55.8136 + 2 * 72.2222 + 2 * 33.3333) / 7)
    assert whole["qmsum"] == {key: results["qmsum"][key] for key in ("scrolls_score", "display", "display_keys")}


def test_scoring_logs_and_warns_nothing_and_leaves_the_root_logger_alone():
    program = """
import logging
logging.basicConfig(level=logging.NOTSET)
before = list(logging.getLogger().handlers)
from hf_longtrunc.evaluation import scrolls
print(scrolls.evaluate("gov_report", {"0": "a b"}, [{"id": "0", "output": "a b"}])["scrolls_score"])
assert logging.getLogger().handlers == before
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("100.0", "")


def test_without_rouge_score_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e \"\.\[eval\]\""):
        score("qmsum", **OFFICIAL)


# Loading


@pytest.fixture
def examples(prose):
    document = prose * 3
    return [
        {"id": "q0", "pid": "q0_0", "input": f"Who is he?\n\n{document}", "output": "Ishmael"},
        {"id": "q1", "pid": "q1_0", "input": f"Where does he go?\n\n{document}", "output": "to sea"},
        {"id": "q0", "pid": "q0_1", "input": f"Who is he?\n\n{document}", "output": "a sailor\u2028named \u00e9"},
        {"id": "q2", "pid": "q2_0", "input": f"When?\n\n{document}", "output": "November"},
    ]


@pytest.fixture
def sources(examples, tmp_path):
    """The same rows in every shape that is read: name -> path."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples)
    paths = {
        "jsonl": tmp_path / "some name.jsonl",
        "folder": tmp_path / "folder",
        "folder of tasks": tmp_path / "tasks",
        "zip": tmp_path / "qasper.zip",
        "folder of zips": tmp_path / "zips",
        "flat zip": tmp_path / "flat.zip",
    }
    for member in (
        paths["jsonl"],
        paths["folder"] / "validation.jsonl",
        paths["folder of tasks"] / "qasper" / "validation.jsonl",
    ):
        member.parent.mkdir(parents=True, exist_ok=True)
        member.write_text(text, encoding="utf-8")
    paths["folder of zips"].mkdir()
    for path, name in [
        (paths["zip"], "qasper/validation.jsonl"),
        (paths["folder of zips"] / "qasper.zip", "qasper/validation.jsonl"),
        (paths["flat zip"], "validation.jsonl"),
    ]:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, text)
    return paths


SHAPES = ["jsonl", "folder", "folder of tasks", "zip", "folder of zips", "flat zip"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_rows_again_and_again(sources, examples, shape):
    rows = scrolls.Rows("qasper", sources[shape])
    assert list(rows) == examples
    assert list(rows) == examples


def test_the_hubs_zip_is_asked_for_by_name(sources, examples, monkeypatch):
    import huggingface_hub

    def download(*args, **kwargs):
        assert (args, kwargs) == (("tau/scrolls", "qasper.zip"), {"repo_type": "dataset"})
        return str(sources["zip"])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert list(scrolls.Rows("qasper")) == examples


def test_a_limit_counts_examples_and_keeps_all_their_references(sources, examples):
    assert list(scrolls.Rows("qasper", sources["zip"], limit=1)) == [examples[0], examples[2]]
    assert list(scrolls.Rows("qasper", sources["zip"], limit=2)) == examples[:3]


def test_what_a_source_lacks_is_named(sources, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of qasper/train\.jsonl, train\.jsonl"):
        scrolls.Rows("qasper", sources["zip"], split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"qasper\.zip"):
        scrolls.Rows("qasper", tmp_path / "empty")


@pytest.mark.parametrize("line", ["no json", "[]", '{"id": 3, "input": "x"}', '{"id": "3"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"id": "0", "input": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="line 3: expected a JSON object with the texts id and input"):
        list(scrolls.Rows("qasper", tmp_path / "rows.jsonl"))


# Prompts


def test_a_causal_prompt_is_the_document_and_then_the_question():
    row = {"id": "0", "input": "Who?\n\nA text.\n\nOf two paragraphs.\n"}
    assert scrolls.prompt("qasper", row) == ("A text.\n\nOf two paragraphs.", "\n\nQuestion: Who?\n\nAnswer:")
    document, ask = scrolls.prompt("gov_report", row)
    assert document == row["input"].strip()
    assert "summary of the report" in ask
    with pytest.raises(ValueError, match="row '0' of qmsum has no blank line"):
        scrolls.prompt("qmsum", {"id": "0", "input": "Who? A text."})


def test_the_options_of_quality_belong_to_the_question():
    question = "Why?\n\n (A) one\n (B) two\n (C) three\n (D) four"
    document, ask = scrolls.prompt(
        "quality", {"id": "0", "input": f"{question}\n\n\nOnce upon a time.\n\nThe end (D)."}
    )
    assert document == "Once upon a time.\n\nThe end (D)."
    assert f"Question: {question}\n\nAnswer:" in ask


# Runs


@pytest.fixture
def model(tiny_folder):
    return load_pretrained(tiny_folder)


def test_a_run_predicts_every_example_once_and_evaluates(model, sources):
    rows = scrolls.Rows("qasper", sources["zip"])
    arms = {"unmodified": nullcontext, "LM-Infinite": LMInfinite(num_sink_tokens=2, window_length=32)}
    records = scrolls.run(*model, "qasper", rows, arms, max_new_tokens=4)
    assert [(record.arm, record.id) for record in records] == [(arm, f"q{n}") for arm in arms for n in range(3)]
    for arm in arms:
        predicted = scrolls.predictions(records, arm)
        assert list(predicted) == ["q0", "q1", "q2"]
        assert scrolls.evaluate("qasper", predicted, rows)["num_predicted"] == 3
    with pytest.raises(ValueError, match="one of unmodified, LM-Infinite, got None"):
        scrolls.predictions(records)
    assert len(scrolls.predictions(records[:3])) == 3


def test_a_prompt_is_read_whole_or_cut_at_the_documents_end_and_the_cut_is_counted(model, sources):
    tiny, tokenizer = model
    seen = []
    tiny.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    rows = list(scrolls.Rows("qasper", sources["jsonl"], limit=1))
    document, ask = scrolls.prompt("qasper", rows[0])
    whole = tokenizer(document).input_ids + tokenizer(ask, add_special_tokens=False).input_ids
    (record,) = scrolls.run(tiny, tokenizer, "qasper", rows, {"plain": nullcontext}, max_new_tokens=1)
    assert seen.pop() == whole
    assert (record.prompt_tokens, record.cut_tokens) == (len(whole), 0)
    asked = len(tokenizer(ask, add_special_tokens=False).input_ids)
    (record,) = scrolls.run(tiny, tokenizer, "qasper", rows, {"plain": nullcontext}, max_tokens=50, max_new_tokens=1)
    assert seen.pop() == whole[: 50 - asked] + whole[-asked:]
    assert (record.prompt_tokens, record.cut_tokens) == (50, len(whole) - 50)
    with pytest.raises(ValueError, match=f"behind the {asked} tokens of the question"):
        scrolls.run(tiny, tokenizer, "qasper", rows, {"plain": nullcontext}, max_tokens=asked)


def test_a_run_goes_on_where_it_was_cut_off(model, sources, tmp_path):
    class StoppedError(Exception):
        pass

    tiny, tokenizer = model
    rows, path = scrolls.Rows("qasper", sources["zip"]), tmp_path / "out" / "qasper.jsonl"
    asked = []

    @contextmanager
    def arm(loaded):
        generate = loaded.generate

        def counted(*args, **kwargs):
            if len(asked) == 2:
                raise StoppedError
            asked.append(1)
            return generate(*args, **kwargs)

        loaded.generate = counted
        yield loaded
        del loaded.generate

    with pytest.raises(StoppedError):
        scrolls.run(tiny, tokenizer, "qasper", rows, {"plain": arm}, max_new_tokens=2, path=path)
    del tiny.generate
    asked[:] = [1]
    records = scrolls.run(tiny, tokenizer, "qasper", rows, {"plain": arm}, max_new_tokens=2, path=path)
    assert len(asked) == 2
    assert records == read_records(path, scrolls.ScrollsRecord)
    assert scrolls.run(tiny, tokenizer, "qasper", rows, {"plain": arm}, max_new_tokens=2, path=path) == records
    asked[:] = []
    with pytest.raises(StoppedError):
        scrolls.run(tiny, tokenizer, "qasper", rows, {"plain": arm}, max_new_tokens=1, path=path)


@pytest.fixture
def encoder_decoder(trained_tokenizer):
    sizes = {"vocab_size": trained_tokenizer.get_vocab_size(), "d_model": 16, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(
        T5Config(**sizes, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()


def test_an_encoder_decoder_reads_the_row_as_it_stands(encoder_decoder, tokenizer, sources):
    seen = []
    encoder_decoder.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    tokenizer.truncation_side = "right"
    rows = list(scrolls.Rows("qasper", sources["zip"], limit=1))
    whole = tokenizer(rows[0]["input"], verbose=False).input_ids
    (record,) = scrolls.run(encoder_decoder, tokenizer, "qasper", rows, {"plain": nullcontext}, max_new_tokens=3)
    assert seen.pop() == whole
    assert (record.prompt_tokens, record.cut_tokens) == (len(whole), 0)
    settings = {"max_new_tokens": 3, "max_tokens": 40}
    (record,) = scrolls.run(encoder_decoder, tokenizer, "qasper", rows, {"plain": nullcontext}, **settings)
    assert seen.pop() == whole[:40]
    assert (record.prompt_tokens, record.cut_tokens) == (40, len(whole) - 40)


@pytest.fixture
def bart(trained_tokenizer):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=trained_tokenizer.get_vocab_size(), **sizes, **heads, forced_eos_token_id=None)
    ).eval()


def test_a_text_past_learned_positions_is_refused_with_the_way_out(bart, tokenizer, sources):
    rows = scrolls.Rows("qasper", sources["zip"], limit=1)
    with pytest.raises(ValueError, match=r"row 'q0' has \d+ tokens, more than .* max_tokens"):
        scrolls.run(bart, tokenizer, "qasper", rows, {"plain": nullcontext}, max_new_tokens=2)
    (record,) = scrolls.run(bart, tokenizer, "qasper", rows, {"plain": nullcontext}, max_new_tokens=2, max_tokens=32)
    assert record.prompt_tokens == 32


def test_table_and_bars_show_every_arm():
    results = {
        "unmodified": score("qmsum", **OFFICIAL),
        "patched": score("qmsum", ["x", "y", "z"], [["x"], ["y"], ["z"]]),
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(scrolls.scrolls_table(results))
    shown = console.export_text()
    assert "55.81" in shown
    assert "rougeL" in shown
    axes = scrolls.plot_scrolls(results)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["unmodified", "patched"]
    assert [bar.get_height() for bar in axes.containers[0]] == results["unmodified"]["display"]
    assert scrolls.plot_scrolls(results, axes) is axes


def test_the_command_writes_records_predictions_metrics_and_picture(tiny_folder, sources, tmp_path):
    options = ["--lm-infinite", "--window", 32, "--sinks", 2, "--max-new-tokens", 3, "--output-dir", tmp_path / "out"]
    result = invoke("scrolls", "qasper", "--model", tiny_folder, "--data", sources["zip"], *options)
    assert result.exit_code == 0, result.output
    assert "0 of 6 prompts were cut" in result.output
    rows = scrolls.Rows("qasper", sources["folder"])
    for arm in ("unmodified", "lm-infinite"):
        predicted = json.loads((tmp_path / "out" / f"qasper_{arm}_predictions.json").read_text())
        metrics = json.loads((tmp_path / "out" / f"qasper_{arm}_metrics.json").read_text())
        assert scrolls.evaluate("qasper", predicted, rows) == metrics
    assert len(read_records(tmp_path / "out" / "qasper.jsonl", scrolls.ScrollsRecord)) == 6
    assert (tmp_path / "out" / "qasper.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_hands_unlimiformer_the_whole_text(bart, tokenizer, sources, tmp_path):
    bart.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    options = ["--unlimiformer", "--max-tokens", 32, "--max-new-tokens", 3, "--output-dir", tmp_path / "out"]
    result = invoke("scrolls", "qasper", "--model", tmp_path / "bart", "--data", sources["zip"], *options)
    assert result.exit_code == 0, result.output
    records = read_records(tmp_path / "out" / "qasper.jsonl", scrolls.ScrollsRecord)
    read = {arm: {r.prompt_tokens for r in records if r.arm == arm} for arm in ("unmodified", "unlimiformer")}
    assert read["unmodified"] == {32}
    assert min(read["unlimiformer"]) > 32
    assert all((record.cut_tokens == 0) == (record.arm == "unlimiformer") for record in records)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["squad"], "'squad' is not one of"),
        (["qasper", "--data", "nowhere"], "there is no nowhere"),
        (["qasper", "--data", ".", "--split", "test"], "holds none of"),
    ],
)
def test_the_command_says_what_is_wrong(tiny_folder, tmp_path, args, says):
    result = invoke("scrolls", *args, "--model", tiny_folder, "--output-dir", tmp_path)
    assert result.exit_code == 2
    assert says in result.output
