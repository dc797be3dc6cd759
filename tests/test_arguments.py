"""Numbers that users pass: what is one, and what the messages say."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_longtrunc.arguments import number, one_of, share, whole


@pytest.mark.parametrize("value", [8, np.int64(8), np.uint8(8), np.array(8), torch.tensor(8), torch.tensor(8).int()])
def test_whole_returns_a_plain_int(value):
    result = whole("rows", value, least=1, most=8)
    assert type(result) is int
    assert result == 8


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), 8.0, np.float64(8), torch.tensor(8.0), "8", None, [8], np.array([8])]
)
def test_whole_refuses_what_is_no_whole_number(value):
    with pytest.raises(TypeError, match=r"rows must be a whole number from 1 to 8, got .* of type"):
        whole("rows", value, least=1, most=8)


def test_whole_names_its_bounds():
    with pytest.raises(ValueError, match=r"^rows must be a whole number of at least 1, got 0$"):
        whole("rows", 0, least=1)
    with pytest.raises(ValueError, match=r"^rows must be a whole number of at most 3, got 4$"):
        whole("rows", np.int64(4), most=3)
    assert whole("rows", -5) == -5


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5).half(), Fraction(1, 2)]
)
def test_number_returns_a_plain_float(value):
    result = number("alpha", value, above=0, below=1)
    assert type(result) is float
    assert result == 0.5


@pytest.mark.parametrize("value", [True, np.False_, torch.tensor(True), "0.5", None, [0.5], np.array([0.5]), 1j])
def test_number_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"alpha must be a number above 0 and below 1, got"):
        number("alpha", value, above=0, below=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor(torch.inf), 0, 1])
def test_number_excludes_its_bounds_and_what_is_not_finite(value):
    with pytest.raises(ValueError, match="alpha must be a number above 0 and below 1, got"):
        number("alpha", value, above=0, below=1)


def test_share_includes_its_bounds():
    assert share("overlap", 0) == 0
    assert share("overlap", np.int64(1)) == 1
    with pytest.raises(ValueError, match=r"overlap must be a number of at least 0 and of at most 1, got 1\.5"):
        share("overlap", 1.5)


def test_one_of():
    assert one_of("store", "cpu", ("device", "cpu")) == "cpu"
    with pytest.raises(ValueError, match="store must be one of 'device', 'cpu', got 'disk'"):
        one_of("store", "disk", ("device", "cpu"))
