"""Logits processors with a second model, right in every mode of generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import LogitsProcessor

from hf_longtrunc.arguments import check_choice, check_float
from hf_longtrunc.mixing.cached_model import CachedModel, positions_of
from hf_longtrunc.mixing.logit_difference import (
    contrast,
    exclude_tail,
    guidance,
    keep_tail,
    likely_tokens,
    logit_difference,
    proxy,
)
from hf_longtrunc.models import parameters_of, unwrapped

if TYPE_CHECKING:
    from torch import Tensor

    FilterMode = Literal["exclude", "keep"]

# Names in configs of the placeholder tokens for images, videos and sounds.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")


class AuxiliaryModelLogitsProcessor(LogitsProcessor):
    """Base of the processors that combine the model's distribution with those of other models for the same text.

    Examples:
        >>> class Average(AuxiliaryModelLogitsProcessor):
        ...     def combine(self, target, *others):
        ...         return (target + others[0]).log_softmax(-1)
        >>> text = model.generate(ids, do_sample=False, max_new_tokens=2, logits_processor=[Average(model)])

    A subclass defines `combine(target, *others)`: log-probabilities [rows, V] in, log-probabilities out, one of
    `others` for each model. It may define `context` to let the models read another text than the target.

    Each model has a KV cache addressed by content: a call reuses the cached rows with a common prefix and feeds the
    rest, so beams, assisted and prompt-lookup decoding work. After the prompt a step costs one token a row.

    Args:
        models: causal language models in eval mode with the target's vocabulary, on any device.
        attention_mask: [prompts, columns] of the prompts, 1 for real tokens. None reads a leading run of the model's
            padding id as padding. Set the attribute again for another batch.

    Raises:
        TypeError, ValueError: a model that is an encoder-decoder or in training mode, or has another vocabulary; no
            token ids to read (`inputs_embeds`), or placeholders of images or sounds among them; a mask that does not
            fit, or that was given for other prompts; padding that could be a BOS token; continuous batching.

    Pass a processor before truncation samplers, which then cut the combined distribution. Models with recurrent or
    other special layers run on the whole text at every call.

    A change of the weights renews the caches: an optimizer's step in this process, another dtype or device, another
    active adapter or scale. Other changes (through `parameter.data`, or a patch such as `LMInfinite`) are not seen:
    call `reset()`. Each thread has caches of its own.
    """

    # Declared unsupported, it would be left out there with a line in the log; so it is called, and refuses.
    supports_continuous_batching = True

    def __init__(self, *models: Any, attention_mask: Tensor | None = None):
        self.attention_mask = attention_mask
        self._models = [CachedModel(model) for model in models]

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask of the prompts [prompts, columns]."""
        return self._attention_mask

    @attention_mask.setter
    def attention_mask(self, mask: Tensor | None) -> None:
        self._attention_mask = mask
        self._masked_prompts: Tensor | None = None  # the ids that the mask was first used with

    def reset(self) -> None:
        """Forget every cache, in all threads: the next call reads the whole text again."""
        for model in self._models:
            model.reset()

    def combine(self, target: Tensor, *others: Tensor) -> Tensor:
        """Return combined log-probabilities [rows, V]."""
        raise NotImplementedError

    @property
    def tokens_fed(self) -> int:
        """Number of token positions fed to the models so far, over all rows and models."""
        return sum(model.tokens_fed for model in self._models)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the combined log-probabilities [rows, V], fp32, for the token after `input_ids` [rows, length]."""
        _check_token_ids(input_ids)
        if not len(input_ids):
            return scores.float()
        for model in self._models:
            _check_vocabulary(min(model.embeddings, scores.shape[-1]), scores)
            _check_text_only(model.model, input_ids)
        context = self.context(input_ids)
        others = [model.next_log_probs(*context).to(scores.device) for model in self._models]
        for other in others:
            _check_vocabulary(other.shape[-1], scores)
        return self.combine(scores.float().log_softmax(-1), *others)

    def context(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the models' input: ids and mask [rows, columns]."""
        if self.attention_mask is None:
            return input_ids, self._models[0].leading_padding_mask(input_ids)
        mask = _extended_mask(self.attention_mask.to(input_ids.device), input_ids)
        self._check_prompts(input_ids)
        return input_ids, mask

    def _check_prompts(self, input_ids: Tensor) -> None:
        """Raise ValueError if the mask was first used with other prompts: an equal shape need not be equal padding."""
        prompts, columns = self._attention_mask.shape  # type: ignore[union-attr]
        if self._masked_prompts is None:
            self._masked_prompts = input_ids[:: len(input_ids) // prompts, :columns].clone()
        known = self._masked_prompts.to(input_ids.device)
        if not torch.equal(_repeated(known, len(input_ids)), input_ids[:, :columns]):
            raise ValueError(
                "attention_mask was given for other prompts: set processor.attention_mask to the mask of this batch, "
                "also where its shape is the same"
            )


class ULDLogitsProcessor(AuxiliaryModelLogitsProcessor):
    """Unlearning from logit difference: subtract an assistant that knows only the facts to forget.

    Examples:
        >>> processor = ULDLogitsProcessor(uld_assistant(model, num_layers=1), alpha=0.5)
        >>> text = model.generate(ids, do_sample=False, max_new_tokens=2, logits_processor=[processor])

        log p' = log p - alpha log p_assistant  (over the likely tokens, renormalised)

    Args:
        assistant: made by `uld_assistant` and trained with `ULDLoss`; or any model with the target's vocabulary.
        alpha: weight of the subtraction. The paper takes 0.75 (TOFU) and 0.5.
        filter_rate: in (0, 1]. The difference is taken over the tokens with p >= min(filter_rate max p, k-th largest),
            k = filter_rate V: an unlikely token must not rise because the assistant finds it even less likely.
        filter_mode: "exclude" removes the other tokens, for generation; "keep" leaves them the target's probability, so
            that any text has a finite score.
        attention_mask: see `AuxiliaryModelLogitsProcessor`.

    This suppresses facts while decoding and erases nothing; a fact in the prompt can still be read from there.
    `recipes/uld.py` measures it.

    Source: Ji et al. 2024, "Reversing the Forget-Retain Objectives", arXiv 2406.08607. Deviation: the assistant's
    logits are normalised, so a constant added to them has no effect under either filter.
    """

    def __init__(
        self,
        assistant: Any,
        alpha: float = 0.75,
        filter_rate: float = 1e-2,
        filter_mode: FilterMode = "exclude",
        attention_mask: Tensor | None = None,
    ):
        super().__init__(assistant, attention_mask=attention_mask)
        self.alpha = check_float("alpha", alpha, minimum=0)
        self.filter_rate = check_float("filter_rate", filter_rate, gt=0, maximum=1)
        self.filter_mode = check_choice("filter_mode", filter_mode, ("exclude", "keep"))

    def combine(self, target: Tensor, *others: Tensor) -> Tensor:
        """Subtract alpha times the assistant over the likely tokens [rows, V]."""
        (assistant,) = others
        difference = logit_difference(target, assistant, self.alpha)
        likely = likely_tokens(target, self.filter_rate)
        if self.filter_mode == "exclude":
            return exclude_tail(difference, likely)
        return keep_tail(difference, likely, target)

    @torch.no_grad()
    def token_losses(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of texts [texts, length] under the difference, nats [texts, length - 1].

        Entry i is the loss of token i + 1. Unlikely tokens keep the target's probability, under either `filter_mode`.
        `model` is the target, in eval mode. Cost: one forward of each model, a few [texts, length, V] in fp32.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pairs = model, self._models[0].model
        target, assistant = (_all_log_probs(each, input_ids, mask)[:, :-1] for each in pairs)
        difference = logit_difference(target, assistant.to(target.device), self.alpha)
        scores = keep_tail(difference, likely_tokens(target, self.filter_rate), target)
        return -scores.gather(-1, input_ids[:, 1:, None].to(scores.device))[..., 0]

    def __repr__(self) -> str:
        return f"ULDLogitsProcessor(alpha={self.alpha:g}, filter_rate={self.filter_rate:g}, {self.filter_mode!r})"


class ContrastiveDecodingLogitsProcessor(AuxiliaryModelLogitsProcessor):
    """Contrastive decoding: among the likely tokens, prefer those that a weaker model finds less likely.

    Examples:
        >>> amateur = model  # a smaller one
        >>> contrastive = ContrastiveDecodingLogitsProcessor(amateur)
        >>> text = model.generate(ids, do_sample=False, max_new_tokens=2, logits_processor=[contrastive])

        log p - log p_amateur  over the tokens with p >= alpha max p, renormalised

    Args:
        amateur: a smaller model of the same vocabulary.
        alpha: in (0, 1]; the paper takes 0.1.
        temperature: of the amateur; the paper takes 0.5 for GPT-2 and 1 for OPT.
        attention_mask: see `AuxiliaryModelLogitsProcessor`.

    Source: Li et al. 2022, arXiv 2210.15097, section 3. The paper searches with beams.
    """

    def __init__(
        self, amateur: Any, alpha: float = 0.1, temperature: float = 1.0, attention_mask: Tensor | None = None
    ):
        super().__init__(amateur, attention_mask=attention_mask)
        self.alpha = check_float("alpha", alpha, gt=0, maximum=1)
        self.temperature = check_float("temperature", temperature, gt=0)

    def combine(self, target: Tensor, *others: Tensor) -> Tensor:
        """Divide by the amateur where the target finds a token likely [rows, V]."""
        (amateur,) = others
        return contrast(target, (amateur / self.temperature).log_softmax(-1), self.alpha)


class ProxyTuningLogitsProcessor(AuxiliaryModelLogitsProcessor):
    """Proxy-tuning: apply the change that tuning made in a small model to a large one.

    Examples:
        >>> tuned, untuned = model, model  # small ones
        >>> proxy = ProxyTuningLogitsProcessor(tuned, untuned)
        >>> text = model.generate(ids, do_sample=False, max_new_tokens=2, logits_processor=[proxy])

        log p + alpha (log p_expert - log p_anti_expert), renormalised

    Args:
        expert: the small model after tuning.
        anti_expert: the same model before.
        alpha: how far to move; the paper takes 1.
        attention_mask: see `AuxiliaryModelLogitsProcessor`.

    Source: Liu et al. 2024, "Tuning Language Models by Proxy", arXiv 2401.08565, section 2.
    """

    def __init__(self, expert: Any, anti_expert: Any, alpha: float = 1.0, attention_mask: Tensor | None = None):
        super().__init__(expert, anti_expert, attention_mask=attention_mask)
        self.alpha = check_float("alpha", alpha)

    def combine(self, target: Tensor, *others: Tensor) -> Tensor:
        """Add the small model's change [rows, V]."""
        expert, anti_expert = others
        return proxy(target, expert, anti_expert, self.alpha)


class GuidanceLogitsProcessor(AuxiliaryModelLogitsProcessor):
    """Classifier-free guidance, right under beams: move away from the distribution after another prompt.

    Examples:
        >>> guided = GuidanceLogitsProcessor(model, 1.5, ids)
        >>> text = model.generate(ids, do_sample=False, max_new_tokens=2, logits_processor=[guided])

        log q + scale (log p - log q), renormalised,    q: the same continuation after the negative prompt

    Args:
        model: the model that generates.
        guidance_scale: 1 changes nothing; larger follows the prompt more closely.
        prompt_ids: [prompts, columns], the `input_ids` of the call to `generate`.
        negative_prompt_ids: [prompts or 1, any], read instead of the prompt; None takes its last token.
        negative_attention_mask: of the negative prompts; None as in `AuxiliaryModelLogitsProcessor`.

    Raises:
        TypeError: prompts are no tensors of token ids.
        ValueError: it is called on other prompts than it was made for.

    Source: Sanchez et al. 2023, "Stay on topic with Classifier-Free Guidance", arXiv 2306.17806, section 2.
    transformers' own `guidance_scale=` keeps the negative branch by call order, which mixes up rows under beams.
    """

    def __init__(
        self,
        model: Any,
        guidance_scale: float,
        prompt_ids: Tensor,
        negative_prompt_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
    ):
        super().__init__(model, attention_mask=negative_attention_mask)
        self.guidance_scale = check_float("guidance_scale", guidance_scale)
        for name, ids in (("prompt_ids", prompt_ids), ("negative_prompt_ids", negative_prompt_ids)):
            if not torch.is_tensor(ids) and (ids is not None or name == "prompt_ids"):
                raise TypeError(f"{name} must be a tensor of token ids [prompts, columns], got {type(ids).__name__}")
        _check_token_ids(prompt_ids)
        negative = prompt_ids[:, -1:] if negative_prompt_ids is None else negative_prompt_ids
        _check_token_ids(negative)
        if len(negative) not in (1, len(prompt_ids)):
            raise ValueError(
                f"negative_prompt_ids must have 1 row or one for each of the {len(prompt_ids)} prompts, got "
                f"{len(negative)}"
            )
        self.prompt_ids, self.negative_prompt_ids = prompt_ids, negative

    def context(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the negative prompts with the continuation of `input_ids`, and their mask."""
        columns = self.prompt_ids.shape[1]
        prompts, negative = self.prompt_ids.to(input_ids.device), self.negative_prompt_ids.to(input_ids.device)
        if len(input_ids) % len(prompts) or not torch.equal(input_ids[:, :columns], _repeated(prompts, len(input_ids))):
            raise ValueError("prompt_ids are not what generate() continues: make a processor for these prompts")
        continuation = input_ids[:, columns:]
        return super().context(torch.cat([_repeated(negative, len(input_ids)), continuation], dim=1))

    def combine(self, target: Tensor, *others: Tensor) -> Tensor:
        """Move away from the unconditional distribution [rows, V]."""
        (unconditional,) = others
        return guidance(target, unconditional, self.guidance_scale)


def _all_log_probs(model: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return log-probabilities [texts, length, V], fp32, of the token after each one."""
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes the losses: call .eval() on it")
    ids, mask = input_ids.to(model.device), mask.to(model.device)
    options = {"position_ids": positions_of(mask)} if "position_ids" in parameters_of(unwrapped(model)) else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    return torch.log_softmax(logits.float(), -1)


def _check_vocabulary(size: int, scores: Tensor) -> None:
    if size != scores.shape[-1]:
        raise ValueError(
            f"the auxiliary model gives {size} logits and the target {scores.shape[-1]}: they must share one "
            "vocabulary; resize_token_embeddings() evens out padding of the same tokenizer's"
        )


def _extended_mask(mask: Tensor, input_ids: Tensor) -> Tensor:
    """Return the prompts' mask, a row for each of their beams or returns, with ones for generated tokens."""
    rows, columns = input_ids.shape
    if mask.ndim != 2 or rows % len(mask) or mask.shape[1] > columns:
        raise ValueError(
            f"attention_mask {list(mask.shape)} does not fit input_ids {[rows, columns]}: it must be [prompts, prompt "
            "columns] of the call to generate(); set processor.attention_mask for another batch"
        )
    prompt = _repeated(mask.long(), rows)
    return torch.cat([prompt, prompt.new_ones(rows, columns - mask.shape[1])], dim=1)


def _repeated(prompts: Tensor, rows: int) -> Tensor:
    # [prompts, columns] -> [rows, columns]: the rows of one prompt stand together
    return prompts.repeat_interleave(rows // len(prompts), dim=0)


def _check_text_only(model: Any, input_ids: Tensor) -> None:
    """Raise ValueError if the text has placeholders of images or sounds, which the auxiliary model does not get."""
    config = unwrapped(model).config
    for name in _PLACEHOLDERS:
        token = getattr(config, name, None)
        if token is not None and bool((input_ids == token).any()):
            raise ValueError(
                f"input_ids hold the placeholder {token} ({name}), and an auxiliary model is given ids alone, no "
                "pixels or sounds: it would read the placeholder as text; take prompts without them"
            )


def _check_token_ids(input_ids: Tensor) -> None:
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids must be [rows, columns], got shape {list(input_ids.shape)}: continuous batching "
            "(generate_batch() and serving) mixes the rows of requests and cannot run an auxiliary model: use "
            "generate()"
        )
    if input_ids.shape[1] == 0:
        raise ValueError(
            "there are no input_ids to read: the auxiliary model needs the prompt as token ids, not as inputs_embeds"
        )
