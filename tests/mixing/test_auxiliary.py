"""Processors with a second model inside every mode of generation, against a recomputation from scratch."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_longtrunc import (
    ContrastiveDecodingLogitsProcessor,
    EtaLogitsProcessor,
    GuidanceLogitsProcessor,
    LMInfinite,
    ProxyTuningLogitsProcessor,
    ULDLogitsProcessor,
    attach_processors,
)
from hf_longtrunc.mixing import cached_model
from tests.conftest import tiny_config

NEW = 8
ROWS = [[7, 8, 9, 7, 8], [1, 5, 9, 13, 5, 9, 2, 5, 9]]
PLAIN = torch.tensor([[3, 4, 6, 7, 8, 9, 7, 8, 2], ROWS[1]])
PADDED = torch.tensor([[0, 0, 0, 0, *ROWS[0]], ROWS[1]])
MASK = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])


def llama(layers):
    return LlamaForCausalLM(tiny_config(num_hidden_layers=layers))


def gpt2(layers):
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=layers, n_head=4, n_positions=128, initializer_range=0.4)
    config.eos_token_id = config.bos_token_id = None
    config.pad_token_id = 0
    return GPT2LMHeadModel(config)


def mistral(layers):
    """Its window of 6 is shorter than the prompts, so its own cache could not be taken back."""
    settings = {**tiny_config(num_hidden_layers=layers).to_dict(), "sliding_window": 6, "layer_types": None}
    settings.pop("model_type")
    return MistralForCausalLM(MistralConfig(**settings))


FAMILIES = {"llama": llama, "gpt2": gpt2, "mistral": mistral}


def made(build, layers, seed):
    torch.manual_seed(seed)
    return build(layers).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    build = FAMILIES[request.param]
    return made(build, 2, 1), made(build, 1, 2)


@pytest.fixture(scope="module")
def llamas():
    return made(llama, 2, 1), made(llama, 1, 2), made(llama, 1, 3)


def alone(model, ids, mask):
    """Log-probabilities of the next token, each row by itself, without padding and without a cache."""
    rows = [row[kept.bool()][None] for row, kept in zip(ids, mask, strict=True)]
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row, use_cache=False).logits[:, -1] for row in rows])
    return logits.double().log_softmax(-1)


def mask_of(ids, prompt_mask):
    """The mask of the rows that came from each prompt."""
    if prompt_mask is None:
        return torch.ones_like(ids)
    prompt = prompt_mask.repeat_interleave(len(ids) // len(prompt_mask), 0)
    return torch.cat([prompt, prompt.new_ones(len(ids), ids.shape[1] - prompt.shape[1])], 1)


class BruteForce(LogitsProcessor):
    """The formula of `combine` on models that are run afresh at every call."""

    def __init__(self, models, combine, prompt_mask=None):
        self.models, self.combine, self.prompt_mask = models, combine, prompt_mask

    def __call__(self, input_ids, scores):
        mask = mask_of(input_ids, self.prompt_mask)
        others = [alone(model, input_ids, mask) for model in self.models]
        return self.combine(scores.double().log_softmax(-1), *others).log_softmax(-1).float()


class Checked(LogitsProcessor):
    """Runs `ours`, holds every call of it against `theirs`, and remembers the worst difference."""

    def __init__(self, ours, theirs):
        self.ours, self.theirs, self.worst, self.calls = ours, theirs, 0.0, 0

    def __call__(self, input_ids, scores):
        ours, theirs = self.ours(input_ids, scores), self.theirs(input_ids, scores)
        assert torch.equal(ours.isinf(), theirs.isinf())
        difference = (ours - theirs).masked_fill(ours.isinf(), 0)
        self.worst, self.calls = max(self.worst, difference.abs().max().item()), self.calls + 1
        return ours


def uld_formula(p, q, alpha=0.75, rate=0.05):
    k = max(1, int(rate * p.shape[-1]))
    bar = torch.minimum(p.sort(-1).values[:, -k, None], p.amax(-1, keepdim=True) + torch.tensor(rate).log())
    return (p - alpha * q).masked_fill(p < bar - 1e-9, -torch.inf)


def generate(model, ids, mask, processor, **settings):
    torch.manual_seed(7)
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=mask, logits_processor=[processor], **settings)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "4 beams": {"num_beams": 4},
    "beam-sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "several returns": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "several returned beams": {"num_beams": 4, "num_return_sequences": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
}


def checked_in(models, mode, padded):
    """Generate in a mode with every call held against brute force."""
    target, assistant = models
    ids, mask = (PADDED, MASK) if padded else (PLAIN, torch.ones_like(PLAIN))
    if mode == "prompt lookup":
        ids, mask = (ids[:1], mask[:1])
    brute = BruteForce([assistant], uld_formula, mask)
    checked = Checked(ULDLogitsProcessor(assistant, filter_rate=0.05, attention_mask=mask if padded else None), brute)
    generate(target, ids, mask, checked, **MODES[mode])
    return checked


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left-padded"])
@pytest.mark.parametrize("mode", MODES)
def test_cached_is_brute_force(models, mode, padded):
    checked = checked_in(models, mode, padded)
    assert checked.calls >= 4
    assert checked.worst < 1e-4


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together with")
def test_assisted_decoding(models):
    target, assistant = models
    brute = BruteForce([assistant], uld_formula)
    checked = Checked(ULDLogitsProcessor(assistant, filter_rate=0.05), brute)
    mask = torch.ones_like(PLAIN[:1])
    results = [
        generate(target, PLAIN[:1], mask, processor, assistant_model=assistant) for processor in (checked, brute)
    ]
    assert torch.equal(*results)
    assert checked.worst < 1e-4


@pytest.mark.parametrize(("settings", "rows"), [({}, 2), ({"num_beams": 4}, 8), ({"do_sample": True}, 2)])
def test_tokens_fed_are_the_prompt_and_one_a_row_and_step(models, settings, rows):
    target, assistant = models
    uld = ULDLogitsProcessor(assistant)
    generate(target, PLAIN, torch.ones_like(PLAIN), uld, **settings)
    assert uld.tokens_fed == rows * (PLAIN.shape[1] + NEW - 1)
    if not settings:
        generate(target, PLAIN, torch.ones_like(PLAIN), uld)  # the prompt is there already, but for its last token
        assert uld.tokens_fed == rows * (PLAIN.shape[1] + NEW - 1) + rows * NEW


def test_one_processor_for_calls_in_a_row_and_other_batches(models):
    target, assistant = models
    batches = [
        (PLAIN, torch.ones_like(PLAIN), {}),
        (PLAIN, torch.ones_like(PLAIN), {"num_beams": 3}),
        (PADDED, MASK, {}),
        (PADDED.flip(0), MASK.flip(0), {"num_beams": 2}),
        (PLAIN[:1, :4], torch.ones_like(PLAIN[:1, :4]), {"do_sample": True}),
        (torch.cat([PADDED, PLAIN]), torch.cat([MASK, torch.ones_like(PLAIN)]), {}),
    ]
    uld = ULDLogitsProcessor(assistant, filter_rate=0.05)
    for ids, mask, settings in batches:
        brute = BruteForce([assistant], uld_formula, mask)
        checked = Checked(uld, brute)
        generate(target, ids, mask, checked, **settings)
        assert checked.worst < 1e-4


def test_the_mask_is_part_of_the_address(models):
    """The same ids under another mask have other keys and values."""
    assistant, scores = models[1], torch.zeros(2, 97)
    uld = ULDLogitsProcessor(assistant, filter_rate=0.05)
    for mask in (MASK, torch.ones_like(MASK), MASK):
        uld.attention_mask = mask
        expected = BruteForce([assistant], uld_formula, mask)(PADDED, scores)
        torch.testing.assert_close(uld(PADDED, scores), expected, atol=1e-4, rtol=0)


def test_a_prompt_longer_than_a_chunk(models, monkeypatch):
    """With chunks of 3 the first one of the left-padded row is nothing but padding."""
    monkeypatch.setattr(cached_model, "_CHUNK", 3)
    checked = checked_in(models, "4 beams", padded=True)
    assert checked.worst < 1e-4


def guidance_brute(model, prompt, negative, scale):
    class Brute(LogitsProcessor):
        def __call__(self, input_ids, scores):
            repeated = negative.expand(len(prompt), -1).repeat_interleave(len(input_ids) // len(prompt), 0)
            context = torch.cat([repeated, input_ids[:, prompt.shape[1] :]], 1)
            q = alone(model, context, torch.ones_like(context))
            p = scores.double().log_softmax(-1)
            return (q + scale * (p - q)).log_softmax(-1).float()

    return Brute()


@pytest.mark.parametrize("negative", [None, [[3, 4]], [[3, 4, 5], [6, 7, 8]]], ids=["last token", "one", "each"])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_guidance(llamas, num_beams, negative):
    target = llamas[0]
    ids = PLAIN[:, -1:] if negative is None else torch.tensor(negative)
    given = None if negative is None else ids
    brute = guidance_brute(target, PLAIN, ids, 1.5)
    checked = Checked(GuidanceLogitsProcessor(target, 1.5, PLAIN, given), brute)
    mask = torch.ones_like(PLAIN)
    results = [generate(target, PLAIN, mask, processor, num_beams=num_beams) for processor in (checked, brute)]
    assert torch.equal(*results)
    assert checked.worst < 1e-4


def test_guidance_with_a_left_padded_negative_prompt(llamas):
    target = llamas[0]
    negative, mask = torch.tensor([[0, 0, 4], [5, 6, 7]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    guidance = GuidanceLogitsProcessor(target, 2.0, PLAIN, negative, mask)
    scores = torch.randn(2, 97)
    q = alone(target, negative, mask)
    p = scores.double().log_softmax(-1)
    expected = (q + 2 * (p - q)).log_softmax(-1).float()
    torch.testing.assert_close(guidance(PLAIN, scores), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["prompt_ids", "negative_prompt_ids"])
def test_a_text_is_no_prompt(tiny_model, name):
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor of token ids \[prompts, columns\], got str"):
        GuidanceLogitsProcessor(tiny_model, 1.5, **{"prompt_ids": PLAIN, name: "x"})


class Differences(LogitsProcessor):
    """What another processor returns, held against the right answer, both normalised."""

    def __init__(self, other, right):
        self.other, self.right, self.worst = other, right, 0.0

    def __call__(self, input_ids, scores):
        right = self.right(input_ids, scores)
        self.worst = max(self.worst, (self.other(input_ids, scores).log_softmax(-1) - right).abs().max().item())
        return right


@pytest.mark.parametrize(("num_beams", "is_right"), [(1, True), (4, False)])
def test_canary_transformers_own_guidance_is_wrong_under_beams(llamas, num_beams, is_right):
    """If this fails at 4 beams, transformers has learned it: say so in docs/auxiliary.md."""
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

    target = llamas[0]
    negative = torch.tensor([[3, 4]]).expand(2 * num_beams, -1)  # it has to be told the number of rows
    theirs = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, target, unconditional_ids=negative)
    watch = Differences(theirs, guidance_brute(target, PLAIN, torch.tensor([[3, 4]]), 1.5))
    with torch.no_grad():
        generate(target, PLAIN, torch.ones_like(PLAIN), watch, num_beams=num_beams)
    assert (watch.worst < 1e-4) is is_right
    assert is_right or watch.worst > 1


@pytest.mark.parametrize("mode", ["sampling", "4 beams", "prompt lookup"])
def test_contrastive_decoding_and_proxy_tuning(llamas, mode):
    target, expert, anti_expert = llamas
    ids = PLAIN[:1] if mode == "prompt lookup" else PLAIN

    def contrast(p, q):
        tempered = (q / 0.5).log_softmax(-1)
        return (p - tempered).masked_fill(p < p.amax(-1, keepdim=True) + torch.tensor(0.1).log() - 1e-9, -torch.inf)

    pairs = [
        (ContrastiveDecodingLogitsProcessor(expert, temperature=0.5), BruteForce([expert], contrast)),
        (
            ProxyTuningLogitsProcessor(expert, anti_expert, 0.7),
            BruteForce([expert, anti_expert], lambda p, e, a: p + 0.7 * (e - a)),
        ),
    ]
    for ours, brute in pairs:
        checked = Checked(ours, brute)
        results = [generate(target, ids, torch.ones_like(ids), each, **MODES[mode]) for each in (checked, brute)]
        assert torch.equal(*results)
        assert checked.worst < 1e-4


def test_keep_mode_and_alpha_zero(llamas):
    target, assistant, _ = llamas
    scores = target(PLAIN).logits[:, -1].detach()
    p = scores.log_softmax(-1)
    nothing = ULDLogitsProcessor(assistant, 0.0, filter_mode="keep")(PLAIN, scores)
    torch.testing.assert_close(nothing, p, atol=1e-5, rtol=0)
    kept = ULDLogitsProcessor(assistant, 1.0, 0.05, "keep")(PLAIN, scores)
    tail = ULDLogitsProcessor(assistant, 1.0, 0.05)(PLAIN, scores) == -torch.inf
    assert tail.any()
    assert kept.isfinite().all()
    torch.testing.assert_close(kept[tail], p[tail])
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(2))
    itself = ULDLogitsProcessor(target, 0.75, 1e-9, "keep")(PLAIN, scores)
    assert itself.isfinite().all()


def test_assistant_that_is_the_target_leaves_a_quarter_of_the_logits(llamas):
    target = llamas[0]
    scores = target(PLAIN).logits[:, -1].detach()
    everything = 1.0  # a filter rate of 1 keeps min(max p, V-th largest p): all of them
    quarter = ULDLogitsProcessor(target, 0.75, everything)(PLAIN, scores)
    torch.testing.assert_close(quarter, (0.25 * scores).log_softmax(-1), atol=1e-4, rtol=0)
    uniform = ULDLogitsProcessor(target, 1.0, everything)(PLAIN, scores)
    torch.testing.assert_close(uniform, torch.zeros_like(scores).log_softmax(-1), atol=1e-4, rtol=0)


def test_token_losses_are_the_scores_of_the_processor(llamas):
    target, assistant, _ = llamas
    uld = ULDLogitsProcessor(assistant, filter_rate=0.05, filter_mode="keep")
    losses = uld.token_losses(target, PADDED, MASK)
    assert losses.shape == (2, 8)
    assert losses.isfinite().all()
    for column in range(5, 9):
        scores = alone(target, PADDED[:, :column], MASK[:, :column]).float()
        expected = -uld(PADDED[:, :column], scores).gather(1, PADDED[:, column : column + 1])[:, 0]
        torch.testing.assert_close(losses[:, column - 1], expected, atol=1e-4, rtol=0)


def test_in_front_of_eta_it_gives_the_distribution_that_eta_cuts(llamas):
    target, assistant, _ = llamas
    uld, eta = ULDLogitsProcessor(assistant, filter_rate=0.05), EtaLogitsProcessor(0.2)
    torch.manual_seed(7)
    settings = {"do_sample": True, "top_k": 0, "output_scores": True, "return_dict_in_generate": True}
    result = target.generate(PLAIN, logits_processor=[uld, eta], max_new_tokens=6, output_logits=True, **settings)
    for step, (scores, logits) in enumerate(zip(result.scores, result.logits, strict=True)):
        torch.testing.assert_close(scores, eta(None, uld(result.sequences[:, : 9 + step], logits)))


def test_a_model_with_recurrent_layers_is_run_afresh(llamas):
    config = MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.4)
    torch.manual_seed(4)
    mamba = MambaForCausalLM(config).eval()
    brute = BruteForce([mamba], uld_formula)
    checked = Checked(ULDLogitsProcessor(mamba, filter_rate=0.05), brute)
    mask = torch.ones_like(PLAIN)
    results = [generate(llamas[0], PLAIN, mask, each, num_beams=3) for each in (checked, brute)]
    assert torch.equal(*results)
    assert checked.worst < 1e-4
    assert checked.ours.tokens_fed == 6 * sum(range(9, 9 + NEW))


def test_an_assistant_under_lm_infinite(llamas):
    target, assistant, _ = llamas
    with LMInfinite(num_sink_tokens=2, window_length=5)(assistant):
        brute = BruteForce([assistant], uld_formula, MASK)
        checked = Checked(ULDLogitsProcessor(assistant, filter_rate=0.05, attention_mask=MASK), brute)
        generate(target, PADDED, MASK, checked, num_beams=2)
    assert checked.worst < 1e-4


def test_scores_and_ids_are_not_written(llamas):
    target, assistant, anti_expert = llamas
    scores, ids = target(PLAIN).logits[:, -1].detach(), PLAIN.clone()
    before = scores.clone()
    for processor in (
        ULDLogitsProcessor(assistant),
        ULDLogitsProcessor(assistant, filter_mode="keep"),
        ContrastiveDecodingLogitsProcessor(assistant),
        ProxyTuningLogitsProcessor(assistant, anti_expert),
        GuidanceLogitsProcessor(target, 1.5, PLAIN),
    ):
        result = processor(ids, scores)
        assert result.dtype == torch.float32
        assert torch.equal(scores, before)
        assert torch.equal(ids, PLAIN)


def test_an_exception_in_the_model_leaves_no_half_made_cache(llamas, monkeypatch):
    _, assistant, _ = llamas
    uld = ULDLogitsProcessor(assistant, filter_rate=0.05)
    scores = torch.randn(2, 97)
    uld(PLAIN, scores)
    longer = torch.cat([PLAIN.flip(0), PLAIN[:, :3]], 1)
    with monkeypatch.context() as patch:
        patch.setattr(assistant.lm_head, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError):
            uld(longer, scores)
    expected = BruteForce([assistant], uld_formula)(longer, scores)
    ours = uld(longer, scores)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


# -- what is refused ---------------------------------------------------------------------------------------------------

SCORES = torch.zeros(2, 97)


def test_encoder_decoder():
    config = T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="encoder-decoder"):
        ULDLogitsProcessor(T5ForConditionalGeneration(config))


def test_a_prompt_with_images_is_refused(llamas):
    """The second model is handed ids alone, and read the placeholders of pixels as text."""
    target, *_ = llamas
    assistant = made(llama, 1, 4)
    assistant.config.image_token_id = 9
    with pytest.raises(ValueError, match=r"placeholder 9 \(image_token_id\).*no pixels"):
        target.generate(PLAIN, logits_processor=[ULDLogitsProcessor(assistant)], max_new_tokens=2)
    ULDLogitsProcessor(assistant)(torch.tensor([[3, 4, 6]]), torch.randn(1, 97))


def test_inputs_embeds_and_an_empty_prompt(llamas):
    target, assistant, _ = llamas
    embeds = target.get_input_embeddings()(PLAIN)
    with pytest.raises(ValueError, match="not as inputs_embeds"):
        target.generate(inputs_embeds=embeds, logits_processor=[ULDLogitsProcessor(assistant)], max_new_tokens=2)
    with pytest.raises(ValueError, match="no input_ids"):
        ULDLogitsProcessor(assistant)(torch.empty(2, 0, dtype=torch.long), SCORES)
    with pytest.raises(ValueError, match="nothing but padding"):
        ULDLogitsProcessor(assistant)(torch.tensor([[0, 0], [5, 6]]), SCORES)


class Trained:
    """What can happen to a second model between two calls on the same prompts."""

    @staticmethod
    def a_step_of_an_optimizer(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(PLAIN).logits.square().mean().backward()
        optimizer.step()

    @staticmethod
    def a_fused_step_of_an_optimizer(model):
        """What Trainer takes: it leaves version counters alone."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        model(PLAIN).logits.square().mean().backward()
        optimizer.step()

    @staticmethod
    def a_write_without_gradients(model):
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(3)

    @staticmethod
    def other_weights_loaded(model):
        model.load_state_dict(made(llama, 1, 9).state_dict())

    @staticmethod
    def a_parameter_exchanged(model):
        model.model.layers[0].self_attn.v_proj.weight = made(llama, 1, 9).model.layers[0].self_attn.v_proj.weight

    @staticmethod
    def another_dtype(model):
        model.to(torch.float64)


