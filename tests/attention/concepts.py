"""How many of our own classes and frames run: for one decoded token, a prompt and an attach, under LM-Infinite.

    python -m tests.attention.concepts

Frames are the most that stand in one another at any time; a class is live where a frame holds an instance of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_longtrunc
from hf_longtrunc import LMInfinite
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_PACKAGE = str(Path(hf_longtrunc.__file__).parent)


def counted(run: Callable[[], object]) -> tuple[list[str], set[str]]:
    """Return the own frames that stand in one another at the deepest point of `run`, and the classes that it holds.

    A class is counted where one of its instances is a local variable of an own frame.
    """
    deepest: list[str] = []
    classes: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal deepest
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(_PACKAGE):
            return
        kinds = (type(value) for value in frame.f_locals.values())
        classes.update(kind.__name__ for kind in kinds if kind.__module__.startswith("hf_longtrunc"))
        stack, at = [], frame
        while at is not None:
            if at.f_code.co_filename.startswith(_PACKAGE):
                stack.append(f"{Path(at.f_code.co_filename).stem}.{at.f_code.co_name}")
            at = at.f_back  # type: ignore[assignment]
        deepest = max(deepest, stack[::-1], key=len)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return deepest, classes


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    prompt = torch.arange(3, 15)[None]
    attach, _ = counted(lambda: LMInfinite(num_sink_tokens=2, window_length=6).attach(model))
    inputs: dict[str, Any] = {}
    model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
    with torch.no_grad():
        read, _ = counted(lambda: model(prompt, **inputs))
        model(prompt[:, :1], **inputs)
        decode, classes = counted(lambda: model(prompt[:, :1], **{CACHE: inputs[CACHE]}))
    for name, stack in (("decode", decode), ("prompt", read), ("attach", attach)):
        print(f"own frames, {name}: {len(stack)}: {' > '.join(stack)}")
    print(f"own classes live for one token: {len(classes)}: {', '.join(sorted(classes))}")


if __name__ == "__main__":
    main()
