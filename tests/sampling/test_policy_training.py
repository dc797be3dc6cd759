"""TRL's trainers, where TRL is installed: every log-probability is that of the distribution that was drawn from."""

from __future__ import annotations

import contextlib
import doctest

import datasets
import pytest
import torch
from transformers import LlamaForCausalLM, PrinterCallback

from hf_longtrunc import EtaLogitsProcessor, attach_processors, attach_truncation
from tests.conftest import tiny_config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.transformers_own_deprecation("")]
trl = pytest.importorskip("trl", exc_type=ImportError)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(97)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2", unk_token="w0")


def reward(completions, **_):
    return [float(sum(int(word[1:]) % 2 for word in text.split() if word[1:].isdigit())) for text in completions]


def trainer_of(kind, folder, tokenizer, **settings):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(eos_token_id=2)).save_pretrained(
        folder / "model"
    )  # the reference is loaded from there
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    config = {"GRPO": trl.GRPOConfig, "RLOO": trl.RLOOConfig}[kind](
        str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", seed=1,
        gradient_checkpointing=False, logging_steps=1, max_completion_length=8, num_generations=4,
        **{"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, **settings},
    )  # fmt: skip
    prompts = datasets.Dataset.from_dict({"prompt": ["w5 w9", "w7", "w5 w9 w11 w13"] * 4})
    make = {"GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer}[kind]
    return make(model, reward_funcs=reward, args=config, train_dataset=prompts, processing_class=tokenizer)


@contextlib.contextmanager
def watched(trainer):
    """Everything that the trainer scores: the arguments, and the log-probabilities."""
    seen, scorer = [], trainer._get_per_token_logps_and_entropies

    def watch(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = scorer(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        seen.append((model, input_ids, attention_mask, logits_to_keep, result[0].detach()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trainer.__dict__, "_get_per_token_logps_and_entropies", watch)
        yield seen


def test_the_example_runs(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = trainer_of("GRPO", tmp_path, tokenizer, max_steps=1, disable_tqdm=True)
    made.remove_callback(PrinterCallback)
    names = {"GRPOTrainer": lambda *_, **__: made, "EtaLogitsProcessor": EtaLogitsProcessor}
    names |= dict.fromkeys(("model", "reward", "config", "prompts")) | {"attach_truncation": attach_truncation}
    (example,) = doctest.DocTestFinder(recurse=False).find(attach_truncation, "attach_truncation", globs=names)
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example).failed == 0
    assert runner.tries == 2
    assert made.state.global_step == 1


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_log_probabilities_are_those_of_the_kept_sets(kind, tmp_path, tokenizer):
    trainer = trainer_of(kind, tmp_path, tokenizer, max_steps=1, learning_rate=0.0)
    eta = EtaLogitsProcessor(0.1)
    with attach_truncation(trainer, [eta]), watched(trainer) as seen:
        trainer.train()
    assert seen
    for model, ids, attention, keep, found in seen:
        with torch.no_grad():
            logits = model(ids, attention_mask=attention).logits[:, -keep - 1 : -1]
        expected = eta(None, logits.flatten(0, 1)).view_as(logits).log_softmax(-1)
        expected = expected.gather(2, ids[:, -keep:, None])[..., 0].masked_fill(attention[:, -keep:] == 0, 0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    (log,) = [entry for entry in trainer.state.log_history if "truncation/log_ratio" in entry]
    assert log["truncation/log_ratio"] > 0.01
    assert log["truncation/importance_ratio"] > 1.01
    assert 8 < log["truncation/bytes_per_token"] < 8 + 16


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("GRPO", {"top_p": 0.8}),
        ("RLOO", {"num_iterations": 2, "beta": 0.1, "temperature": 0.7}),
        ("GRPO", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}),
    ],
    ids=["top-p", "several-updates", "buffered"],
)
def test_rows_keep_their_masks_through_the_trainers_batches(kind, settings, tmp_path, tokenizer):
    """Shuffled, split, scored more than once: a mask of another row would not keep the row's tokens."""
    trainer = trainer_of(kind, tmp_path, tokenizer, **settings)
    before = torch.cat([each.detach().flatten() for each in trainer.model.parameters()])
    with attach_truncation(trainer, [EtaLogitsProcessor(0.05)]):
        trainer.train()
    after = torch.cat([each.detach().flatten() for each in trainer.model.parameters()])
    assert not torch.equal(before, after)
    assert after.isfinite().all()


def test_the_full_vocabulary_is_another_policy(tmp_path, tokenizer):
    """One seed, one batch: TRL's own scores give another step."""
    found = []
    for attach in (attach_truncation, lambda trainer, each: attach_processors(trainer.model, each)):
        trainer = trainer_of("GRPO", tmp_path, tokenizer, max_steps=1)
        with attach(trainer, [EtaLogitsProcessor(0.1)]):
            trainer.train()
        found.append(torch.cat([each.detach().flatten() for each in trainer.model.parameters()]))
    assert not torch.allclose(*found, atol=1e-4)


def test_trainer_and_model_are_as_they_were(tmp_path, tokenizer):
    trainer = trainer_of("GRPO", tmp_path, tokenizer)
    before = [dict(each.__dict__) for each in (trainer, trainer.model)]
    with attach_truncation(trainer) as handle:
        assert "scores the kept sets" in repr(handle)
    assert [dict(each.__dict__) for each in (trainer, trainer.model)] == before
    with pytest.raises(TypeError, match="must be callable"):
        attach_truncation(trainer, ["eta"])
    assert [dict(each.__dict__) for each in (trainer, trainer.model)] == before


def test_what_it_cannot_record_is_refused(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="must be TRL's GRPOTrainer or RLOOTrainer, got object"):
        attach_truncation(object())
    trainer = trainer_of("GRPO", tmp_path, tokenizer)
    with attach_truncation(trainer), pytest.raises(ValueError, match=r"text alone, got \['pixel_values'\]"):
        trainer._get_per_token_logps_and_entropies(None, None, None, 1, pixel_values=1)
    trainer.use_vllm = True
    with pytest.raises(ValueError, match="has generation by vLLM"):
        attach_truncation(trainer)
