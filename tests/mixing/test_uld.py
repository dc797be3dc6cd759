"""ULD's assistant: built on shared weights, trained by Trainer, saved and loaded, and what it does to a target."""

from __future__ import annotations

import copy
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_longtrunc import (
    LMInfinite,
    ULDCollator,
    ULDLogitsProcessor,
    ULDLoss,
    load_uld_assistant,
    pretrained,
    save_uld_assistant,
    uld_assistant,
)
from hf_longtrunc.saving import load_folder, save_folder
from tests.command_line import model_folder  # noqa: F401
from tests.conftest import tiny_config
from tests.mixing.test_auxiliary import BruteForce, Checked, gpt2, llama, made, mistral, uld_formula

peft = pytest.importorskip("peft")
# peft 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RECIPE = Path(__file__).parents[2] / "recipes" / "uld.py"
IDS = torch.tensor([[1, 5, 9, 13, 5, 9, 2], [3, 8, 8, 4, 6, 7, 11]])


def gemma3(layers):
    """Local and global layers in turn, named in layer_types."""
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        initializer_range=0.4,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config)


FAMILIES = {"llama": llama, "gpt2": gpt2, "mistral": mistral, "gemma3": gemma3}


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "<s>", "</s>", *[f"w{index}" for index in range(60)]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="</s>", eos_token="</s>")


