"""`hf-longtrunc match` on a tiny model."""

from __future__ import annotations

import json

from tests.command_line import invoke


def test_match_prints_the_table_and_writes_the_picture(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the lighthouse keeper had not spoken to anyone")
    picture = tmp_path / "match.png"
    result = invoke("match", str(text), "--model", model_folder, "--rank", "3", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    for part in ("refused", "BAT on eta", "typical_p", "10.0%", "p-less refuses", "45 tokens, rank 3"):
        assert part in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_match_of_one_letter_is_refused(model_folder):
    result = invoke("match", "--string", "a", "--model", model_folder, "--rank", "3")
    assert result.exit_code == 2
    assert "at least 11 tokens" in " ".join(result.output.split())


def test_match_prints_json_and_overwrites_nothing_by_itself(model_folder, tmp_path):
    picture = tmp_path / "match.png"
    text = "the lighthouse keeper had not spoken to anyone"
    arguments = ["match", "--string", text, "--model", model_folder, "--rank", "3", "--picture", picture, "--json"]
    result = invoke(*arguments, columns=None)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown["tokens"], shown["rank"]) == (45, 3)
    assert [row["refused"] for row in shown["parameters"]] == [0.05, 0.1]  # one of 45 tokens is 2.2 %
    assert list(shown["refused"]) == ["p-less", "p-less normalized", "min-k"]
    assert invoke(*arguments).exit_code == 2
    assert invoke(*arguments, "--force").exit_code == 0


def test_a_text_comes_from_standard_input(model_folder, tmp_path):
    options = ["--model", model_folder, "--rank", "3", "--picture", tmp_path / "match.png"]
    result = invoke("match", "-", *options, input="the lighthouse keeper")
    assert "20 tokens, rank 3" in result.stdout
