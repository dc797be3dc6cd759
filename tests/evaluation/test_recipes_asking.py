"""The recipes that ask long texts, on a tiny model and a tiny sentence encoder."""

from __future__ import annotations

import inspect
import runpy
from functools import partial
from pathlib import Path

import matplotlib as mpl
import pytest
import typer

from hf_longtrunc import load_encoder, load_pretrained
from hf_longtrunc.evaluation import read_records
from instruments.find_and_read import FindAndReadRecord
from tests.asking.conftest import encoder_folder  # noqa: F401

pytest.importorskip("bm25s")
mpl.use("agg")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_folder):
    """A folder of a model that pads, and a text that is long enough for 1,500 tokens."""
    folder = tmp_path_factory.mktemp("asking")
    tiny, tokenizer = load_pretrained(tiny_folder, device="cpu")
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token
    for part in (tiny, tokenizer):
        part.save_pretrained(folder / "model")
    lines = [f"The road went on past house number {n}, and nobody spoke of the sea or of it." for n in range(900)]
    (folder / "road.txt").write_text(" ".join(lines), encoding="utf-8")
    return folder


def test_recipe_asking(files, encoder_folder, tmp_path, capsys):  # noqa: F811
    main = runpy.run_path(str(RECIPES / "asking.py"))["main"]
    given = {"texts": str(files / "road.txt"), "lengths": "1500", "each": 1, "model": str(files / "model")}
    given |= {"encoder": encoder_folder, "part": "report", "read": True, "trailing": False, "conversations": True}
    given |= {"kinds": "number,place,person,birth,unshared,unsaid", "count": 1, "context": 150, "hops": 1, "seed": 0}
    main(arms="ask,finder,encoder,bm25", out=tmp_path, **given)
    printed = capsys.readouterr().out
    assert "words shared: right under ask alone" in printed
    assert "turns 2 to 4: right as a turn alone" in printed
    records = read_records(tmp_path / "records.jsonl", FindAndReadRecord)
    assert {record.arm for record in records} == {"ask", "finder", "encoder", "bm25", "oracle"}
    by_arm = [{r.question: r.found for r in records if r.arm == arm} for arm in ("ask", "finder")]
    assert by_arm[0] == by_arm[1]  # the model chooses among passages, and refuses none
    assert all(record.found for record in records if record.arm == "encoder" and record.kind == "unshared")
    with pytest.raises(typer.BadParameter, match="--arms takes ask, finder, encoder, bm25; got fused"):
        main(arms="fused", out=tmp_path, **given)


def test_recipe_asking_long(files, encoder_folder, tmp_path, capsys):  # noqa: F811
    recipe = runpy.run_path(str(RECIPES / "asking_long.py"))
    texts = str(files / "road.txt")
    given = {"texts": texts, "lengths": "2400,4000", "each": "1,2", "model": str(files / "model")}
    recipe["main"](**given, encoder=encoder_folder, out=tmp_path)
    records = read_records(tmp_path / "asking_long.jsonl", recipe["LongTextRecord"])
    assert [(record.length, record.trial) for record in records] == [(2400, 0), (4000, 0), (4000, 1)]
    assert [record.loaded_answers_the_same for record in records] == [True, True, None]
    assert all(len(r.right) == len(r.strict) == len(r.kinds) == len(r.question_seconds) == 14 for r in records)
    assert "4,000" in capsys.readouterr().out


def test_recipe_off_topic(files, encoder_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("hf_longtrunc.pretrained.load_encoder", lambda _, load=load_encoder: load(encoder_folder))
    recipe = runpy.run_path(str(RECIPES / "off_topic.py"))
    recipe["main"](texts=str(files / "road.txt"), characters=2000, out=tmp_path)
    records = read_records(tmp_path / "records.jsonl", recipe["OffTopicRecord"])
    assert len(records) == 2 * len(recipe["QUESTIONS"]) == 120
    above = sum(record.score > 0.35 for record in records) / 120
    assert f"0.35 (default) │ {above:.3f}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def ruler():
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_, **__: False)
        yield runpy.run_path(str(RECIPES / "ruler.py"))