CHANGES = [name for name in vars(Trained) if not name.startswith("_")]


@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_get_a_new_cache(llamas, change):
    """Keys and values of the old ones gave answers that were nats off, or an error of dtypes."""
    target, assistant = llamas[0], made(llama, 1, 2)
    uld, scores = ULDLogitsProcessor(assistant, filter_rate=0.05), target(PLAIN).logits[:, -1].detach()
    before = uld(PLAIN, scores)
    getattr(Trained, change)(assistant)
    after = uld(PLAIN, scores)
    torch.testing.assert_close(after, BruteForce([assistant], uld_formula)(PLAIN, scores), atol=1e-4, rtol=0)
    assert change == "another_dtype" or not torch.allclose(before, after, atol=0.1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_another_adapter_gets_a_new_cache(llamas):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    assistant = peft.get_peft_model(made(llama, 1, 2), config).eval()
    assistant.add_adapter("other", config)
    uld, scores = ULDLogitsProcessor(assistant, filter_rate=0.05), torch.randn(2, 97)
    with pytest.raises(ValueError, match="or a module of it"):
        uld(PLAIN, scores)  # peft adds adapters in training mode
    assistant.eval()
    brute = BruteForce([assistant], uld_formula)
    results = [uld(PLAIN, scores)]
    assistant.set_adapter("other")
    results.append(uld(PLAIN, scores))
    torch.testing.assert_close(results[-1], brute(PLAIN, scores), atol=1e-4, rtol=0)
    for module in assistant.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("other", 5.0)
    results.append(uld(PLAIN, scores))
    torch.testing.assert_close(results[-1], brute(PLAIN, scores), atol=1e-4, rtol=0)
    with assistant.disable_adapter():
        results.append(uld(PLAIN, scores))
        torch.testing.assert_close(results[-1], brute(PLAIN, scores), atol=1e-4, rtol=0)
    assistant.merge_adapter()
    torch.testing.assert_close(uld(PLAIN, scores), brute(PLAIN, scores), atol=1e-4, rtol=0)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(results))


