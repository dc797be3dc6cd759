"""The graphs of compiled decoding, counted: `python -m tests.attention.compiled_decode 1000`, for so many tokens.

A test runs it in a process of its own, since the shape checks of the test-suite cannot be compiled.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc import LMInfinite

from .tiny_models import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

S, L = 3, 10
GREEDY: dict[str, Any] = {"do_sample": False, "suppress_tokens": [0]}


class Graphs:
    """A compiler that compiles nothing, and keeps for each graph how many numbers it takes beside tensors."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.numbers.append(sum(isinstance(value, (int, torch.SymInt)) for value in inputs))
        return graph.forward


def steps(model: PreTrainedModel, tokens: int) -> Graphs:
    """Decode one by one, as it is and compiled: to the bit the same."""
    graphs, ids, answers = Graphs(), torch.randint(3, 90, (1, 6 + tokens)), []
    with LMInfinite(num_sink_tokens=S, window_length=L)(model) as handle:
        for _ in range(2):
            inputs: dict[str, Any] = {}
            model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
            model(ids[:, :6], **inputs)
            answers.append(torch.cat([model(ids[:, t : t + 1], **inputs).logits for t in range(6, 6 + tokens)]))
            handle.compile(backend=graphs, fullgraph=True, dynamic=False)
    assert torch.equal(*answers)
    return graphs


def generations(model: PreTrainedModel) -> tuple[Graphs, int]:
    """Generate from prompts of several lengths and paddings; return the graphs and how many the first two took."""
    prompts = [torch.randint(3, 90, (2, n)) for n in (15, 21, 18, 30)]
    masks = [torch.ones_like(ids) for ids in prompts]
    masks[1][0, :4] = masks[3][1, :7] = 0
    with LMInfinite(num_sink_tokens=S, window_length=L)(model) as handle:

        def answers() -> list[torch.Tensor]:
            return [
                model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
                for ids, mask in zip(prompts, masks, strict=True)
            ]

        plain, graphs = answers(), Graphs()
        handle.compile(backend=graphs, fullgraph=True, dynamic=False)
        first = [model.generate(prompts[i], attention_mask=masks[i], max_new_tokens=6, **GREEDY) for i in (0, 1)]
        assert all(map(torch.equal, first, plain))
        taken = len(graphs.numbers)
        assert all(map(torch.equal, answers(), plain))
    return graphs, taken


def is_continued_outside(model: PreTrainedModel) -> bool:
    """Whether a cache filled under inference mode or autocast goes on, its first step as it is, the next compiled."""
    ids, answers = torch.randint(3, 90, (2, 24)), []
    with LMInfinite(num_sink_tokens=S, window_length=L)(model) as handle:
        for _ in range(2):
            for filling in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
                inputs: dict[str, Any] = {}
                model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
                with filling:
                    model(ids[:, :20], **inputs)
                answers.append(torch.cat([model(ids[:, t : t + 1], **inputs).logits for t in range(20, 24)]))
            handle.compile(backend=Graphs(), fullgraph=True)
    return torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokens = tiny_model("llama", num_hidden_layers=1).requires_grad_(False), int(sys.argv[1])
    graphs = steps(model, tokens)
    print(f"{tokens} tokens: {len(graphs.numbers)} graphs, numbers that they take: {sum(graphs.numbers)}")
    graphs, taken = generations(model)
    print(f"generate: {taken} graphs, {len(graphs.numbers) - taken} later, numbers: {sum(graphs.numbers)}")
    print(f"caches from elsewhere go on: {is_continued_outside(model)}")


if __name__ == "__main__":
    main()
