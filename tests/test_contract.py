"""What holds for everything that can be attached to a model: a row a technique, the same checks for each.

A new technique that is attached gets its row in TABLE, and nothing else to write here.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import (
    PEMA,
    CreamCollator,
    DualChunkAttention,
    EtaLogitsProcessor,
    LMInfinite,
    PEMAAdapter,
    TopBlocks,
    TopK,
    TruncationTrace,
    Unlimiformer,
    attach_processors,
)
from hf_longtrunc.handles import Handle
from tests.conftest import tiny_config
from tests.cross_attention.seq2seq_models import random_ids, tiny_seq2seq

if TYPE_CHECKING:
    from collections.abc import Callable


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval()


def generate(model: Any, handle: Any) -> Any:
    return model.generate(random_ids(1, 40), max_new_tokens=3, do_sample=False)


def generate_with(model: Any, handle: Any) -> Any:
    return model.generate(random_ids(1, 40), max_new_tokens=3, do_sample=False, logits_processor=[handle])


def train(model: Any, handle: Any) -> Any:
    """One forward with positions of its own, as a batch of CreamCollator brings them."""
    model.train()
    output = model(input_ids=random_ids(1, 6), rope_position_ids=torch.tensor([[0, 1, 5, 90, 91, 200]]))
    model.eval()
    return output


class Row(NamedTuple):
    """A technique.

    Attributes:
        attach: puts a new one of it on a model and returns the handle.
        use: something that a user does with the model meanwhile.
        make: a model for it.
        second: what a second attach says; None if it nests.
        compiled: what a compiled model is answered; None if it is served.
        is_copied: whether a copy of the model is one without it; else copying is refused.
        names: what the handle's repr begins with.
    """

    attach: Callable[[Any], Any]
    use: Callable[[Any, Any], Any] = generate
    make: Callable[[], Any] = llama
    second: str | None = None
    compiled: str | None = "compiled model"
    is_copied: bool = False
    names: str = ""


def cream(model: Any) -> Any:
    return CreamCollator(lambda examples: {"input_ids": torch.stack(examples)}, window=64, factor=4).attach(model)


def pema(model: Any) -> Any:
    return PEMA(PEMAAdapter(32, 4, 97).eval())(model)


def lm_infinite(retrieval: Any) -> Callable[[Any], Any]:
    return lambda model: LMInfinite(num_sink_tokens=2, window_length=8, retrieval=retrieval)(model)


TABLE = {
    "LMInfinite": Row(lm_infinite(None), second="already", names="LMInfinite"),
    "LMInfinite, TopK": Row(lm_infinite(TopK(k=3, first_layer=0)), second="already", names="LMInfinite"),
    "LMInfinite, TopBlocks": Row(
        lm_infinite(TopBlocks(blocks=2, block_size=4, first_layer=0)), second="already", names="LMInfinite"
    ),
    "DualChunkAttention": Row(
        lambda model: DualChunkAttention(chunk_length=6, trained_length=8)(model),
        second="already",
        names="DualChunkAttention",
    ),
    "Unlimiformer": Row(
        lambda model: Unlimiformer(top_k=4, window=16)(model), make=tiny_seq2seq, second="already", names="Unlimiformer"
    ),
    "CreamCollator": Row(cream, use=train, second="already", is_copied=True, names="CreamCollator"),
    "PEMA": Row(pema, use=generate_with, names="PEMA"),
    "attach_processors": Row(
        lambda model: attach_processors(model, [EtaLogitsProcessor(0.01)]), compiled=None, names="attach_processors"
    ),
    "attach_processors, after warpers": Row(
        lambda model: attach_processors(model, [EtaLogitsProcessor(0.01)], after_warpers=True),
        compiled=None,
        names="attach_processors",
    ),
    "TruncationTrace.observe": Row(
        lambda model: TruncationTrace().observe(model), compiled=None, names="TruncationTrace"
    ),
}


def each() -> list[Any]:
    return [pytest.param(row, id=name) for name, row in TABLE.items()]


every_technique = pytest.mark.parametrize("row", each())


def hooks(module: Any) -> list[int]:
    return [len(value) for name, value in sorted(vars(module).items()) if name.endswith("_hooks")]


def everything(model: Any) -> dict[str, Any]:
    """Return what a technique could leave behind: attributes and hooks of every module, modes, configs, weights."""
    return {
        "modules": {
            name: (sorted(module.__dict__), hooks(module), module.training, type(module))
            for name, module in model.named_modules()
        },
        "attributes": {
            (name, attribute): value
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if callable(value) or isinstance(value, (int, float, str))
        },
        "configs": [part.config.to_dict() for part in model.modules() if hasattr(part, "config")],
        "implementations": [
            part.config._attn_implementation
            for part in model.modules()
            if hasattr(getattr(part, "config", None), "to_dict")
        ],
        "generation_config": model.generation_config.to_dict(),
        "weights": {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()},
    }


def assert_as_before(model: Any, before: dict[str, Any]) -> None:
    after = everything(model)
    for part in ("modules", "attributes", "configs", "implementations", "generation_config"):
        assert after[part] == before[part], part
    assert after["weights"].keys() == before["weights"].keys()
    for name, (tensor, _) in after["weights"].items():
        assert tensor.data_ptr() == before["weights"][name][0].data_ptr(), name
        assert torch.equal(tensor, before["weights"][name][1]), name


@every_technique
def test_detaching_leaves_the_model_as_it_was(row):
    model = row.make()
    generate(model, None)  # what transformers itself keeps after a first generation
    before = everything(model)
    handle = row.attach(model)
    assert isinstance(handle, Handle)
    assert handle.is_attached
    row.use(model, handle)
    handle.detach()
    handle.detach()
    assert not handle.is_attached
    assert_as_before(model, before)
    with row.attach(model) as handle:
        row.use(model, handle)
    assert_as_before(model, before)


@every_technique
def test_detaching_after_an_exception_in_mid_forward_leaves_the_model_as_it_was(row):
    model = row.make()
    generate(model, None)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = everything(model)

    def use_interrupted() -> None:
        with row.attach(model) as handle:
            hook = list(model.modules())[-2].register_forward_hook(interrupt)
            try:
                row.use(model, handle)
            finally:
                hook.remove()

    with pytest.raises(KeyboardInterrupt):
        use_interrupted()
    model.eval()
    assert_as_before(model, before)
    with row.attach(model) as handle:
        row.use(model, handle)


@every_technique
def test_what_is_no_model_is_refused_in_words(row):
    with pytest.raises(TypeError, match=r"model must be a transformers model.*got Linear"):
        row.attach(torch.nn.Linear(2, 2))


@every_technique
def test_repr_says_what_was_changed_and_how_to_take_it_back(row):
    model = row.make()
    handle = row.attach(model)
    assert re.search(rf"^<{row.names}.* on {type(model).__name__}: .+; detach\(\) takes it back>$", repr(handle), re.S)
    handle.detach()
    assert re.search(rf"^<{row.names}.* on {type(model).__name__}: detached>$", repr(handle), re.S)


@every_technique
def test_a_second_one_nests_or_is_refused_in_words(row):
    model = row.make()
    before = everything(model)
    first = row.attach(model)
    if row.second is not None:
        with pytest.raises(ValueError, match=row.second):
            row.attach(model)
        row.use(model, first)
    else:
        second = row.attach(model)
        with pytest.raises(RuntimeError, match=r"cannot be detached yet.*detach that first"):
            first.detach()
        second.detach()
        row.use(model, first)
    first.detach()
    assert_as_before(model, before)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_technique
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_is_the_plain_model_or_refused_in_words(row, duplicate):
    model = row.make()
    before = generate(model, None)
    with row.attach(model) as handle:
        row.use(model, handle)
        if row.is_copied:
            copied = duplicate(model)
            assert torch.equal(generate(copied, None), before)
            row.attach(copied).detach()
        else:
            with pytest.raises(TypeError, match=r"cannot be copied or pickled.*detach first"):
                duplicate(model)
    assert torch.equal(generate(duplicate(model), None), before)


@every_technique
def test_weights_can_be_saved_while_it_is_attached(row, tmp_path):
    model = row.make()
    row.make().save_pretrained(tmp_path / "plain")
    with row.attach(model):
        model.save_pretrained(tmp_path / "attached")
        assert model.state_dict().keys() == row.make().state_dict().keys()
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@every_technique
def test_what_is_written_to_the_config_meanwhile_stays(row):
    model = row.make()
    with row.attach(model):
        model.config.pad_token_id = 5
        model.config.a_field_of_the_users = 7
        model.resize_token_embeddings(101)
    assert (model.config.pad_token_id, model.config.a_field_of_the_users, model.config.vocab_size) == (5, 7, 101)
    model.config.a_field_of_the_users += 1
    assert model.config.a_field_of_the_users == 8


@every_technique
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_inside_peft_and_data_parallel_wrappers(row):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(row.make(), peft.LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    wrapped = Replicated(model)
    inside = model.get_base_model()
    generate(inside, None)
    before = everything(inside)
    for outside in (model, wrapped):
        with row.attach(outside) as handle:
            assert type(inside).__name__ in repr(handle)
            changed = everything(inside)
            assert changed["modules"] != before["modules"]
            row.use(inside, handle)
        assert_as_before(inside, before)


class Replicated(torch.nn.Module):
    """Stands for DistributedDataParallel, which needs a process group: it calls `module`."""

    def __init__(self, module: Any):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@every_technique
@pytest.mark.parametrize("is_in_place", [False, True])
def test_compiled_models_are_served_or_refused_with_the_way_out(row, is_in_place):
    model = row.make()
    if is_in_place:
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    before = everything(model)
    if row.compiled is None:
        row.attach(compiled).detach()
    else:
        with pytest.raises(ValueError, match=rf"{row.compiled}.*compile (that|it) afterwards"):
            row.attach(compiled)
    assert_as_before(model, before)


@every_technique
def test_a_model_that_was_never_detached_is_freed_with_its_last_reference(row):
    model = row.make()
    handle = row.attach(model)
    row.use(model, handle)
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None
