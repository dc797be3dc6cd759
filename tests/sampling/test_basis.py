"""SoftmaxBasis: its columns against a dense decomposition, every kind of head, the file, and bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_longtrunc import SoftmaxBasis
from hf_longtrunc.saving import save_folder


def span_angle(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest sine between the two column spaces."""
    a, b = torch.linalg.qr(left.double()).Q, torch.linalg.qr(right.double()).Q
    return float(torch.linalg.matrix_norm(a - b @ (b.T @ a), 2))


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(700, 40) * torch.logspace(0, -1.5, 40) + torch.randn(40)


def test_columns_span_the_leading_directions(weight, monkeypatch):
    monkeypatch.setattr("hf_longtrunc.sampling.basis._CHUNK", 300)
    basis = SoftmaxBasis.from_weight(weight, 8)
    u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    assert span_angle(basis.factors, u[:, :8]) < 1e-6
    torch.testing.assert_close(basis.singular_values, s[:8], rtol=1e-8, atol=0)
    torch.testing.assert_close(basis.factors.square().mean(0), torch.ones(8).double())


def test_every_column_lies_in_the_column_space_even_where_the_directions_are_poor(monkeypatch):
    """The proofs need this alone: other directions than the leading ones are as true."""
    eigh = torch.linalg.eigh
    noise = 1e-3 * torch.randn(128, 128).double()
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (eigh(gram)[0], eigh(gram)[1] + noise))
    weight = torch.randn(5000, 128)
    basis = SoftmaxBasis.from_weight(weight, 10)
    u = torch.linalg.svd(weight.double(), full_matrices=False).U
    residual = basis.factors - u @ (u.T @ basis.factors)
    assert residual.abs().max() < 1e-10


def test_truncated_is_the_basis_of_lower_rank(weight):
    basis = SoftmaxBasis.from_weight(weight, 10)
    lower = SoftmaxBasis.from_weight(weight, 4)
    assert span_angle(basis.truncated(4).factors, lower.factors) < 1e-7
    for rank in (0, 11):
        with pytest.raises(ValueError, match="rank must be a whole number from 1 to 10"):
            basis.truncated(rank)