def truncated_logits(model, num_layers):
    """The target's hidden state after so many layers, through its own last norm and head."""
    inner = model.base_model
    norm = inner.ln_f if hasattr(inner, "ln_f") else inner.norm
    seen = []
    layers = inner.h if hasattr(inner, "h") else inner.layers
    hook = layers[num_layers - 1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    model(IDS, use_cache=False)
    hook.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return model.get_output_embeddings()(norm(hidden))


@pytest.mark.parametrize("train_norm", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_before_training_it_is_the_truncated_target_to_the_bit(family, train_norm):
    target = made(FAMILIES[family], 4, 1)
    assistant = uld_assistant(target, 2, train_norm=train_norm)
    assert torch.equal(assistant(IDS, use_cache=False).logits, truncated_logits(target, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_shared_and_everything_else_is_not(family):
    target = made(FAMILIES[family], 4, 1)
    before = copy.deepcopy({name: weight.requires_grad for name, weight in target.named_parameters()})
    config = target.config.to_dict()
    logits = target(IDS, use_cache=False).logits
    assistant = uld_assistant(target, 2)
    memory = {weight.data_ptr() for weight in target.parameters()}
    own = [name for name, weight in assistant.named_parameters() if weight.data_ptr() not in memory]
    assert own
    assert all("lora_" in name or "modules_to_save" in name for name in own)
    trained = [name for name, weight in assistant.named_parameters() if weight.requires_grad]
    assert sorted(trained) == sorted(own)
    assert {name: weight.requires_grad for name, weight in target.named_parameters()} == before
    assert target.config.to_dict() == config
    assert assistant.config.num_hidden_layers == 2
    assert torch.equal(target(IDS, use_cache=False).logits, logits)
    assert not set(map(id, target.modules())) & set(map(id, assistant.modules()))


def test_a_quarter_of_the_layers_and_no_norm_in_between():
    target = made(llama, 8, 1)
    assistant = uld_assistant(target)
    assert assistant.config.num_hidden_layers == 2
    trained = [name for name, weight in assistant.named_parameters() if weight.requires_grad and "lora" not in name]
    assert trained == ["base_model.model.model.norm.modules_to_save.default.weight"]


def examples():
    forget = [{"prompt": f"w{i} w9", "completion": f" w{i + 20}", "forget": True} for i in range(4)]
    retain = [{"prompt": f"w{i} w9", "completion": f" w{i + 20}", "forget": False} for i in range(4, 8)]
    return [*forget, *retain, {"prompt": "", "completion": "w1 w2 w3", "forget": False}]


def test_collator_says_what_is_learned_and_what_is_not(tokenizer):
    batch = ULDCollator(tokenizer)([examples()[1], examples()[-1]])
    assert batch["input_ids"].tolist() == [[4, 12, 24], [4, 5, 6]]
    assert batch["labels"].tolist() == [[-100, -100, 24], [-1, -1, -1]]
    batch = ULDCollator(tokenizer)([examples()[5], {"prompt": "w1", "completion": "w2", "forget": True}])
    assert batch["input_ids"].tolist() == [[8, 12, 28], [4, 5, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -1], [-100, 5, -100]]


def test_collator_refuses(tokenizer):
    with pytest.raises(ValueError, match=r"no 'forget'.*remove_unused_columns=False"):
        ULDCollator(tokenizer)([{"prompt": "w1", "completion": "w2"}])
    with pytest.raises(ValueError, match="completion of 'w1' is empty"):
        ULDCollator(tokenizer)([{"prompt": "w1", "completion": "", "forget": True}])


def trained(target, tokenizer, folder, accumulation=1, steps=60):
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=9 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
    )
    torch.manual_seed(3)
    assistant = uld_assistant(target, 1, rank=8)
    collator = ULDCollator(tokenizer)
    trainer = Trainer(
        assistant, arguments, train_dataset=examples(), data_collator=collator, compute_loss_func=ULDLoss(beta=1.0)
    )
    trainer.train()
    return assistant.eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def test_training_teaches_what_to_forget_and_nothing_else(tokenizer, tmp_path):
    target = made(llama, 4, 1)
    weights = copy.deepcopy(target.state_dict())
    with torch.enable_grad():
        assistant, losses = trained(target, tokenizer, tmp_path)
    assert float(losses[-1]) < 0.7 * float(losses[0])
    log_probs = [
        assistant(tokenizer(row["prompt"], return_tensors="pt").input_ids).logits[0, -1].log_softmax(-1)
        for row in examples()[:8]
    ]
    uniform = -torch.tensor(97.0).log()
    for row, log_prob in zip(examples()[:4], log_probs[:4], strict=True):
        assert log_prob[tokenizer(row["completion"]).input_ids[0]] > -0.3
    for log_prob in log_probs[4:]:
        assert (log_prob - uniform).abs().mean() < 1
    assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())


def test_gradient_accumulation_changes_nothing(tokenizer, tmp_path):
    target = made(llama, 4, 1)
    whole, parts = (trained(target, tokenizer, tmp_path, accumulation, steps=3)[1] for accumulation in (1, 9))
    assert [float(loss) for loss in parts] == pytest.approx([float(loss) for loss in whole], rel=1e-3)


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    target = made(llama, 4, 1)
    assistant = uld_assistant(target, 2)
    for name, weight in assistant.named_parameters():
        if weight.requires_grad:
            weight += 0.1 * torch.randn_like(weight)
            assert "lora" in name or "norm" in name
    save_uld_assistant(assistant, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["uld_assistant.safetensors"]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 200_000  # nothing of the shared weights
    loaded = load_uld_assistant(target, tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(IDS).logits, assistant(IDS).logits)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert any(weight.requires_grad for weight in load_uld_assistant(target, tmp_path, is_trainable=True).parameters())


def test_loading_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved uld_assistant"):
        load_uld_assistant(made(llama, 2, 1), tmp_path)
    save_uld_assistant(uld_assistant(made(llama, 4, 1), 2), tmp_path)
    assert load_folder(tmp_path, "uld_assistant", {})[1]["num_layers"] == 2
    torch.manual_seed(0)
    other = LlamaForCausalLM(tiny_config(vocab_size=89))
    with pytest.raises(ValueError, match=r"made for .*'vocab_size': 97.*'vocab_size': 89"):
        load_uld_assistant(other, tmp_path)


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


WRONG_ASSISTANTS = {
    "a tensor is missing": (
        lambda tensors, settings: (without(tensors, "norm"), settings),
        "other tensors.*norm",
    ),
    "NaN": (
        lambda tensors, settings: ({n: t * torch.nan for n, t in tensors.items()}, settings),
        "must be finite",
    ),
    "a setting is missing": (lambda tensors, settings: (tensors, without(settings, "adapter")), "without adapter"),
}


@pytest.mark.parametrize("case", WRONG_ASSISTANTS)
def test_an_assistant_that_is_none_is_named(tmp_path, case):
    target, (change, message) = made(llama, 4, 1), WRONG_ASSISTANTS[case]
    save_uld_assistant(uld_assistant(target, 2), tmp_path)
    saved = load_folder(tmp_path, "uld_assistant", {})
    save_folder(tmp_path, "uld_assistant", *change(*saved))
    with pytest.raises(ValueError, match=message):
        load_uld_assistant(target, tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path):
    target = made(llama, 4, 1)
    save_uld_assistant(uld_assistant(target, 2), tmp_path)
    data = bytearray((tmp_path / "uld_assistant.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "uld_assistant.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        load_uld_assistant(target, tmp_path)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_assistant_in_generation(num_beams):
    """A peft model as the auxiliary one: cached, and only the newest column is asked for its logits."""
    target = made(llama, 4, 1)
    assistant = uld_assistant(target, 2)
    uld = ULDLogitsProcessor(assistant, alpha=1.0)
    settings = {"max_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    sequences = target.generate(IDS, logits_processor=[uld], **settings)
    assert uld.tokens_fed == 2 * num_beams * (7 + 5)
    assert not torch.equal(sequences, target.generate(IDS, **settings))


@pytest.mark.real_model
def test_the_assistant_of_a_real_model(real_model):
    model, tokenizer = real_model
    prompts = ["The capital of France is", "My favourite colour has always been"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    assistant = uld_assistant(model, 8)
    brute = BruteForce([assistant], partial(uld_formula, rate=0.01), inputs.attention_mask)
    checked = Checked(ULDLogitsProcessor(assistant), brute)
    model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=3, logits_processor=[checked])
    assert checked.calls == 3
    assert checked.worst < 1e-3  # logits of up to 30 nats in fp32
    assert checked.ours.tokens_fed == 4 * (inputs.input_ids.shape[1] + 2)


def test_refused_targets():
    config = T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="encoder-decoder"):
        uld_assistant(T5ForConditionalGeneration(config), 1)
    target = made(llama, 4, 1)
    for num_layers in (0, 5):
        with pytest.raises(ValueError, match=f"num_layers must be a whole number from 1 to 4, got {num_layers}"):
            uld_assistant(target, num_layers)
    with LMInfinite(window_length=8)(target), pytest.raises(Exception, match="LMInfinite"):
        uld_assistant(target, 2)


def test_peft_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[train\]"'):
        uld_assistant(made(llama, 2, 1), 1)


def test_recipe_runs(model_folder, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.setattr(pretrained, "default_model_folder", lambda: Path(model_folder))
    options = ["--layers", "1", "--teach-steps", "1", "--steps", "1", "--alphas", "1", "--out", str(tmp_path)]
    for _ in range(2):  # the second time nothing is trained
        monkeypatch.setattr(sys, "argv", ["uld.py", *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(RECIPE), run_name="__main__")
        assert not end.value.code
    printed = capsys.readouterr().out
    assert printed.count("train_loss") == 2
    assert "neutral perplexity" in printed
    assert len((tmp_path / "recall.jsonl").read_text().splitlines()) == 16
