"""A packed row is its documents alone: logits, loss, gradients; and what the collator refuses."""

from __future__ import annotations

import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_longtrunc import BestFitPackingCollator, check_packed
from hf_longtrunc.data.documents import IGNORE
from tests.conftest import tiny_config
from tests.data.corpora import raw_examples, segments

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
LENGTHS = [20, 12, 9, 7, 25, 5, 3, 14]


@pytest.fixture
def batch():
    return BestFitPackingCollator(32)(raw_examples(LENGTHS))


def mistral() -> MistralForCausalLM:
    config = MistralConfig(**tiny_config().to_dict() | {"sliding_window": 6, "head_dim": 8})
    return MistralForCausalLM(config).eval()


def difference_from_alone(model, batch, **arguments) -> float:
    """Largest difference between a packed document's logits and those of it run alone, relative to the largest one."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        packed = model(**inputs, **arguments).logits
        worst = 0.0
        for row, logits in enumerate(packed):
            bounds = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), logits.shape[0]]
            for start, end in pairwise(bounds):
                alone = model(input_ids=batch["input_ids"][row : row + 1, start:end], use_cache=False).logits[0]
                worst = max(worst, (logits[start:end] - alone).abs().max().item())
    return worst / packed.abs().max().item()


def test_rows_restart_positions_and_never_have_a_mask(batch):
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert batch["input_ids"].shape == (3, 32)
    assert batch["position_ids"][0].tolist() == [*range(25), *range(7)]
    assert sorted(len(segment) for row in range(3) for segment in segments({n: t[row] for n, t in batch.items()})) == (
        sorted(LENGTHS)
    )


def test_the_first_token_of_a_piece_and_the_padding_are_not_learned(batch):
    first = batch["position_ids"] == 0
    assert (batch["labels"][first] == IGNORE).all()
    assert (batch["labels"] != IGNORE).sum() == sum(LENGTHS) - len(LENGTHS)
    learned = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_logits_are_those_of_every_document_alone(batch, attention):
    model = LlamaForCausalLM._from_config(tiny_config(), attn_implementation=attention).eval()
    assert difference_from_alone(model, batch, use_cache=False) < 1e-6
    if attention == "sdpa":  # eager attention takes its softmax in fp32
        assert difference_from_alone(model.double(), batch, use_cache=False) < 1e-14
    check_packed(model, batch | {"use_cache": False})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_window_stays_one(batch, attention):
    model = mistral()
    model.set_attn_implementation(attention)
    assert difference_from_alone(model, batch, use_cache=False) < 1e-6
    if attention == "sdpa":  # eager attention takes its softmax in fp32
        assert difference_from_alone(model.double(), batch, use_cache=False) < 1e-14
    check_packed(model, batch | {"use_cache": False})


def test_learned_positions_restart(tiny_gpt2, batch):
    assert difference_from_alone(tiny_gpt2, batch, use_cache=False) < 1e-6
    check_packed(tiny_gpt2, batch | {"use_cache": False})


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from inside its compiler
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_flex_attention(batch, device, monkeypatch):
    # torch's compiler switches off the checks of distributions for good, which other tests rely on.
    monkeypatch.setattr(
        torch.distributions.Distribution, "_validate_args", torch.distributions.Distribution._validate_args
    )
    config = tiny_config(hidden_size=64)
    model = LlamaForCausalLM._from_config(config, attn_implementation="flex_attention").eval().to(device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    # Compiled for a CPU it says the same, after a minute in the compiler.
    with torch.compiler.set_stance("force_eager" if device == "cpu" else "default"):
        check_packed(model, batch | {"use_cache": False})
        assert difference_from_alone(model, batch, use_cache=False) < 1e-5


@NEEDS_CUDA
def test_flash_attention_on_cuda_wants_the_flat_layout():
    pytest.importorskip("flash_attn")
    config = tiny_config(hidden_size=128, num_attention_heads=4)
    model = LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    model = model.eval().cuda()
    rows, flat = (BestFitPackingCollator(32, layout=layout)(raw_examples(LENGTHS)) for layout in ("rows", "flat"))
    flat = {name: value.cuda() if torch.is_tensor(value) else value for name, value in flat.items()}
    check_packed(model, flat | {"use_cache": False})
    rows = {name: value.cuda() for name, value in rows.items()}
    with pytest.raises(ValueError, match=r"see each other.*layout='flat'"):
        check_packed(model, rows | {"use_cache": False})


def test_a_two_dimensional_mask_leaks_and_the_guard_says_so(tiny_model, batch):
    leaky = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    assert difference_from_alone(tiny_model, leaky, use_cache=False) > 0.01
    with pytest.raises(ValueError, match=r"see each other.*attention_mask.*leave it out"):
        check_packed(tiny_model, leaky | {"use_cache": False})


def test_a_cache_leaks_and_the_guard_says_so(tiny_model, batch):
    assert difference_from_alone(tiny_model, batch, use_cache=True) > 0.01
    with pytest.raises(ValueError, match=r"see each other.*pass use_cache=False"):
        check_packed(tiny_model, batch)


def test_a_ready_made_block_mask_loses_the_sliding_window_and_the_guard_refuses_it(batch):
    segment = (batch["position_ids"] == 0).cumsum(-1)
    block = (segment[:, None, :, None] == segment[:, None, None, :]) & torch.ones(32, 32, dtype=torch.bool).tril()
    leaky = batch | {"attention_mask": torch.where(block, 0.0, torch.finfo(torch.float32).min)}
    assert difference_from_alone(mistral(), leaky, use_cache=False) > 0.01
    with pytest.raises(ValueError, match=r"4 dimensions.*sliding window is lost"):
        check_packed(mistral(), leaky)


def test_the_guard_leaves_the_model_as_it_was(tiny_model, batch):
    tiny_model.train()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    check_packed(tiny_model, batch | {"use_cache": False})
    with pytest.raises(ValueError, match="see each other"):
        check_packed(tiny_model, batch)
    assert tiny_model.training
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_the_guard_refuses_what_knows_no_positions(tiny_model, batch):
    class Positionless(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(ValueError, match="Positionless takes no position_ids"):
        check_packed(Positionless(), batch)
    with pytest.raises(ValueError, match="batch has no position_ids"):
        check_packed(tiny_model, {"input_ids": batch["input_ids"]})


def test_the_guard_finds_recurrent_layers(batch):
    from transformers import MambaConfig, MambaForCausalLM

    class WithPositions(MambaForCausalLM):
        """Takes the positions and makes nothing of them, as hybrids with linear attention do."""

        def forward(self, input_ids, position_ids=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    model = WithPositions(MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()
    with pytest.raises(ValueError, match=r"see each other.*Mamba layers carry their states.*causal-conv1d.*mamba-ssm"):
        check_packed(model, batch | {"use_cache": False})


HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "qwen3_5_text": {
        "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
}  # fmt: skip


def hybrid(family, **changes):
    settings = {name: getattr(tiny_config(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**settings, **HYBRIDS[family], **changes})).eval()


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_states_want_the_flat_layout_and_their_kernels(family, dtype, batch):
    """At initial weights LFM2's convolutions move the second document by less than a thousandth."""
    model = hybrid(family).to(dtype)
    with pytest.raises(ValueError, match=r"see each other.*carry their states.*layout='flat'.*causal-conv1d"):
        check_packed(model, batch | {"use_cache": False})
    collator = BestFitPackingCollator(32, model=model)
    assert collator.layout == "flat"
    with pytest.raises(ValueError, match=r"causal.conv1d"):  # transformers' words since 5.24, ours before
        check_packed(model, collator(raw_examples(LENGTHS)) | {"use_cache": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousandth_of_a_leak_is_found_and_rounding_is_none(tiny_model, batch, dtype):
    model = tiny_model.to(dtype)
    check_packed(model, batch | {"use_cache": False})

    def leak(module, args, kwargs, output):
        output.logits += 3e-3 * output.logits.cumsum(1)

    model.register_forward_hook(leak, with_kwargs=True)
    with pytest.raises(ValueError, match="see each other"):
        check_packed(model, batch | {"use_cache": False})


def test_what_moves_in_a_row_of_its_own_too_is_rounding(tiny_model, batch):
    def scale(module, args, kwargs, output):
        """Depend on all of the batch a little, as 8-bit activations do whose scale is taken over all of it."""
        output.logits *= 1 + 1e-3 * kwargs["input_ids"].float().mean() / 97

    tiny_model.register_forward_hook(scale, with_kwargs=True)
    check_packed(tiny_model, batch | {"use_cache": False})


@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_guard_takes_batches_of_any_size(tiny_model, size):
    check_packed(tiny_model, BestFitPackingCollator(size * 2)(raw_examples([size * 2])) | {"use_cache": False})


def test_flat_layout_says_where_every_document_ends():
    rows, flat = (BestFitPackingCollator(32, layout=layout)(raw_examples(LENGTHS)) for layout in ("rows", "flat"))
    assert flat["input_ids"].shape == (1, sum(LENGTHS))
    bounds = flat["cu_seq_lens_q"].tolist()
    assert torch.equal(flat["cu_seq_lens_q"], flat["cu_seq_lens_k"])
    assert flat["cu_seq_lens_q"].dtype == flat["seq_idx"].dtype == torch.int32
    assert sorted(np.diff(bounds)) == sorted(LENGTHS)
    assert flat["max_length_q"] == flat["max_length_k"] == 25
    assert flat["seq_idx"][0].tolist() == [i for i, n in enumerate(np.diff(bounds)) for _ in range(n)]
    learned = rows["labels"] != IGNORE
    assert sorted(flat["labels"][flat["labels"] != IGNORE].tolist()) == sorted(rows["labels"][learned].tolist())


def test_flat_logits_are_those_of_every_document_alone(tiny_model):
    flat = BestFitPackingCollator(32, layout="flat")(raw_examples(LENGTHS))
    assert difference_from_alone(tiny_model, flat, use_cache=False) < 1e-6
    check_packed(tiny_model, flat | {"use_cache": False})


def test_auto_asks_the_models_attention(tiny_model):
    assert BestFitPackingCollator(32, model=tiny_model).layout == "rows"
    tiny_model.config._attn_implementation = "flash_attention_2"
    assert BestFitPackingCollator(32, model=tiny_model).layout == "flat"
    assert BestFitPackingCollator(32, model=tiny_model, layout="rows").layout == "rows"


def test_loss_is_the_token_weighted_loss_of_single_documents(tiny_model, batch):
    model = tiny_model.double()
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        alone = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in _documents()]
    weights = torch.tensor([n - 1.0 for n in LENGTHS], dtype=torch.float64)
    assert packed.item() == pytest.approx(
        (torch.stack(alone).double() @ weights / weights.sum()).item(), rel=1e-6
    )  # transformers takes losses in fp32


def test_gradients_are_those_of_the_padded_batch(tiny_model, batch):
    model = tiny_model.double()
    model(**batch, use_cache=False).loss.backward()
    packed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(_documents()):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORE)).loss.backward()
    for parameter, gradient in zip(model.parameters(), packed, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-14


def _documents() -> list[list[int]]:
    return [example["input_ids"] for example in raw_examples(LENGTHS)]


@pytest.mark.real_model
def test_a_real_model_keeps_documents_apart(real_model):
    model, tokenizer = real_model
    texts = ["The harbour was quiet.", "Numbers are not opinions, and opinions are not numbers.", "Rain again"]
    collator = BestFitPackingCollator(24, tokenizer, model=model)
    with pytest.warns(UserWarning, match="packing within this batch"):
        batch = collator([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    check_packed(model, batch | {"use_cache": False})
    assert difference_from_alone(model, batch, use_cache=False) < 1e-5


def test_labels_and_masks_decide_what_is_learned():
    example = {
        "input_ids": [0, 5, 6, 7, 8, 9, 0],
        "attention_mask": [0, 1, 1, 1, 1, 1, 0],
        "labels": [1, 15, 16, 17, -100, 19, 1],
        "assistant_masks": [0, 1, 1, 0, 1, 1, 1],
        "note": "not a column of the model",
    }
    with pytest.warns(UserWarning, match="fills 62%"):
        row = BestFitPackingCollator(8, pad_token_id=2)([example])
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2, 2, 2]]
    assert row["labels"].tolist() == [[-100, 16, -100, -100, 19, -100, -100, -100]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]


def test_a_document_longer_than_a_row_is_cut_and_nothing_is_lost():
    batch = BestFitPackingCollator(8)([{"input_ids": list(range(10, 33))}, {"input_ids": [1]}])
    assert batch["input_ids"].tolist() == [[*range(10, 18)], [*range(18, 26)], [*range(26, 33), 1]]
    assert batch["labels"][:, 0].tolist() == [IGNORE] * 3


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda ids: np.array(ids, np.int32)])
def test_ids_of_any_integer_kind(kind):
    batch = BestFitPackingCollator(4)([{"input_ids": kind([1, 2, 3, 4])}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["input_ids"].dtype == torch.int64


def test_padding_token_comes_from_the_tokenizer():
    class Tokens:
        pad_token_id = None
        eos_token_id = 7

    assert BestFitPackingCollator(8, Tokens()).pad_token_id == 7
    assert BestFitPackingCollator(8, Tokens(), pad_token_id=3).pad_token_id == 3
    assert BestFitPackingCollator(8).pad_token_id == 0


def test_poor_fill_is_said_once_and_names_pack():
    collate = BestFitPackingCollator(64)
    with pytest.warns(UserWarning, match=r"fills 62% of its rows.*hf_longtrunc\.pack"):
        collate(raw_examples([40]))
    collate(raw_examples([40]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BestFitPackingCollator(64, layout="flat")(raw_examples([40]))


def test_a_row_beyond_the_models_window_is_warned_of(tiny_model):
    with pytest.warns(UserWarning, match="seq_length = 512 is more than the model's maximum of 256"):
        BestFitPackingCollator(512, model=tiny_model)


def test_it_pickles_without_the_model(tiny_model):
    assert len(pickle.dumps(BestFitPackingCollator(32, model=tiny_model))) < 500


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (
            {"input_ids": [1.0, 2.0]},
            TypeError,
            "example 0 of the batch: column 'input_ids' must hold integers, got float64",
        ),
        ({"input_ids": [[1, 2], [3, 4]]}, ValueError, r"must be one flat sequence, got shape \(2, 2\)"),
        ({"input_ids": [[1, 2], [3]]}, ValueError, "'input_ids' is ragged"),
        ({"input_ids": "abc"}, ValueError, r"must be one flat sequence, got shape \(\)"),
        ({"input_ids": ["a", "b"]}, TypeError, "must hold integers, got <U1"),
        ({"input_ids": [1, None]}, TypeError, "must hold integers, got object"),
        ({"input_ids": [1, -2]}, ValueError, "holds -2; a token id is never negative"),
        ({"input_ids": [1, 2], "labels": [1]}, ValueError, "column 'labels' has 1 entries, 'input_ids' has 2"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, ValueError, "zeros between ones"),
        ({"text": "abc"}, ValueError, r"has no column 'input_ids', only \['text'\]; tokenize"),
    ],
)
def test_bad_examples(example, error, message):
    with pytest.raises(error, match=message):
        BestFitPackingCollator(8)([example])


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize(
    "example", [{"input_ids": []}, {"input_ids": None}, {"input_ids": [1, 2], "attention_mask": [0, 0]}]
)
def test_an_empty_document_alone_is_padding_that_teaches_nothing(tiny_model, example, layout):
    batch = BestFitPackingCollator(8, layout=layout)([example])
    assert batch["input_ids"].shape == ((1, 8) if layout == "rows" else (1, 1))
    assert (batch["labels"] == IGNORE).all()
    tiny_model(**batch, use_cache=False).loss.backward()
    assert all((parameter.grad == 0).all() for parameter in tiny_model.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks a model for
def test_the_guard_looks_through_wrappers(tiny_model, batch):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = torch.compile(torch.nn.DataParallel(adapted), backend="eager")
    with torch.compiler.set_stance("force_eager"):  # the wrapper counts here, and not its compiler
        check_packed(model, batch | {"use_cache": False})
        with pytest.raises(ValueError, match=r"in this LlamaForCausalLM.*use_cache=False"):
            check_packed(model, batch)


def test_rows_with_trls_seq_lengths_alone_are_packed_rows():
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}
    assert BestFitPackingCollator(6)([row])["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]


def test_bad_batches_and_parameters():
    packed = {"input_ids": [1, 2], "position_ids": [0, 1], "labels": [1, 2]}
    with pytest.raises(ValueError, match=r"packed rows .* and raw documents"):
        BestFitPackingCollator(8)([packed, {"input_ids": [1]}])
    with pytest.raises(ValueError, match="a packed row has 2 tokens, more than the collator's seq_length = 1"):
        BestFitPackingCollator(1)([packed])
    with pytest.raises(ValueError, match="no documents"):
        BestFitPackingCollator(8)([])
    with pytest.raises(ValueError, match="layout must be"):
        BestFitPackingCollator(8, layout="dense")
    for bad in (0, -3, 2.0, True, "2048"):
        with pytest.raises((TypeError, ValueError), match="seq_length must be"):
            BestFitPackingCollator(bad)


@pytest.mark.filterwarnings("ignore:packing within this batch")
def test_rows_in_which_llama_4_scales_by_the_place_in_the_row_are_refused():
    """Its layers without rotation scale from token floor_scale - 1 of a row on, whatever the positions say."""
    config = Llama4TextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, floor_scale=16, attn_scale=2.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    rows = raw_examples([10, 12, 14], vocabulary=90)
    with pytest.raises(ValueError, match=r"Rows may have 15 tokens, got seq_length = 40; take shorter rows, or set"):
        BestFitPackingCollator(40, model=model)
    with pytest.raises(ValueError, match="got a flat batch of 36"):
        BestFitPackingCollator(15, model=model, layout="flat")(rows)

    @torch.no_grad()
    def differs(seq_length):
        batch = BestFitPackingCollator(seq_length)(rows)
        logits = model(**batch, use_cache=False).logits
        worst = 0.0
        for document in rows:
            ids = torch.tensor([document["input_ids"]])
            row, start = next(
                (row, place)
                for row in range(len(batch["input_ids"]))
                for place in range(seq_length - ids.shape[1] + 1)
                if torch.equal(batch["input_ids"][row, place : place + ids.shape[1]], ids[0])
            )
            alone = model(input_ids=ids, use_cache=False).logits[0]
            worst = max(worst, float((logits[row, start : start + ids.shape[1]] - alone).abs().max()))
        return worst

    assert differs(15) < 1e-5 < 1e-3 < differs(40)
    config.attn_temperature_tuning = False
    BestFitPackingCollator(40, model=model)