def test_what_no_version_counter_sees_is_forgotten_by_reset(llamas):
    assistant, scores = made(llama, 1, 2), torch.randn(2, 97)
    uld = ULDLogitsProcessor(assistant, filter_rate=0.05)
    uld(PLAIN, scores)
    assistant.model.layers[0].self_attn.v_proj.weight.data.mul_(3)
    uld.reset()
    torch.testing.assert_close(
        uld(PLAIN, scores), BruteForce([assistant], uld_formula)(PLAIN, scores), atol=1e-4, rtol=0
    )


def test_weights_that_were_loaded_in_inference_mode():
    with torch.inference_mode():
        assistant = made(llama, 1, 2)
    uld, scores = ULDLogitsProcessor(assistant, filter_rate=0.05), torch.randn(2, 97)
    for _ in range(2):
        result = uld(PLAIN, scores)
    torch.testing.assert_close(result, BruteForce([assistant], uld_formula)(PLAIN, scores), atol=1e-4, rtol=0)
    assert uld.tokens_fed == 2 * (9 + 1)


def test_a_copy_has_caches_of_its_own(llamas):
    uld, scores = ULDLogitsProcessor(made(llama, 1, 2), filter_rate=0.05), torch.randn(2, 97)
    expected = uld(PLAIN, scores)
    for copied in (copy.deepcopy(uld), pickle.loads(pickle.dumps(uld))):
        assert torch.equal(copied(PLAIN, scores), expected)


