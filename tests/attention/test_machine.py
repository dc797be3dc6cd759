"""Random histories, a few for each family; `python -m tests.attention.machine 10000` runs more."""

from __future__ import annotations

import pytest

from . import machine


@pytest.mark.parametrize("family", machine.FAMILIES)
def test_any_history_is_each_row_alone(family):
    machine.run(family, examples=2, length=8, derandomize=True)


@pytest.mark.parametrize("family", machine.IN_CHUNKS)
def test_any_history_in_chunks_is_each_row_alone(family):
    machine.run(family, examples=2, length=8, derandomize=True, kind=machine.ChunkHistories)


@pytest.mark.parametrize("family", machine.STREAMING)
def test_any_streaming_history_is_each_row_alone(family):
    machine.run(family, examples=2, length=8, derandomize=True, kind=machine.StreamingHistories)
