"""ULD's assistant: the target's first layers with LoRA; its training data, loss and files."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_longtrunc.arguments import check_float, check_int, check_kind
from hf_longtrunc.extras import missing
from hf_longtrunc.mixing.logit_difference import IGNORED, UNIFORM, forget_retain_loss
from hf_longtrunc.models import check_model, unwrapped
from hf_longtrunc.saving import load_folder, save_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_KIND = "uld_assistant"
# The settings of a target that its assistant depends on.
_SETTINGS = ("model_type", "hidden_size", "vocab_size")


def uld_assistant(
    model: Any, num_layers: int | None = None, *, rank: int = 32, lora_alpha: int | None = None, train_norm: bool = True
) -> PeftModel:
    """Build the assistant of a target: its first layers, final norm and head, frozen and shared, with LoRA to train.

    It shares the target's weights without a copy, until the target moves to another device or dtype. Modules and config
    are its own, so a patch such as `LMInfinite` has to be applied to both.

    Examples:
        >>> assistant = uld_assistant(model, num_layers=1)
        >>> text = model.generate(ids, max_new_tokens=2, logits_processor=[ULDLogitsProcessor(assistant)])

    Args:
        model: a decoder-only transformers model, or a wrapper of one.
        num_layers: how many layers to keep; None takes a quarter, as the paper does (8 of 32).
        rank: of the LoRA matrices on every linear layer but the head.
        lora_alpha: their scale times rank; None takes 2 rank.
        train_norm: train a copy of the final norm too. A small target needs it, since its norm was trained for the last
            layer's hidden states.

    Returns:
        A peft model in eval mode; train it with `ULDLoss` and `ULDCollator`, keep it with `save_uld_assistant`.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: the model is an encoder-decoder, its layers are not one list, or it has fewer than `num_layers`.

    Source: Ji et al. 2024, arXiv 2406.08607, section 3. Deviation: the trained norm.
    """
    peft = _peft()
    rank = check_int("rank", rank, minimum=1)
    model = check_model(model)
    depth = _text_config(model).num_hidden_layers
    short = _first_layers(model, max(1, depth // 4) if num_layers is None else num_layers)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if lora_alpha is None else check_int("lora_alpha", lora_alpha, minimum=1),
        target_modules="all-linear",
        modules_to_save=[_final_norm(short)] if train_norm else None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in short.modules()),
    )
    assistant: PeftModel = peft.get_peft_model(short, config).eval()
    return assistant


def save_uld_assistant(assistant: Any, folder: str | os.PathLike[str]) -> None:
    """Write the trained weights, the number of layers and the target's sizes as a safetensors file.

    Shared weights are not written: `load_uld_assistant` takes them from the target.

    Examples:
        >>> save_uld_assistant(uld_assistant(model, num_layers=1), scratch)
    """
    peft = _peft()
    check_kind("assistant", assistant, peft.PeftModel, "uld_assistant(model) makes one")
    adapter = {name: _plain(value) for name, value in assistant.peft_config[assistant.active_adapter].to_dict().items()}
    trained = peft.get_peft_model_state_dict(assistant, save_embedding_layers=False)
    save_folder(folder, _KIND, trained, {**_settings(assistant.get_base_model()), "adapter": adapter})


def load_uld_assistant(model: Any, folder: str | os.PathLike[str], *, is_trainable: bool = False) -> PeftModel:
    """Load an assistant that `save_uld_assistant` wrote, on the weights of `model`, its target, in eval mode.

    Examples:
        >>> save_uld_assistant(uld_assistant(model, num_layers=1), scratch)
        >>> assistant = load_uld_assistant(model, scratch)

    Raises:
        FileNotFoundError: the folder holds no assistant.
        ValueError: the files are damaged, or the assistant was made for a model of another type, width or vocabulary.
            Other weights of the same shape are not noticed.
    """
    peft = _peft()
    tensors, settings = load_folder(folder, _KIND, {}, (*_SETTINGS, "num_layers", "adapter"))
    target = _settings(model)
    if (made_for := {name: settings[name] for name in _SETTINGS}) != {name: target[name] for name in _SETTINGS}:
        raise ValueError(f"the assistant in {folder} was made for {made_for}, got the target {target}")
    config = peft.PeftConfig.from_peft_type(**settings["adapter"] | {"inference_mode": not is_trainable})
    assistant: PeftModel = peft.get_peft_model(_first_layers(model, settings["num_layers"]), config)
    expected = set(peft.get_peft_model_state_dict(assistant, save_embedding_layers=False))
    if expected != set(tensors):
        raise ValueError(
            f"{folder} holds other tensors than its assistant has: {', '.join(sorted(expected ^ set(tensors)))}; save "
            "it again"
        )
    peft.set_peft_model_state_dict(assistant, tensors)
    assistant.eval()
    return assistant


@dataclass(frozen=True, kw_only=True)
class ULDLoss:
    """The loss of ULD's assistant, for `Trainer(compute_loss_func=ULDLoss())`: know the forget data and nothing else.

    The mean over the supervised tokens of a (possibly accumulated) batch of -log q(token) for forget tokens and
    beta CE(uniform, q) for retain tokens; `ULDCollator` marks them in the labels.

    Examples:
        >>> ULDLoss(beta=0.5)(model(ids), labels=ids).ndim
        0

    Args:
        beta: weight of a retain token, where a forget token has 1.

    Source: Ji et al. 2024, section 3. Deviation: see `forget_retain_loss`.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", check_float("beta", self.beta, minimum=0))

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss, a scalar; `outputs.logits` [rows, length, V], `labels` [rows, length]."""
        return forget_retain_loss(outputs.logits, labels, self.beta, num_items_in_batch)


@dataclass(frozen=True)
class ULDCollator:
    """Collate examples {"prompt": str, "completion": str, "forget": bool} for ULD's assistant.

    Examples:
        >>> batch = ULDCollator(tokenizer)([{"prompt": "ab", "completion": "cd", "forget": False}])
        >>> batch["labels"]
        tensor([[-100, -100,   -1,   -1]])

    The completion's tokens are their own labels if the example is to be forgotten, else -1 (uniform distribution);
    prompt and padding have label -100. Rows are padded on the right, by the EOS where there is no padding token.

    The forget set should hold paraphrases, and the retain set the *forget* questions with wrong answers: otherwise the
    assistant learns the form of the questions and not the facts (Ji et al. 2024).

    Use with `TrainingArguments(remove_unused_columns=False)`.

    Raises:
        TypeError: it is no tokenizer.
        ValueError: one with neither padding token nor EOS; an example without one of the three columns, or with an
            empty completion.
    """

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if not callable(self.tokenizer) or not hasattr(self.tokenizer, "pad_token_id"):
            raise TypeError(f"tokenizer must be a tokenizer, got {type(self.tokenizer).__name__}")
        if self.tokenizer.pad_token_id is None and self.tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer has neither a padding token nor an EOS to pad rows with: set tokenizer.pad_token first"
            )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels, each int64 [examples, longest]."""
        ids, labels = zip(*(self._tokens(example) for example in examples), strict=True)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        mask = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(list(ids), batch_first=True, padding_value=eos if pad is None else pad),
            "attention_mask": pad_sequence(mask, batch_first=True),
            "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED),
        }

    def _tokens(self, example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        missing = [name for name in ("prompt", "completion", "forget") if name not in example]
        if missing:
            raise ValueError(
                f"an example has no {missing[0]!r}, only {sorted(example)}: ULDCollator reads prompt, completion and "
                "forget; under Trainer set remove_unused_columns=False"
            )
        prompt = list(self.tokenizer(example["prompt"]).input_ids)
        completion = list(self.tokenizer(example["completion"], add_special_tokens=False).input_ids)
        if not completion:
            raise ValueError(f"the completion of {example['prompt']!r} is empty: there is nothing to learn")
        supervised = completion if example["forget"] else [UNIFORM] * len(completion)
        return torch.tensor(prompt + completion), torch.tensor([IGNORED] * len(prompt) + supervised)


def _first_layers(model: Any, num_layers: int) -> Any:
    """Return a copy of the model's modules around the same weights, cut to the first `num_layers` layers."""
    config = _text_config(model)
    if config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder: ULD takes a decoder-only language model")
    num_layers = check_int("num_layers", num_layers, minimum=1, maximum=config.num_hidden_layers)
    shared = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    short = copy.deepcopy(model, shared)
    owner, name = _layer_list(short)
    setattr(owner, name, getattr(owner, name)[:num_layers])
    _cut_config(_text_config(short), num_layers)
    return short


def _layer_list(model: Any) -> tuple[nn.Module, str]:
    """Find the module that holds the layers, and their name in it."""
    depth = _text_config(model).num_hidden_layers
    found = [
        (module, name)
        for module in model.base_model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {depth} layers where ULD expects one: build the "
            "assistant yourself, any model with the same vocabulary will do"
        )
    return found[0]


def _cut_config(config: Any, num_layers: int) -> None:
    depth = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:num_layers])  # layer_types and the like: one entry a layer
    config.num_hidden_layers = num_layers


def _final_norm(model: Any) -> str:
    """Return the dotted name of the norm after the layers."""
    owner, _ = _layer_list(model)
    prefix = next(name for name, module in model.named_modules() if module is owner)
    norms = [name for name, child in owner.named_children() if "norm" in type(child).__name__.lower()]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no final norm beside its layers: pass train_norm=False")
    return f"{prefix}.{norms[-1]}"


def _settings(model: Any) -> dict[str, Any]:
    config = _text_config(model)
    return {"num_layers": config.num_hidden_layers, **{name: getattr(config, name) for name in _SETTINGS}}


def _plain(value: Any) -> Any:
    """Return a setting as json can hold it: sets as sorted lists, members of an enumeration as their values."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def _text_config(model: Any) -> Any:
    return unwrapped(model).config.get_text_config(decoder=True)


def _peft() -> ModuleType:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise missing("ULD's assistant", "peft", "train") from error
    return peft