def test_generate_batch_is_refused_and_not_run_without_it(llamas):
    """transformers leaves out what declares that it does not support it: forgotten facts came back."""
    target, assistant, _ = llamas
    config = GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    with attach_processors(target, [ULDLogitsProcessor(assistant)]):
        outputs = target.generate_batch([[1, 5, 9]], generation_config=config, continuous_batching_config=settings)
    assert not any(output.generated_tokens for output in outputs.values())  # transformers logs why a request failed


def test_a_mask_serves_the_prompts_that_it_was_given_for(llamas):
    """Another batch of the same shape and other padding was read with the first one's mask."""
    uld, scores = ULDLogitsProcessor(llamas[1], filter_rate=0.05, attention_mask=MASK), torch.zeros(2, 97)
    uld(PADDED, scores)
    uld(torch.cat([PADDED, PADDED[:, :2]], 1), scores)  # the same prompts go on
    uld(PADDED.repeat_interleave(3, 0), torch.zeros(6, 97))
    with pytest.raises(ValueError, match="attention_mask was given for other prompts"):
        uld(PADDED.flip(0), scores)
    uld.attention_mask = MASK.flip(0)
    expected = BruteForce([llamas[1]], uld_formula, MASK.flip(0))(PADDED.flip(0), scores)
    torch.testing.assert_close(uld(PADDED.flip(0), scores), expected, atol=1e-4, rtol=0)


