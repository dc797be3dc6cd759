"""The handle of whatever is attached: changes are taken back, in order, also after an exception."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_longtrunc.handles import Handle


def forward(x):
    return x


def attach(model, value, technique="Technique(1)"):
    handle = Handle(technique, model, "one attribute")
    handle.set(model, "marked", value)
    return handle


def test_detach_restores_what_was_there_and_removes_what_was_not():
    model = nn.Linear(2, 2)
    model.__dict__["marked"] = "before"
    handle = attach(model, "during")
    handle.set(model, "forward", forward)
    assert model.marked == "during"
    handle.detach()
    handle.detach()
    assert model.marked == "before"
    assert "forward" not in model.__dict__
    assert not handle.is_attached


def test_a_block_ends_with_an_exception_too():
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError), attach(model, 1) as handle:
        raise KeyError
    assert not handle.is_attached
    assert "marked" not in model.__dict__


def test_a_failed_attachment_leaves_nothing():
    model = nn.Linear(2, 2)
    handle = Handle("Technique(1)", model, "one attribute")

    def change():
        with handle.or_nothing():
            handle.set(model, "marked", 1)
            raise KeyError

    with pytest.raises(KeyError):
        change()
    assert "marked" not in model.__dict__


def test_what_was_attached_later_is_detached_first():
    model = nn.Linear(2, 2)
    first, second = attach(model, 1, "First()"), attach(model, 2, "Second()")
    with pytest.raises(RuntimeError, match=r"First\(\) on Linear cannot be detached yet: marked was changed again"):
        first.detach()
    assert model.marked == 2
    second.detach()
    assert model.marked == 1
    first.detach()
    assert "marked" not in model.__dict__


def test_repr_says_what_was_changed():
    handle = attach(nn.Linear(2, 2), 1)
    assert repr(handle) == "<Technique(1) on Linear: one attribute; detach() takes it back>"
    handle.detach()
    assert repr(handle) == "<Technique(1) on Linear: detached>"


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        pickle.dumps,
        lambda model: torch.save(model, "/dev/null"),
        lambda model: model._replicate_for_data_parallel(),
    ],
)
def test_copies_are_refused_while_attached(duplicate):
    model = nn.Sequential(nn.Linear(2, 2))
    handle = attach(model, 1)
    handle.refuse_copies(model, model[0], model, advice="detach first")
    with pytest.raises(TypeError, match=r"Technique\(1\) on Sequential cannot be copied or pickled.*: detach first"):
        duplicate(model)
    handle.detach()
    duplicate(model)