def test_from_model_reads_tied_heads_gpt2_and_adapters(tiny_model, tiny_gpt2):
    for model in (tiny_model, tiny_gpt2):
        weight = model.get_output_embeddings().weight
        assert torch.equal(
            SoftmaxBasis.from_model(model, 5).factors, SoftmaxBasis.from_weight(weight.detach(), 5).factors
        )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapted_head_is_read_as_it_acts(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    before = tiny_model.get_output_embeddings().weight.detach().clone()
    adapted = peft.get_peft_model(tiny_model, config)
    head = adapted.get_output_embeddings()
    full = before + head.get_delta_weight("default").detach()
    basis = SoftmaxBasis.from_model(adapted, 5)
    assert span_angle(basis.factors, SoftmaxBasis.from_weight(full, 5).factors) < 1e-5
    assert span_angle(basis.factors, SoftmaxBasis.from_weight(before, 5).factors) > 1e-3


def test_a_bias_is_left_out(tiny_model):
    plain = SoftmaxBasis.from_model(tiny_model, 5)
    head = nn.Linear(32, 97, bias=True)
    head.weight = tiny_model.lm_head.weight
    tiny_model.lm_head = head
    assert torch.equal(SoftmaxBasis.from_model(tiny_model, 5).factors, plain.factors)


@pytest.mark.parametrize("names", [("save_pretrained", "from_pretrained"), ("save", "load")])
def test_saved_and_loaded(weight, tmp_path, names):
    basis = SoftmaxBasis.from_weight(weight, 6, softcap=30.0)
    getattr(basis, names[0])(tmp_path)
    loaded = getattr(SoftmaxBasis, names[1])(tmp_path)
    assert torch.equal(loaded.factors, basis.factors)
    assert torch.equal(loaded.singular_values, basis.singular_values)
    assert (loaded.weight_hash, loaded.softcap) == (basis.weight_hash, 30.0)


def test_a_basis_saved_with_a_mean_row_subtracted_is_read(weight, tmp_path):
    """Earlier versions could; its columns lie in the span of the weight's and the constant, so its proofs hold."""
    basis = SoftmaxBasis.from_weight(weight - weight.mean(0), 6)
    tensors = {"factors": basis.factors, "singular_values": basis.singular_values}
    save_folder(tmp_path, "softmax_basis", tensors, {"weight_hash": "x", "centered": True, "softcap": None})
    assert torch.equal(SoftmaxBasis.from_pretrained(tmp_path).factors, basis.factors)


def test_a_folder_without_a_basis(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved softmax_basis"):
        SoftmaxBasis.from_pretrained(tmp_path)


def test_a_flipped_bit_is_noticed(weight, tmp_path):
    SoftmaxBasis.from_weight(weight, 2).save_pretrained(tmp_path)
    path = tmp_path / "softmax_basis.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        SoftmaxBasis.from_pretrained(tmp_path)


GOOD = {"factors": torch.ones(5, 2).double(), "singular_values": torch.ones(2).double()}
SETTINGS = {"weight_hash": "x", "softcap": None}
WRONG_FILES = {
    "fp32 factors": (GOOD | {"factors": torch.ones(5, 2)}, SETTINGS, TypeError, "must be float64"),
    "NaN factors": (GOOD | {"factors": GOOD["factors"] * torch.nan}, SETTINGS, ValueError, "must be finite"),
    "no factors": ({"singular_values": torch.ones(2).double()}, SETTINGS, ValueError, "without factors"),
    "no hash": (GOOD, {"softcap": None}, ValueError, "without weight_hash"),
    "flat factors": (GOOD | {"factors": torch.ones(5).double()}, SETTINGS, ValueError, r"dimensions \[vocab rank\]"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_basis_that_is_none_is_named(tmp_path, case):
    tensors, settings, error, message = WRONG_FILES[case]
    save_folder(tmp_path, "softmax_basis", tensors, settings)
    with pytest.raises(error, match=message):
        SoftmaxBasis.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_an_adapted_head_with_dropout_is_refused_in_training_mode(tiny_model):
    """Each row of it would be another one at the next reading."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model, config).eval()
    head = model.get_output_embeddings()
    merged = head.weight + head.get_delta_weight("default")
    torch.testing.assert_close(
        SoftmaxBasis.from_model(model, 5).factors,
        SoftmaxBasis.from_weight(merged.detach(), 5).factors,
        atol=1e-4,
        rtol=0,
    )
    with pytest.raises(ValueError, match=r"call .eval\(\) first"):
        SoftmaxBasis.from_model(model.train(), 5)


def test_changed_weights_are_noticed(tiny_model):
    basis = SoftmaxBasis.from_model(tiny_model, 5)
    basis.check_model(tiny_model)
    with torch.no_grad():
        tiny_model.lm_head.weight[3, 4] += 1e-3
    with pytest.raises(ValueError, match="made from other weights"):
        basis.check_model(tiny_model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_directions_of_rounding_are_refused(dtype):
    """Scaled to root mean square 1 they "kept by proof" what can be cut."""
    weight = (torch.randn(600, 8, dtype=torch.float64) @ torch.randn(8, 64, dtype=torch.float64)).to(dtype)
    assert SoftmaxBasis.from_weight(weight, 8).rank == 8
    for rank in (9, 12, 64):
        with pytest.raises(ValueError, match=f"rank must be at most 8, got {rank}"):
            SoftmaxBasis.from_weight(weight, rank)
    with pytest.raises(ValueError, match="rank must be at most 0, got 1"):
        SoftmaxBasis.from_weight(torch.zeros(5, 3), 1)


def test_bfloat16_weights(weight):
    basis = SoftmaxBasis.from_weight(weight.bfloat16(), 4)
    assert span_angle(basis.factors, SoftmaxBasis.from_weight(weight, 4).factors) < 0.02


@pytest.mark.parametrize("rank", [0, 41, True])
def test_bad_rank(weight, rank):
    with pytest.raises((TypeError, ValueError), match="rank must be a whole number from 1 to 40"):
        SoftmaxBasis.from_weight(weight, rank)


def test_bad_weights(weight):
    with pytest.raises(ValueError, match="floating-point matrix"):
        SoftmaxBasis.from_weight(weight[0], 1)
    with pytest.raises(ValueError, match="floating-point matrix"):
        SoftmaxBasis.from_weight(weight.long(), 1)
    with pytest.raises(ValueError, match="finite"):
        SoftmaxBasis.from_weight(weight / 0, 1)
    with pytest.raises(ValueError, match="softcap must be a number above 0"):
        SoftmaxBasis.from_weight(weight, 1, softcap=-1.0)


def test_a_model_without_a_head(tiny_model):
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        SoftmaxBasis.from_model(tiny_model.model)
