"""Folders of saved things: what goes in comes out, and damage is found."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_longtrunc.saving import load_folder, replacing, save_folder

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
    assert [path.name for path in folder.iterdir()] == ["basis.safetensors"]


def test_saving_again_takes_the_place(folder):
    save_folder(folder, "basis", TENSORS, {**SETTINGS, "rank": 4})
    assert load_folder(folder, "basis", SHAPES)[1]["rank"] == 4


def test_every_flipped_bit_is_found(folder):
    path = folder / "basis.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"save it again|expected 'basis' and"):
            load_folder(folder, "basis", SHAPES, tuple(SETTINGS))


def test_a_missing_file_is_named(folder):
    (folder / "basis.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no saved basis: basis\.safetensors is missing"):
        load_folder(folder, "basis", SHAPES)
    with pytest.raises(FileNotFoundError, match=r"holds no saved plan: plan\.safetensors is missing"):
        load_folder(folder, "plan", SHAPES)


def test_a_missing_field_is_named(folder):
    with pytest.raises(ValueError, match="holds a basis without values, width"):
        load_folder(folder, "basis", {**SHAPES, "values": "n"}, ("rank", "width"))


def test_another_kind_and_another_format_are_refused(folder):
    (folder / "basis.safetensors").rename(folder / "plan.safetensors")
    with pytest.raises(ValueError, match="has kind 'basis' and format 2, expected 'plan' and 2"):
        load_folder(folder, "plan", SHAPES)
    data = (folder / "plan.safetensors").read_bytes()
    (folder / "basis.safetensors").write_bytes(data.replace(rb"\"format\": 2", rb"\"format\": 7"))
    with pytest.raises(ValueError, match="has kind 'basis' and format 7, expected 'basis' and 2"):
        load_folder(folder, "basis", SHAPES)


def test_what_is_not_finite_or_of_another_shape_is_refused(tmp_path):
    save_folder(tmp_path, "basis", {"factors": torch.tensor([[torch.nan]])}, {})
    with pytest.raises(ValueError, match="factors must be finite"):
        load_folder(tmp_path, "basis", {"factors": "vocab rank"})
    with pytest.raises(ValueError, match=r"factors must have the dimensions \[n\], got \[1, 1\]"):
        load_folder(tmp_path, "basis", {"factors": "n"})


def test_tensors_of_another_writer_do_not_pass(folder):
    save_file(TENSORS, Path(folder, "basis.safetensors"), {"written": "by hand"})
    with pytest.raises(ValueError, match="hf_longtrunc did not write it"):
        load_folder(folder, "basis", SHAPES)


# -- several who write, and who are killed -----------------------------------------------------------------------------


def test_what_a_killed_process_began_is_removed_a_day_later(tmp_path):
    for name, age in ((".partial-1-basis.json", 90_000), (".partial-2-basis.json", 80_000), ("partial-1", 90_000)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with replacing(tmp_path / "slow.json") as slow:
        slow.write_text("{}")
        with replacing(tmp_path / "basis.json") as written:
            written.write_text("[]")
    left = {"partial-1", ".partial-2-basis.json", "slow.json", "basis.json"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_writer_that_fails_leaves_the_old_content_alone(tmp_path):
    path = tmp_path / "basis.json"
    path.write_text("old")

    def write_half():
        with replacing(path) as written:
            written.write_text("half of the n")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_half()
    assert {each: each.read_text() for each in tmp_path.iterdir()} == {path: "old"}


def test_a_pair_is_of_one_writer(tmp_path):
    """The other began when nothing was there. The last file of the `with` is named first."""
    first, second = tmp_path / "rows.bin", tmp_path / "rows.idx"

    @contextmanager
    def pair():
        with replacing(second, overwrite=False) as last, replacing(first, overwrite=False) as begin:
            yield begin, last

    meanwhile = pytest.raises(FileExistsError, match=r"rows\.bin exists: another process wrote it")
    with meanwhile, pair() as slow:
        slow[0].write_text("slow")
        with pair() as fast:
            for path, written in zip((first, second), fast, strict=True):
                written.write_text(path.name)
        slow[1].write_text("slow")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {path: path.name for path in (first, second)}
    with pytest.raises(FileExistsError, match=r"rows\.idx exists: write to another path"), pair():
        pass


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["basis.safetensors"]
