"""Numbers that users pass: what is one, and what the messages say."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_longtrunc.arguments import check_choice, check_float, check_fraction, check_int


@pytest.mark.parametrize("value", [8, np.int64(8), np.uint8(8), np.array(8), torch.tensor(8), torch.tensor(8).int()])
def test_check_int_returns_a_plain_int(value):
    result = check_int("rows", value, minimum=1, maximum=8)
    assert type(result) is int
    assert result == 8


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), 8.0, np.float64(8), torch.tensor(8.0), "8", None, [8], np.array([8])]
)
def test_check_int_refuses_other_types(value):
    with pytest.raises(TypeError, match=r"rows must be a whole number from 1 to 8, got .* of type"):
        check_int("rows", value, minimum=1, maximum=8)


def test_check_int_names_its_bounds():
    with pytest.raises(ValueError, match=r"^rows must be a whole number of at least 1, got 0$"):
        check_int("rows", 0, minimum=1)
    with pytest.raises(ValueError, match=r"^rows must be a whole number of at most 3, got 4$"):
        check_int("rows", np.int64(4), maximum=3)
    assert check_int("rows", -5) == -5


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5).half(), Fraction(1, 2)]
)
def test_check_float_returns_a_plain_float(value):
    result = check_float("alpha", value, gt=0, lt=1)
    assert type(result) is float
    assert result == 0.5


@pytest.mark.parametrize("value", [True, np.False_, torch.tensor(True), "0.5", None, [0.5], np.array([0.5]), 1j])
def test_check_float_refuses_other_types(value):
    with pytest.raises(TypeError, match=r"alpha must be a number above 0 and below 1, got"):
        check_float("alpha", value, gt=0, lt=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor(torch.inf), 0, 1])
def test_check_float_excludes_its_bounds_nan_and_infinity(value):
    with pytest.raises(ValueError, match="alpha must be a number above 0 and below 1, got"):
        check_float("alpha", value, gt=0, lt=1)


def test_check_fraction_includes_its_bounds():
    assert check_fraction("overlap", 0) == 0
    assert check_fraction("overlap", np.int64(1)) == 1
    with pytest.raises(ValueError, match=r"overlap must be a number of at least 0 and of at most 1, got 1\.5"):
        check_fraction("overlap", 1.5)


def test_check_choice():
    assert check_choice("store", "cpu", ("device", "cpu")) == "cpu"
    with pytest.raises(ValueError, match="store must be one of 'device', 'cpu', got 'disk'"):
        check_choice("store", "disk", ("device", "cpu"))
