"""`hf-longtrunc match` on a tiny model."""

from __future__ import annotations

from tests.command_line import invoke


def test_match_prints_the_table_and_writes_the_picture(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the lighthouse keeper had not spoken to anyone")
    picture = tmp_path / "match.png"
    result = invoke("match", str(text), "--model", model_folder, "--rank", "3", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    for part in ("refused", "BAT on eta", "10.0%", "45 tokens, rank 3"):
        assert part in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_match_of_one_letter_is_refused(model_folder):
    result = invoke("match", "--string", "a", "--model", model_folder, "--rank", "3")
    assert result.exit_code == 2
    assert "at least 2 tokens" in " ".join(result.output.split())