def test_a_smaller_vocabulary_is_named(llamas):
    small = LlamaForCausalLM(tiny_config(vocab_size=89)).eval()
    with pytest.raises(
        ValueError,
        match=r"gives 89 logits and the target 97: they must share one vocabulary.*resize_token_embeddings",
    ):
        ULDLogitsProcessor(small)(PLAIN + 83, torch.zeros(2, 97))


def test_no_rows(llamas):
    uld = ULDLogitsProcessor(llamas[1])
    assert uld(PLAIN[:0], torch.zeros(0, 97)).shape == (0, 97)


def test_rows_of_continuous_batching(llamas):
    with pytest.raises(ValueError, match="generate_batch"):
        ULDLogitsProcessor(llamas[1])(torch.tensor([1, 2, 3]), SCORES)


def test_training_mode(llamas):
    torch.manual_seed(0)
    training = LlamaForCausalLM(tiny_config()).train()
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        ULDLogitsProcessor(training)(PLAIN, SCORES)
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        ULDLogitsProcessor(llamas[1]).token_losses(training, PLAIN)


@pytest.mark.parametrize("mask", [torch.ones(3, 9), torch.ones(2, 12), torch.ones(9)], ids=["rows", "columns", "1-D"])
def test_a_mask_that_does_not_fit(llamas, mask):
    with pytest.raises(ValueError, match=r"does not fit input_ids \[2, 9\].*processor\.attention_mask"):
        ULDLogitsProcessor(llamas[1], attention_mask=mask)(PLAIN, SCORES)


