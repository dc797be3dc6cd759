"""Run by a test in a process of its own, since the shape checks of the test-suite cannot be compiled."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters

from hf_longtrunc import LMInfinite

from .tiny_models import tiny_model


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny_model("llama").requires_grad_(False)
    ids = torch.randint(3, 90, (1, 60))
    with LMInfinite(num_sink_tokens=3, window_length=10)(model):
        whole = model(ids).logits
        inputs = {}
        model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
        model(ids[:, :20], **inputs)
        step = torch.compile(model, backend="eager", fullgraph=True)
        parts = [step(ids[:, t : t + 1], **inputs).logits for t in range(20, 60)]
    assert (torch.cat(parts, dim=1) - whole[:, 20:]).abs().max() < 3e-5
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]  # one for fixed and one for moving lengths
    print("compiled")


if __name__ == "__main__":
    main()
