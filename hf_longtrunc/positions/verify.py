"""A self-test of a model before training with CREAM: it must read positions as relative rotary distances."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from hf_longtrunc.models import attachable, decoder_of, evaluating, unwrapped
from hf_longtrunc.positions.rope_hooks import ROPE_IDS, attach_hooks, is_attached, rotaries_of

_RUN = 8  # tokens of the head and of the tail of the test's row


def verify_positions(model: Any) -> None:
    """Raise if a model ignores CREAM's position ids, or reads them as anything but relative distances.

    Five forwards of 16 tokens, through the same hooks as training. A gap in the ids must change the tail's logits, a
    shift of all ids by a window must not, and other tokens in the head must change the tail's logits across the gap.
    Shifting `position_ids` finds learned positions next to rotary ones.

    Args:
        model: a causal language model or a PEFT, DDP or FSDP wrapper of one, attached to a `CreamCollator` or not; a
            compiled model must be attached. It is left unchanged.

    Raises:
        TypeError: no such model.
        ValueError: no rotary modules (ALiBi, learned positions), prompt or prefix tuning, layers with a sliding window
            or chunks, frequencies that depend on the text's length (rope_type "dynamic", "longrope"), or a failed
            test; the message names the test and its reason.

    Examples:
        >>> verify_positions(model)
    """
    owner: Any = unwrapped(model) if is_attached(model) else attachable(model, "verify_positions")
    decoder = decoder_of(owner)
    _refuse_at_sight(model, owner, decoder)
    with ExitStack() as stack:
        if not is_attached(owner):
            stack.enter_context(attach_hooks(owner))
        stack.enter_context(evaluating(model))
        # Ids are taken in training mode only; dropout, in the modules below, stays off.
        owner.training = decoder.training = True
        _test(model, decoder)


def _refuse_at_sight(model: Any, owner: Any, decoder: Any) -> None:
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            "the model is tuned by virtual tokens (prompt or prefix tuning), which PEFT puts before the text and whose "
            "positions CREAM cannot draw: use LoRA or train all weights"
        )
    rotaries_of(owner)
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or [])
    local = sorted(kinds & {"sliding_attention", "chunked_attention"})
    if local or (not kinds and getattr(config, "sliding_window", None)):
        raise ValueError(
            f"{type(decoder).__name__} has layers that see a window of their own only "
            f"({', '.join(local) or f'sliding_window {config.sliding_window}'}), counted in tokens: CREAM's head, "
            "middle and tail would see each other there, as they never will in a long text"
        )
    sets = [config.rope_parameters, *config.rope_parameters.values()]
    kinds = {values.get("rope_type") for values in sets if isinstance(values, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise ValueError(
            f"the model's rotary frequencies depend on the length of the text (rope_type "
            f"{', '.join(sorted(kinds & {'dynamic', 'longrope'}))}): CREAM trains at those of the long window and "
            "short texts would get others; use extend_context, whose methods are static"
        )


@torch.no_grad()
def _test(model: Any, decoder: Any) -> None:
    name = type(decoder).__name__
    embeddings = decoder.get_input_embeddings().weight
    device, vocabulary = embeddings.device, len(embeddings)
    tokens = (torch.arange(2 * _RUN, device=device)[None] * 7 + 3) % vocabulary
    plain = torch.arange(2 * _RUN, device=device)[None]
    window = int(decoder.config.max_position_embeddings)
    apart = plain + (plain >= _RUN) * (window // 2)

    def tail(tokens: Tensor, ids: Tensor, **extra: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, use_cache=False, **{ROPE_IDS: ids}, **extra).logits
        return logits[:, _RUN:].double()

    # How far rounding alone may move the logits: angles are taken in fp32, and far from 0 they are coarse.
    still = 0.1 if decoder.dtype in (torch.float16, torch.bfloat16) else 0.02
    here = tail(tokens, plain)
    gap = _moved(here, tail(tokens, apart))
    if not gap > 1e-6:
        raise ValueError(
            f"a gap in the positions leaves the logits of {name} as they are (relative change {gap:.1e}): it does not "
            "read the ids, and CREAM would train it as plain text"
        )
    shift = _moved(here, tail(tokens, plain + window))
    if not shift <= still * max(1.0, gap):
        raise ValueError(
            f"a shift of all positions by {window} changes the logits of {name} by {shift:.1e} (relative; a gap: "
            f"{gap:.1e}): its positions are not relative"
        )
    absolute = _moved(here, tail(tokens, plain, position_ids=plain + 1))
    if not absolute <= still * max(1.0, gap):
        raise ValueError(
            f"shifting position_ids by 1 under the same rotation changes the logits of {name} by {absolute:.1e} "
            "(relative): it reads absolute positions beside the rotary ones, which stay short under CREAM"
        )
    other = torch.where(plain < _RUN, (tokens + 1) % vocabulary, tokens)
    across = _moved(tail(tokens, apart), tail(other, apart))
    if not across > 1e-6:
        raise ValueError(
            f"other tokens in the head leave the tail's logits of {name} as they are: it cannot see across a gap"
        )


def _moved(before: Tensor, after: Tensor) -> float:
    """Return the relative change of logits, each token's mean left out."""
    before, after = (logits - logits.mean(-1, keepdim=True) for logits in (before, after))
    return float((after - before).norm() / before.norm())
