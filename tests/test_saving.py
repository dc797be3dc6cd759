"""Folders of saved things: what goes in comes out, and damage is found."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_longtrunc.saving import load_folder, placing, replacing, save_folder, writing_name

TENSORS = {"factors": torch.arange(6.0).view(2, 3).double(), "ids": torch.tensor([3, 1])}
SETTINGS = {"rank": 3, "softcap": None, "name": "naïve"}
SHAPES = {"factors": "vocab rank", "ids": "n"}


@pytest.fixture
def folder(tmp_path):
    save_folder(tmp_path / "new" / "basis", "basis", TENSORS, SETTINGS)
    return tmp_path / "new" / "basis"


def test_round_trip(folder):
    tensors, settings = load_folder(folder, "basis", SHAPES, tuple(SETTINGS))
    assert settings == SETTINGS
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert sorted(path.name for path in folder.iterdir()) == ["basis.json", "basis.safetensors"]


def test_saving_again_takes_the_place(folder):
    save_folder(folder, "basis", TENSORS, {**SETTINGS, "rank": 4})
    assert load_folder(folder, "basis", SHAPES)[1]["rank"] == 4


@pytest.mark.parametrize("name", ["basis.json", "basis.safetensors"])
def test_every_flipped_bit_is_found(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        # A bit may turn white space into other white space, which is the same json.
        if name.endswith("json") and _json(flipped) == _json(whole):
            continue
        with pytest.raises((ValueError, FileNotFoundError)):
            load_folder(folder, "basis", SHAPES, tuple(SETTINGS))


def _json(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_missing_file_is_named(folder):
    (folder / "basis.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no saved basis: basis\.safetensors is missing"):
        load_folder(folder, "basis", SHAPES)
    with pytest.raises(FileNotFoundError, match=r"holds no saved plan: plan\.json is missing"):
        load_folder(folder, "plan", SHAPES)


def test_a_missing_field_is_named(folder):
    with pytest.raises(ValueError, match="holds a basis without values, width"):
        load_folder(folder, "basis", {**SHAPES, "values": "n"}, ("rank", "width"))


def test_another_kind_and_another_format_are_refused(folder):
    described = json.loads((folder / "basis.json").read_text())
    for name, value, message in (("kind", "plan", "describes a 'plan'"), ("format", 2, "has format 2")):
        (folder / "basis.json").write_text(json.dumps({**described, name: value}))
        with pytest.raises(ValueError, match=message):
            load_folder(folder, "basis", SHAPES)


def test_what_is_not_finite_or_of_another_shape_is_refused(tmp_path):
    save_folder(tmp_path, "basis", {"factors": torch.tensor([[torch.nan]])}, {})
    with pytest.raises(ValueError, match="factors must be finite"):
        load_folder(tmp_path, "basis", {"factors": "vocab rank"})
    with pytest.raises(ValueError, match=r"factors must have the dimensions \[n\], got \[1, 1\]"):
        load_folder(tmp_path, "basis", {"factors": "n"})


def test_tensors_of_another_writer_do_not_pass(folder):
    save_file(TENSORS, Path(folder, "basis.safetensors"), {"written": "by hand"})
    with pytest.raises(ValueError, match="checksum"):
        load_folder(folder, "basis", SHAPES)


# -- several who write, and who are killed -----------------------------------------------------------------------------


def test_what_a_killed_process_began_is_removed_by_the_next_writing(tmp_path, process_that_ended):
    here, process, token = writing_name().split("-")
    left = f".{here}-{process_that_ended}-{token}.basis.json"
    others = [f".{here}-{process}-{token}.basis.json", f".0{here[1:]}x-{process_that_ended}-{token}.basis.json"]
    others += [f".{here}-{process_that_ended}-{token}.plan.json", f".{here}--{token}.basis.json", ".basis.json"]
    for name in (left, *others):
        (tmp_path / name).touch()
    with replacing(tmp_path / "basis.json") as beside:
        beside.write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "basis.json"])
    (tmp_path / left).mkdir()  # what cannot be removed is in nobody's way
    with replacing(tmp_path / "basis.json") as beside:
        beside.write_text("[]")
    assert (tmp_path / "basis.json").read_text() == "[]"


def test_a_pair_is_of_one_writer(tmp_path):
    """The other began when nothing was there."""
    pair = tmp_path / "rows.bin", tmp_path / "rows.idx"
    meanwhile = pytest.raises(FileExistsError, match=r"rows\.bin exists: another process has written it meanwhile")
    with meanwhile, placing(*pair) as slow:
        slow[0].write_text("slow")
        with placing(*pair) as fast:
            for path, beside in zip(pair, fast, strict=True):
                beside.write_text(path.name)
        slow[1].write_text("slow")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {path: path.name for path in pair}


def test_of_several_who_save_at_once_one_is_there(tmp_path):
    """Steps of two that mix would leave one's tensors beside the other's checksum."""

    def save(number):
        for _ in range(10):
            save_folder(tmp_path, "basis", {"ids": torch.full((9,), number)}, {"rank": number})

    failed: list[object] = []
    hook, threading.excepthook = threading.excepthook, failed.append
    try:
        threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not failed
    tensors, settings = load_folder(tmp_path, "basis", {"ids": "n"}, ("rank",))
    assert tensors["ids"].tolist() == [settings["rank"]] * 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["basis.json", "basis.safetensors"]