def test_padding_that_could_be_a_bos_token():
    model = made(lambda layers: LlamaForCausalLM(tiny_config(pad_token_id=None, eos_token_id=1)), 1, 0)
    uld = ULDLogitsProcessor(model)
    with pytest.raises(ValueError, match=r"token 1, which is padding and BOS.*attention_mask"):
        uld(PLAIN.flip(0).clone().index_fill_(1, torch.tensor([0]), 1), SCORES)
    uld.attention_mask = torch.ones_like(PLAIN)
    assert uld(PLAIN, SCORES).shape == (2, 97)


def test_a_model_that_names_no_special_token_is_never_padded():
    model = made(lambda layers: LlamaForCausalLM(tiny_config(pad_token_id=None, bos_token_id=None)), 1, 0)
    ids = torch.tensor([[0, 0, 5]])
    ours = ULDLogitsProcessor(model, filter_rate=0.05)(ids, SCORES[:1])
    torch.testing.assert_close(ours, BruteForce([model], uld_formula)(ids, SCORES[:1]), atol=1e-4, rtol=0)


def test_guidance_on_other_prompts(llamas):
    guidance = GuidanceLogitsProcessor(llamas[0], 1.5, PLAIN)
    with pytest.raises(ValueError, match="make a processor for these prompts"):
        guidance(PADDED, SCORES)
    with pytest.raises(ValueError, match="make a processor for these prompts"):
        guidance(PLAIN[:, :5], SCORES)
    with pytest.raises(ValueError, match="1 row or one for each of the 2 prompts, got 3"):
        GuidanceLogitsProcessor(llamas[0], 1.5, PLAIN, torch.ones(3, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": "1"}, TypeError, "alpha must be a number"),
        ({"alpha": -0.5}, ValueError, "alpha must be a number of at least 0, got -0.5"),
        ({"alpha": float("nan")}, ValueError, "alpha must be a number"),
        ({"filter_rate": 0}, ValueError, "filter_rate must be a number above 0 and of at most 1"),
        ({"filter_rate": 1.5}, ValueError, "filter_rate must be a number above 0 and of at most 1"),
        ({"filter_mode": "drop"}, ValueError, "filter_mode must be one of 'exclude', 'keep', got 'drop'"),
    ],
)
def test_bad_arguments(llamas, arguments, error, message):
    with pytest.raises(error, match=message):
        ULDLogitsProcessor(llamas[1], **arguments)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="must be a transformers model, got str"):
        ULDLogitsProcessor("gpt2")
