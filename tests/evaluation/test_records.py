from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from hf_longtrunc.evaluation.records import append_records, arm_settings, model_settings, read_records


@dataclass(frozen=True)
class Measured:
    name: str
    value: float


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    assert read_records(path, Measured) == []
    append_records(path, [Measured("naïve\n", 0.1), Measured("b", float("inf"))])
    append_records(path, [Measured("c", 1e-300)])
    expected = [Measured("naïve\n", 0.1), Measured("b", float("inf")), Measured("c", 1e-300)]
    assert read_records(path, Measured) == expected
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("line", ['{"name": "a", "val', '{"name": "a"}', "[1]", '{"name": "a", "value": 1, "x": 2}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    append_records(path, [Measured("a", 1.0)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: expected .* name, value"):
        read_records(path, Measured)


def test_an_arm_is_described_the_same_in_every_process():
    def my_arm(model):
        return nullcontext()

    assert arm_settings(nullcontext) == "nullcontext"
    assert arm_settings(my_arm).endswith("my_arm")
    assert arm_settings(partial(nullcontext)) == repr(partial(nullcontext))


def test_a_model_is_described_by_name_dtype_and_device(tiny_model):
    assert model_settings(tiny_model) == {"model": "LlamaForCausalLM", "dtype": "float32", "device": "cpu"}
    tiny_model.config.name_or_path = "someone/something"
    assert model_settings(tiny_model.to(torch.bfloat16))["model"] == "someone/something"
    assert model_settings(tiny_model)["dtype"] == "bfloat16"
