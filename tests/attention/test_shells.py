"""Multimodal shells: LM-Infinite on the decoder of their text is the definition, with images too, or is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from hf_longtrunc import LMInfinite, verify_positions
from hf_longtrunc.models import CACHE, decoder_of

from .reference import Naive, Rope, install
from .shells import IMAGE_TOKEN, SHELLS, prompt_with_image, tiny_shell
from .test_dual_chunk_attention import ARM as CHUNKS, NaiveChunks

pytestmark = pytest.mark.filterwarnings("ignore")  # what model files warn about tiny configurations

S, L = 3, 12
ARM = LMInfinite(num_sink_tokens=S, window_length=L)
SERVED = [family for family in SHELLS if family != "paligemma"]
MROPE = [family for family in SERVED if family.startswith("qwen")]
IMAGES = [family for family in SERVED if family not in MROPE]


@pytest.fixture(autouse=True)
def llama4_runs(monkeypatch):
    """In 5.24 the forward of `Llama4ForConditionalGeneration` reads a field that its output does not have."""
    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)


def shell_of(family):
    return tiny_shell(family).requires_grad_(False)


def text(batch=1, n=29):
    return torch.randint(3, 80, (batch, n))


def naive_logits(family, kind=Naive, **inputs):
    """Logits of an unpatched shell whose full attention is computed pair by pair."""
    model = shell_of(family)
    decoder = decoder_of(model)
    buffers = dict(decoder.rotary_emb.named_buffers())
    frequencies = buffers.get("full_attention_inv_freq", buffers.get("inv_freq"))
    rope = None if family == "llama4" else Rope(2 * len(frequencies), frequencies=frequencies)
    install(decoder, kind(S, L, L, rope))
    return model(**inputs).logits


def assert_close(found, expected, share=1e-5):
    assert (found - expected).abs().max() <= share * expected.abs().max()


def is_the_definition(family, inputs):
    model = shell_of(family)
    before = model(**inputs).logits
    with ARM(model):
        patched = model(**inputs).logits
    assert_close(patched, naive_logits(family, **inputs))
    assert (patched - before)[:, L:].abs().max() > 1e-2
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("family", SERVED)
def test_text_alone_is_the_definition(family):
    is_the_definition(family, {"input_ids": text()})


@pytest.mark.parametrize("family", IMAGES)
def test_a_text_with_an_image_is_the_definition(family):
    is_the_definition(family, prompt_with_image(family))


@pytest.mark.parametrize("family", SERVED)
def test_only_the_config_of_the_decoder_names_the_patch(family):
    model = shell_of(family)
    text_config = model.config.get_text_config()
    others = [module for module in model.modules() if getattr(module, "config", text_config) is not text_config]
    before = [module.config._attn_implementation for module in others]
    with ARM(model):
        assert decoder_of(model).config is model.config.get_text_config()
        assert decoder_of(model).config._attn_implementation.startswith("hf_longtrunc")
        assert [module.config._attn_implementation for module in others] == before
    assert model.config.get_text_config() is text_config


def generated(model, inputs, **options):
    chosen = {"max_new_tokens": L + 2, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN], **options}
    return model.generate(**inputs, **chosen, return_dict_in_generate=True, output_logits=True)


def cached_is_uncached(model, inputs):
    out = generated(model, inputs)
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    longer = {**inputs, "input_ids": out.sequences}
    longer["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    assert_close(torch.stack(out.logits, 1), model(**longer).logits[:, -new - 1 : -1])


@pytest.mark.parametrize("family", SERVED)
def test_generate_on_padded_rows_and_beams(family):
    model, ids = shell_of(family), text(2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    ids[0, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with ARM(model):
        cached_is_uncached(model, inputs)
        alone = model(ids[:1, 6:]).logits
        assert_close(model(**inputs).logits[:1, 6:], alone)
        beams = generated(model, inputs, num_beams=3, max_new_tokens=6).sequences
        row = {"input_ids": ids[:1, 6:], "attention_mask": mask[:1, 6:]}
        assert torch.equal(generated(model, row, num_beams=3, max_new_tokens=6).sequences[0], beams[0, 6:])


@pytest.mark.parametrize("family", IMAGES)
def test_generate_behind_an_image_reads_it_whole(family, monkeypatch):
    monkeypatch.setattr(LMInfinite, "prefill_chunk", 6)
    model = shell_of(family)
    with ARM(model):
        cached_is_uncached(model, prompt_with_image(family))


@pytest.mark.parametrize(("family", "name"), [("gemma3", "token_type_ids"), ("qwen3_vl", "mm_token_type_ids")])
def test_token_types_of_a_text_alone_change_nothing(family, name, monkeypatch):
    monkeypatch.setattr(LMInfinite, "prefill_chunk", 9)
    model, ids = shell_of(family), text()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    typed = {**inputs, name: torch.zeros_like(ids)}
    with ARM(model):
        assert torch.equal(model(**typed).logits, model(**inputs).logits)
        plain, lengths = generated(model, inputs).sequences, []
        hook = decoder_of(model).register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        assert torch.equal(generated(model, typed).sequences, plain)
        hook.remove()
    assert max(lengths) == (9 if CACHE == "cache" else 29)  # 5.19 reads a prompt whole


def test_gemma4_lets_an_image_see_itself_in_its_windows_alone():
    inputs = prompt_with_image("gemma4")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    model = shell_of("gemma4")
    model.config.text_config.use_bidirectional_attention = "vision"
    before = model(**inputs).logits
    assert (before - model(**{**inputs, "mm_token_type_ids": None}).logits).abs().max() > 1e-2
    with LMInfinite(num_sink_tokens=S, window_length=29)(model):
        assert_close(model(**inputs).logits, before)
    with ARM(model):
        cached_is_uncached(model, inputs)


def refused(model, inputs, words, arms=(ARM, CHUNKS)):
    before = model(**inputs).logits
    for arm in arms:
        with pytest.raises(ValueError, match=words), arm(model):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, before)


def test_an_image_whose_tokens_see_ahead_is_refused():
    inputs = prompt_with_image("gemma3")
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    refused(shell_of("gemma3"), inputs, "tokens that see ahead, as those of an image", arms=[ARM])


def test_a_prompt_that_is_read_in_both_directions_is_refused():
    refused(shell_of("paligemma"), prompt_with_image("paligemma"), "read in both directions")


@pytest.mark.parametrize("family", MROPE)
def test_positions_in_three_directions_are_refused(family):
    model, inputs = shell_of(family), prompt_with_image(family)
    refused(model, inputs, r"height and width \(M-RoPE\)")
    with pytest.raises(ValueError, match="axes of position"):
        verify_positions(model)
    ids = text()
    apart = torch.arange(29).expand(3, 1, -1) + torch.tensor([0, 0, 5])[:, None, None]
    refused(model, {"input_ids": ids, "position_ids": apart}, r"height and width \(M-RoPE\)")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "smolvlm", "mistral3", "llava", "internvl"])
def test_dual_chunks_read_a_shell_as_they_are_defined(family):
    inputs = {"input_ids": text()} if family in MROPE else prompt_with_image(family)
    expected, model = naive_logits(family, NaiveChunks, **inputs), shell_of(family)
    with CHUNKS(model):
        assert_close(model(**inputs).logits, expected)
        cached_is_uncached(model, {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs})


def test_a_causal_model_inside_the_shell_is_found():
    model = shell_of("llama4")
    assert type(decoder_of(model)).__name__ == "Llama4TextModel"
    alone = AutoModelForCausalLM.from_config(model.config.text_config)
    assert type(decoder_of(alone)).__name__ == "Llama4TextModel"