def test_recipe_ruler_goes_on_prompt_by_prompt(ruler, files, tmp_path, capsys, monkeypatch):
    given = {"model": str(files / "model"), "lengths": "512", "encoder": None, "tasks": "niah_single_1"}
    main, recorded = partial(ruler["main"], out=tmp_path, **given), tmp_path / "ruler.jsonl"
    main(arms="unmodified,bm25", limit=1)
    first = read_records(recorded, ruler["RulerRecord"])
    assert [(r.model, r.arm, r.length, r.number) for r in first] == [
        ("model", "unmodified", 512, 0),
        ("model", "bm25", 512, 0),
    ]
    assert "niah_single_1" in capsys.readouterr().out
    assert (tmp_path / "ruler.png").exists()
    main(arms="unmodified", limit=2)
    assert read_records(recorded, ruler["RulerRecord"])[:2] == first
    assert [r.number for r in read_records(recorded, ruler["RulerRecord"])] == [0, 0, 1]
    monkeypatch.setitem(ruler["main"].__globals__, "prompts", lambda *_: pytest.fail("answered again"))
    main(arms="unmodified", limit=2)
    with pytest.raises(typer.BadParameter, match="--arms takes unmodified, yarn"):
        main(arms="rag", limit=1)


@pytest.mark.parametrize("task", ["niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"])
def test_ruler_makes_as_many_prompts_as_are_asked_and_the_same_for_every_limit(ruler, task, monkeypatch):
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, vt_utils

    made, makers = [], {niah_utils: "generate_samples", vt_utils: "sys_vartrack_w_noise_random"}
    makers |= {cwe_utils: "sys_word_pair_random", fwe_utils: "sys_kwext"}

    def noted(make, *args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    for module, maker in makers.items():
        monkeypatch.setattr(module, maker, partial(noted, getattr(module, maker)))
        words = type("Words", (), {"__call__": lambda _, text: type("Encoded", (), {"input_ids": text.split()})})
        monkeypatch.setattr(module, "get_tokenizer", lambda _, words=words: words())
    one, two = (ruler["prompts"](task, 900, limit, "words") for limit in (1, 2))
    assert max(map(len, made)) == 2
    assert [len(one), len(two)] == [1, 2]
    assert one[0][0] == two[0][0] != two[1][0]
    prompt, _, score = one[0]
    assert score("") == 0.0
    assert score(prompt) == 1.0  # which holds the answers


def test_rulers_prompt_is_cut_where_its_question_begins(ruler, files, monkeypatch):
    seen = {}

    def ask(model, tokenizer, index, question, **given):
        seen.update(text=index.documents[""], question=question, **given)

    monkeypatch.setitem(ruler["answers_of"].__globals__, "ask", ask)
    answer, *_ = ruler["answers_of"]("bm25", str(files / "model"), 512, None)
    answer("Some words.\nThe number is 7.\nWhat is it? It is", max_new_tokens=9)
    assert seen == {"text": "Some words.\nThe number is 7.", "question": "What is it? It is", "max_new_tokens": 9}


def test_rulers_arms_read_with_their_techniques(ruler, files, monkeypatch):
    attached = []
    for technique in ("DualChunkAttention", "LMInfinite", "StreamingLLM"):
        of = ruler["answers_of"].__globals__[technique]
        monkeypatch.setattr(of, "attach", lambda self, model: attached.append((type(self).__name__, model)))
    for arm in ("unmodified", "yarn", "dynamic ntk", "streaming", "lm-infinite", "dual chunk"):
        ruler["answers_of"](arm, str(files / "model"), 128, None)
    assert [name for name, _ in attached] == ["StreamingLLM", "LMInfinite", "DualChunkAttention"]
    assert all(model.config.rope_parameters["rope_type"] == "default" for _, model in attached)


def test_rulers_yarn_reaches_the_longest_prompt(ruler, files):
    answer, *_ = ruler["answers_of"]("yarn", str(files / "model"), 256, None)
    rope = inspect.getclosurevars(answer).nonlocals["model"].config.rope_parameters
    assert (rope["rope_type"], rope["factor"] * rope["original_max_position_embeddings"]) == ("yarn", 256)


def test_rulers_answer_ends_where_no_token_can_change_its_score(ruler, files):
    """The model says the same as without it, up to there."""
    answer, tokenizer, _ = ruler["answers_of"]("unmodified", str(files / "model"), 64, None)
    model = inspect.getclosurevars(answer).nonlocals["model"]
    ids = tokenizer("The road went on", return_tensors="pt").input_ids
    said = model.generate(ids, do_sample=False, max_new_tokens=9)[0, ids.shape[1] :]
    heard = []

    def score(text):
        heard.append(text)
        return 1.0 if text == tokenizer.decode(said[:4], skip_special_tokens=True) else 0.5

    watched = ruler["Watched"](tokenizer, score)
    assert ruler["answered"](answer, "The road went on", 9, watched) == {"score": 1.0}
    assert len(dict.fromkeys(heard)) <= 4
    watched = ruler["Watched"](tokenizer, lambda text: 0.25)
    assert ruler["answered"](answer, "The road went on", 9, watched) == {"score": 0.25}
