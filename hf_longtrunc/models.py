"""Questions about a model that several subpackages ask: its wrappers, decoder, rotary modules, affine layers."""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The name of the cache of keys and values in forwards, `generate` and their outputs: transformers 5.24 renamed it.
# A call says `model(ids, **{CACHE: cache})`, and `cache_of(output)` reads it.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")  # in any release


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a forward or of `generate`; None where the output carries none."""
    return getattr(output, CACHE, None)


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside PEFT, `torch.compile`, DDP, DataParallel and FSDP wrappers.

    Anything else is returned unchanged. The inner model shares its modules with the wrapper; `attachable` says whether
    hooks on it reach calls of the wrapper.
    """
    return _unwrapping(model)[-1]


def _unwrapping(model: Any) -> list[Any]:
    """Return the wrappers of a model from outside in, and the model inside last."""
    found = [model]
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "module", None), nn.Module):  # DDP and kin
            model = model.module
        else:
            break
        found.append(model)
    return found


def check_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside wrappers; raise TypeError if there is none."""
    inside = unwrapped(model)
    if not isinstance(inside, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model or a wrapper of one, got {type(model).__name__}; load one with "
            "load_pretrained(name)"
        )
    return inside


def attachable(model: Any, technique: str) -> PreTrainedModel:
    """Return the transformers model that `technique` can change.

    A PEFT, DDP, DataParallel or FSDP wrapper calls the modules of the model inside, so that one is returned.

    Raises:
        TypeError: there is no transformers model inside.
        ValueError: the model was compiled. Its graphs are traced without the change, and guards do not watch hooks.
    """
    *wrappers, inside = _unwrapping(model)
    if not isinstance(inside, PreTrainedModel):
        raise TypeError(
            f"{technique}: model must be a transformers model, or a PEFT or DDP wrapper of one, got "
            f"{type(model).__name__}"
        )
    if any(hasattr(wrapper, "_orig_mod") for wrapper in wrappers):
        raise ValueError(
            f"{technique} cannot change a compiled model, because its graphs were made without it: "
            f"attach to the model inside, `model._orig_mod`, and compile that afterwards"
        )
    compiled = [name for name, part in inside.named_modules() if _is_compiled(part)]
    if compiled:
        raise ValueError(
            f"{technique} cannot change a compiled model, because its graphs were made without it: "
            f"{compiled[0] or 'it'} was, in place; load the model again, attach, and compile that afterwards"
        )
    return inside


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


def decoder_of(model: Any) -> Any:
    """Return the decoder of a causal language model: the part without its head, which makes the hidden states.

    Of a multimodal model that is the decoder of its text, also where that lies inside a language model with a head.
    """
    decoder: Any = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        return model.base_model
    head = decoder.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        return decoder
    return next((part for part in decoder.children() if isinstance(part, PreTrainedModel)), decoder)


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """Return the modules that hold rotary frequencies: those with a buffer `inv_freq` or `<layer type>_inv_freq`."""
    return [
        module
        for module in decoder.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def parameters_of(module: Any) -> list[str]:
    """Return the names of the arguments of a module's forward, in order; of its class, whatever wraps the instance."""
    return list(_parameters(type(module).forward))


@functools.lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a method's arguments but the first; cached, as each forward of a patched model asks."""
    return tuple(inspect.signature(function).parameters)[1:]


