"""The recipes that ask long texts, on a tiny model and a tiny sentence encoder."""

from __future__ import annotations

import runpy
from pathlib import Path

import matplotlib as mpl
import pytest
import typer

from hf_longtrunc import load_pretrained
from hf_longtrunc.evaluation import FindAndReadRecord, read_records
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
    main(arms="ask,encoder,bm25", out=tmp_path, **given)
    printed = capsys.readouterr().out
    assert "words shared: right under ask alone" in printed
    assert "turns 2 to 4: right as a turn alone" in printed
    records = read_records(tmp_path / "records.jsonl", FindAndReadRecord)
    assert {record.arm for record in records} == {"ask", "encoder", "bm25", "oracle"}
    assert all(record.found for record in records if record.arm == "encoder" and record.kind == "unshared")
    with pytest.raises(typer.BadParameter, match="--arms takes ask, encoder, bm25; got fused"):
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


def test_recipe_ruler(files, encoder_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    pytest.importorskip("lm_eval")
    pytest.importorskip("nltk")
    monkeypatch.setattr("nltk.download", lambda *_, **__: False)
    recipe = runpy.run_path(str(RECIPES / "ruler.py"))
    given = {"model": str(files / "model"), "lengths": "4096", "limit": 1, "finder": "bm25", "encoder": None}
    main, globals_ = recipe["main"], recipe["main"].__globals__
    main(arms="unmodified,ask", tasks="niah_single_1", out=tmp_path, **given)
    records = read_records(tmp_path / "ruler.jsonl", recipe["RulerRecord"])
    assert [(r.arm, r.task, r.samples) for r in records] == [
        ("unmodified", "niah_single_1", 1),
        ("ask", "niah_single_1", 1),
    ]
    assert "niah_single_1" in capsys.readouterr().out
    assert (tmp_path / "ruler.png").exists()
    monkeypatch.setitem(globals_, "measured", lambda *_: pytest.fail("measured again"))
    main(arms="unmodified,ask", tasks="niah_single_1", out=tmp_path, **given)
    assert read_records(tmp_path / "ruler.jsonl", recipe["RulerRecord"]) == records
    with pytest.raises(typer.BadParameter, match="--arms takes unmodified, yarn"):
        main(arms="rag", tasks="niah_single_1", out=tmp_path, **given)


def test_rulers_prompt_is_cut_where_its_question_begins(monkeypatch):
    pytest.importorskip("lm_eval")
    recipe = runpy.run_path(str(RECIPES / "ruler.py"))
    seen = {}

    def ask(model, tokenizer, index, question, **given):
        seen.update(text=index.documents[""], question=question, **given)
        return [type("Answer", (), {"text": "7"})]

    monkeypatch.setitem(recipe["AskLM"].__init__.__globals__, "ask", ask)
    from hf_longtrunc import BM25

    lm = recipe["AskLM"](None, None, BM25())
    request = type("Request", (), {"args": ("Some words.\nThe number is 7.\nWhat is it? It is", {"max_gen_toks": 9})})
    assert lm.generate_until([request]) == ["7"]
    assert seen == {"text": "Some words.\nThe number is 7.", "question": "What is it? It is", "max_new_tokens": 9}
