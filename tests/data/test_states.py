"""Hybrids on packed rows without kernels: every document has the logits and gradients that it has alone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import BestFitPackingCollator, check_packed, reset_states
from hf_longtrunc.data.states import _lengths, carries_state
from tests.attention.tiny_models import tiny_model
from tests.conftest import tiny_config
from tests.data.corpora import token_lists

FAMILIES = [
    "qwen3_next", "qwen3_5_text", "falcon_h1", "lfm2", "granitemoehybrid", "bamba", "jamba", "nemotron_h",
]  # fmt: skip
DOCUMENTS = token_lists((3, 17, 9, 12, 1, 20, 6))
ROWS = [(0, 1, 2), (3, 4), (5, 6)]  # 29, 13 and 26 tokens


def packed_rows(layout="rows"):
    rows = [
        {
            "input_ids": [token for index in row for token in DOCUMENTS[index]],
            "position_ids": [place for index in row for place in range(len(DOCUMENTS[index]))],
        }
        for row in ROWS
    ]
    return {**BestFitPackingCollator(32, layout=layout)(rows), "use_cache": False}


def loss_of(logits, labels):
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def alone(model):
    """Logits of every document in a row of its own, and the gradients of the sum of their losses."""
    model.zero_grad()
    logits = []
    for tokens in DOCUMENTS:
        ids = torch.tensor([tokens])
        logits.append(model(input_ids=ids, use_cache=False).logits)
        if len(tokens) > 1:
            loss_of(logits[-1], ids).backward()
    return [each[0].detach() for each in logits], gradients(model)


def in_rows(model, batch):
    """The same from packed rows."""
    model.zero_grad()
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    loss_of(logits, batch["labels"]).backward()
    flat, width = logits.detach().flatten(0, 1), 32 if len(logits) > 1 else None
    found, place = [], 0
    for number, row in enumerate(ROWS):
        place = place if width is None else number * width
        for index in row:
            found.append(flat[place : place + len(DOCUMENTS[index])])
            place += len(DOCUMENTS[index])
    return found, gradients(model)


def furthest(found, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_packed_rows_equal_every_document_alone_gradients_too(family, layout):
    model, batch = tiny_model(family), packed_rows(layout)
    logits, gradient = alone(model)
    with reset_states(model):
        check_packed(model, batch)
        found, its_gradient = in_rows(model, batch)
    assert furthest(found, logits) < 1e-5
    assert furthest([its_gradient], [gradient]) < 1e-5
    if layout == "rows":
        leaking, _ = in_rows(model, batch)
        assert furthest(leaking, logits) > 1e-3
        with pytest.raises(ValueError, match="documents packed in one row see each other"):
            check_packed(model, batch)


def test_layers_that_checkpointing_runs_again_are_refused():
    """Outside of the decoder nothing says where documents begin; never silently without resets."""
    model = tiny_model("lfm2").train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with reset_states(model), pytest.raises(RuntimeError, match="train without activation checkpointing"):
        in_rows(model, packed_rows())


def test_calls_without_documents_are_as_before_and_so_is_the_model_afterwards():
    model = tiny_model("lfm2")
    ids = torch.tensor([DOCUMENTS[1]])
    padded = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    expected = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False), model(**padded).logits
    state = copy.deepcopy(model.state_dict())
    with reset_states(model) as handle:
        assert torch.equal(model(ids).logits, expected[0])
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected[1])
        assert torch.equal(model(**padded).logits, expected[2])
        assert "begin anew where position_ids restart" in repr(handle)
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(IndexError, match="out of range"):
            model(input_ids=torch.tensor([[10**6]]))  # and nothing is left behind
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in vars(part) for part in model.modules())
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected[0])


def test_borders_are_where_positions_do_not_go_on():
    assert _lengths(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]])) == [3, 2, 1, 3, 1]
    assert _lengths(torch.tensor([[5, 6, 7], [0, 1, 2]])) is None
    assert _lengths(torch.tensor([[0, 1, 0]]).expand(3, 1, 3)) == [2, 1]


class Decay(torch.nn.Module):
    """Mamba's decay without its convolution."""

    def __init__(self):
        super().__init__()
        self.A_log = torch.nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize(
    "mixer", [Decay(), torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3))], ids=["decay", "convolution"]
)
def test_a_layer_with_a_state_is_found_without_the_names_of_layers(mixer):
    """By `reset_states`, and by the collator for its layout."""
    model = LlamaForCausalLM(tiny_config())
    assert BestFitPackingCollator(8, model=model).layout == "rows"
    model.model.layers[0].mixer = mixer
    assert carries_state(mixer)
    assert BestFitPackingCollator(8, model=model).layout == "flat"


def test_a_model_without_states_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layers with states"):
        reset_states(LlamaForCausalLM(tiny_config()))
    with pytest.raises(TypeError, match="must be a transformers model"):
        reset_states(None)