def bound(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by the names that the module's forward gives them; a cache under its older names too.

    Raises:
        TypeError: the cache comes under two names.
    """
    names = parameters_of(module)
    result = {**dict(zip(names, args, strict=False)), **kwargs}
    for other in {*CACHE_NAMES} - {CACHE}:
        if other in result and CACHE in names and other not in names:
            if result.get(CACHE) is not None:
                raise TypeError(f"the cache was passed as {CACHE} and as {other}: pass it once, as {CACHE}")
            result[CACHE] = result.pop(other)
    return result


def weight_and_bias(layer: Any, width: int, *, differentiable: bool = False) -> tuple[Tensor, Tensor]:
    """Return W [out, width] and b [out] of an affine layer.

    A plain `nn.Linear` is read. Another layer (adapters, quantised or offloaded weights, `Conv1D`) is asked, also one
    that holds its weights in no parameters (torch's own quantised layers):
    b = layer(0), W = layer(I) - b, 512 unit vectors at a time. Both are detached unless `differentiable`: gradients
    then flow through them to the layer's parameters, where they are enabled.
    """
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        weight: Any = getattr(layer, "weight", None)
        # A tensor of another class holds packed numbers, and says that they are floating-point ones.
        is_there = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta and weight.is_floating_point()
        if type(layer) is nn.Linear and is_there:
            bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
        else:
            parameters = list(layer.parameters())
            dtypes = [each.dtype for each in parameters if each.is_floating_point()]  # none where all is quantised
            device = _reachable(parameters[0]) if parameters else torch.device("cpu")
            units = torch.eye(width, dtype=(dtypes or [torch.get_default_dtype()])[0], device=device)
            bias = layer(torch.zeros_like(units[:1]))[0]
            weight = torch.cat([(layer(part) - bias).T for part in torch.split(units, 512)], dim=1)
    return (weight, bias) if differentiable else (weight.detach(), bias.detach())


def _reachable(parameter: Tensor) -> torch.device:
    """Return where a module's inputs may lie: what accelerate offloads is on "meta", and its hooks move inputs."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


def few_tokens(model: Any, most: int) -> Tensor:
    """Return token ids [1, up to 8] on the model's device, none of them 0, which is often padding."""
    weight = model.get_input_embeddings().weight
    device = _reachable(weight)
    return ((7 * torch.arange(min(8, most), device=device) + 3) % len(weight))[None]


def disagreement(before: Tensor, after: Tensor, noise: float = 0.0) -> float | None:
    """Return how far a change moved the states of a few tokens; None if no farther than rounding in their dtype may.

    `noise` is how far the model's own implementations differ, relative to the states: three times that is allowed.
    """
    difference = float((after - before).double().norm())
    tolerance = max(0.1 if before.dtype in (torch.float16, torch.bfloat16) else 1e-3, 3 * noise)
    return None if difference <= tolerance * float(before.double().norm()) else difference


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into eval mode for the block; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def weights_version(model: nn.Module) -> tuple[object, ...]:
    """Return a value that changes with a model's weights: a key for results that were computed with them.

    It holds the address and version of each weight, the active adapters, and the number of optimizer steps. Writes past
    torch's version counters (`parameter.data`) are not noticed. Cost: some microseconds a module, no host
    synchronisation.
    """
    found: list[object] = [*_optimizer_steps()]
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.append(_version(_offloaded(module, name) if tensor.is_meta else tensor))
        state = vars(module)
        if "_disable_adapters" in state:
            found += [str(state.get("_active_adapter")), state["_disable_adapters"], str(module.merged_adapters)]
            found.append(str(state.get("scaling")))
    return tuple(found)


def _version(tensor: Any) -> object:
    if not isinstance(tensor, Tensor):
        return id(tensor)
    return id(tensor), _pointer(tensor), None if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device


def device_hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks that move a module's inputs and weights between devices (`device_map`, offloading)."""
    hook = vars(module).get("_hf_hook")
    kinds = ((each, type(each)) for each in getattr(hook, "hooks", [hook]))
    return [
        each for each, kind in kinds if (kind.__module__, kind.__name__) == ("accelerate.hooks", "AlignDevicesHook")
    ]


def _offloaded(module: nn.Module, name: str) -> Any:
    """Return the weight that accelerate loads for a parameter on "meta"; the store of all weights if it is on disk."""
    for hook in device_hooks(module):
        store = getattr(hook.weights_map, "dataset", hook.weights_map)  # it is a view of one store, with a prefix
        weights = store if isinstance(store, dict) else getattr(store, "state_dict", {})
        return weights.get(getattr(hook.weights_map, "prefix", "") + name, store)
    return None


@functools.cache
def _optimizer_steps() -> list[int]:
    """Count the steps of all optimizers from the first call on: fused ones write past the version counters."""
    steps = [0]

    def count(*_: object) -> None:
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # packed formats that hold several tensors have no storage of their own
        return 0
