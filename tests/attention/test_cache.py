"""The ring of LM-Infinite alone, against a list of all that it was given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from hf_longtrunc.attention.padding import PaddingState
from hf_longtrunc.attention.ring_cache import LambdaCacheLayer
from hf_longtrunc.attention.rope import Rotation

DIM, ROLLBACK = 4, 6
ROTATION = Rotation(torch.tensor([1.0, 0.1], dtype=torch.float64))


class SmallRing(LambdaCacheLayer):
    ROLLBACK = ROLLBACK


class Tape:
    """Every column's key [batch, 1, columns, dim], rotated at its own position, and value."""

    def __init__(self, padding: list[int], sinks: int, window: int):
        self.padding, self.sinks, self.window = torch.tensor(padding), sinks, window
        self.keys = torch.empty(len(padding), 1, 0, DIM, dtype=torch.float64)
        self.values = torch.empty(len(padding), 1, 0, 3, dtype=torch.float64)

    def append(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(self.keys.shape[2], self.keys.shape[2] + n) - self.padding[:, None]
        key = ROTATION.rotate(torch.randn(len(self.padding), 1, n, DIM, dtype=torch.float64), position)
        value = torch.randn(len(self.padding), 1, n, 3, dtype=torch.float64)
        self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        return key, value

    def crop(self, n: int) -> None:
        self.keys, self.values = (x[:, :, : x.shape[2] - n] for x in (self.keys, self.values))

    def window_of(self, row: int, column: int) -> range:
        return range(max(int(self.padding[row]), column - self.window + 1), column + 1)


def give(ring: LambdaCacheLayer, tape: Tape, n: int) -> None:
    """Let n tokens come, and hold what the ring hands out against the tape."""
    before = tape.keys.shape[2]
    positions = torch.arange(before, before + n) - tape.padding[:, None]
    steps = (positions[:, :1] - tape.window - torch.arange(tape.sinks)).clamp_min(0)
    turn = ROTATION.cos_sin(steps, torch.float64) if n == 1 else None
    rows = PaddingState(tape.padding, int(tape.padding.max()))
    ring.prepare_update(ring.write_plan(n, torch.device("cpu"), rows)._replace(sink_rotation=turn))
    j = torch.arange(before + n) - tape.padding[:, None]  # of the keys that are to come
    if before and n == 1:
        j = ring.key_positions(rows, torch.device("cpu")).expand(len(tape.padding), -1)
    elif before:
        sinks = torch.arange(tape.sinks).expand(len(tape.padding), -1)
        j = torch.cat([sinks, j[:, tape.sinks - ring.keys_for(n) :]], dim=-1)
    everything_is_seen = ring.all_visible(rows)
    keys, values = ring.update(*tape.append(n))
    ring.commit()
    assert keys.shape[2] == values.shape[2] == j.shape[1]
    for row in range(len(tape.padding)):
        padding, last = int(tape.padding[row]), before + n - 1
        places = j[row] if before == 0 else j[row, tape.sinks :]
        offset = 0 if before == 0 else tape.sinks
        for column in tape.window_of(row, before if n > 1 else last):
            place = offset + (places == column - padding).nonzero().item()
            assert torch.equal(keys[row, 0, place], tape.keys[row, 0, column])
            assert torch.equal(values[row, 0, place], tape.values[row, 0, column])
        if before == 0:
            continue
        far = [p for p in range(tape.sinks) if last - padding - p >= tape.window]
        for p in far:
            turned = tape.keys[row : row + 1, :, padding + p : padding + p + 1]
            if n == 1:
                turned = ROTATION.rotate(turned, torch.tensor([[last - padding - tape.window - p]]))
            assert (keys[row, 0, p] - turned[0, 0, 0]).abs().max() < 1e-12
            assert torch.equal(values[row, 0, p], tape.values[row, 0, padding + p])
        if n == 1 and everything_is_seen:
            assert len(far) == tape.sinks
            assert sorted(places.tolist()) == [column - padding for column in tape.window_of(row, last)]
            assert len(places) == tape.window


MOVES = st.lists(st.one_of(st.integers(1, 30), st.integers(-9, -1), st.just(1)), min_size=1, max_size=30)


@given(moves=MOVES, sinks=st.integers(0, 4), window=st.integers(1, 12), padding=st.lists(st.integers(0, 5), max_size=2))
def test_whatever_comes_and_goes_the_ring_hands_out_sinks_and_window(moves, sinks, window, padding):
    padding = [0, *padding]
    ring, tape, most = SmallRing(sinks, window, ROTATION), Tape(padding, sinks, window), 0
    give(ring, tape, max(padding) + 1)
    most = tape.keys.shape[2]
    for move in moves:
        length = tape.keys.shape[2]
        if move > 0:
            give(ring, tape, move)
        elif length + move > max(padding):  # what was padding stays
            if most > window + ROLLBACK and length + move < most - ROLLBACK - 1:
                with pytest.raises(ValueError, match="cannot take back"):
                    ring.crop(move)
            else:
                ring.crop(move)
                tape.crop(-move)
        most = max(most, tape.keys.shape[2])
        assert ring.get_seq_length() == tape.keys.shape[2]


def test_a_full_ring_is_seen_whole_from_the_first_token_that_does():
    """The sinks have left the window of a query at S + L - 1, and not of the one before."""
    ring, tape = SmallRing(3, 5, ROTATION), Tape([0, 2], 3, 5)
    whole = []
    for n in [4, *[1] * 8]:
        whole.append(ring.all_visible(PaddingState(tape.padding, 2)))
        give(ring, tape, n)
    assert whole == [False] * 6 + [True] * 3
