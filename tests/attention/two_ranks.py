"""Run by `tests.launch` on two ranks: LM-Infinite under tensor parallelism, DDP and FSDP2."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_longtrunc import LMInfinite, TopBlocks, TopK
from hf_longtrunc.models import CACHE

S, L = 3, 10
PLAIN = LMInfinite(num_sink_tokens=S, window_length=L)
TOP_K = LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=3, distance=4, first_layer=0))
TOP_BLOCKS = LMInfinite(
    num_sink_tokens=S,
    window_length=L,
    retrieval=TopBlocks(blocks=2, block_size=4, distance=4, first_layer=0, voting_rows=3, rows=5),
)
CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
)  # fmt: skip


def logits_of(technique: LMInfinite, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt, of a token decoded, and of a turn behind it."""
    with torch.no_grad(), technique(model):
        inputs: dict = {}
        model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
        parts = [model(part, **{CACHE: inputs[CACHE]}).logits for part in ids.split([60, 1, 9], dim=1)]
    return torch.cat(parts, dim=1)


def tensor_parallel(folder: str) -> None:
    ids = torch.randint(3, 90, (2, 70), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    shared = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    for technique in (PLAIN, TOP_K, TOP_BLOCKS):
        expected, got = logits_of(technique, whole, ids), logits_of(technique, shared, ids)
        assert (got - expected).abs().max() < 1e-4, (technique, float((got - expected).abs().max()))


def ddp(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    with PLAIN(model):
        model(ids, labels=ids).loss.backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    wrapper = torch.nn.parallel.DistributedDataParallel(model)
    mine = ids[dist.get_rank() : dist.get_rank() + 1]
    with PLAIN(wrapper):
        wrapper(mine, labels=mine).loss.backward()
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        assert (weight.grad - gradient).abs().max() < 1e-9


def fully_shard(folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad(), PLAIN(model):
        expected = model(ids).logits
    handle = PLAIN.attach(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() < 1e-5
    handle.detach()
    with pytest.raises(ValueError, match="before fully_shard"):
        PLAIN.attach(model)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, saved = dist.get_rank(), str(folder / "model")
    if rank == 0:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(saved)
    dist.barrier()
    checks = (tensor_parallel, ddp, fully_shard)
    for check in checks:
        check(saved)
        dist.barrier()
    dist.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps([check.__name__ for check in checks]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
