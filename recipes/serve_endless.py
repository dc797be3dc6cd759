"""Exported folders on a real model: every door equals the context manager, and a chat over HTTP goes on without end.

    python recipes/serve_endless.py --text some_novel.txt --out hosts

exports the model twice, under LM-Infinite and dual chunk attention, and asks `generate(custom_generate=)`,
`from_pretrained`, `pipeline`, lm_eval's `HFLM` and `transformers serve` the same prompts, past the window. Then it
talks with the real server through the openai client: a conversation to `--tokens`, its memory and seconds a turn,
edits, four clients at once, and `kill -9`.

Cost: with SmolLM2-135M-Instruct on two busy CPU cores half an hour.
Expect: every line of doors equal, no status other than 200, memory within 2 %, time within 10 %.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, pipeline

from hf_longtrunc import DualChunkAttention, LMInfinite, load_pretrained
from hf_longtrunc.evaluation import append_records
from hf_longtrunc.hosting import export, verify_export
from hf_longtrunc.pretrained import default_model_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVE = "from transformers.cli.transformers import main; main()"
NEW = 8  # tokens of an answer


@dataclass(frozen=True)
class Turn:
    """One turn of the long conversation."""

    turn: int
    tokens: int
    seconds: float
    processor_seconds: float
    peak_mib: float


class Talk:
    """A conversation with a served model, which is sent whole with every turn."""

    def __init__(self, server: Server, stream: bool = False):
        self.server, self.stream = server, stream
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> tuple[float, float, int]:
        """Say something; return the seconds of the turn, those of the server's processor, and the prompt's tokens."""
        self.messages.append({"role": "user", "content": text})
        since, used = time.perf_counter(), self.server.processor_seconds()
        asked: dict[str, Any] = {"model": self.server.folder, "messages": self.messages, "max_tokens": NEW}
        made: Any = self.server.client.chat.completions.create(temperature=0, stream=self.stream, **asked)
        if self.stream:
            parts = list(made)
            answer, usage = "".join(part.choices[0].delta.content or "" for part in parts), parts[-1].usage
        else:
            answer, usage = made.choices[0].message.content, made.usage
        self.messages.append({"role": "assistant", "content": answer})
        return time.perf_counter() - since, self.server.processor_seconds() - used, usage.prompt_tokens


class Server:
    """`transformers serve` in a process of its own."""

    def __init__(self, folder: Path):
        from openai import OpenAI

        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.folder = str(folder)
        words = ["serve", self.folder, "--trust-remote-code", "--device", "cpu", "--port", str(port)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="-", timeout=3600, max_retries=0)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health").close()
                return
            except OSError:
                time.sleep(0.5)
        raise SystemExit("the server did not start")

    def processor_seconds(self) -> float:
        """Return the processor seconds of the process."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_mib(self) -> float:
        """Return the most memory since the last call."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (peak,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return peak / 1024

    def kill(self) -> None:
        """Kill it at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.kill()


def main(
    text: Annotated[Path, typer.Option(help="A long text.")],
    prompts: Annotated[int, typer.Option(help="Prompts a door and technique.")] = 20,
    window: Annotated[int, typer.Option(help="LM-Infinite's; dual chunk attention's trained length.")] = 64,
    tokens: Annotated[int, typer.Option(help="Of the long conversation.")] = 50_000,
    short: Annotated[int, typer.Option(help="Tokens of the conversation that its turns are compared with.")] = 5_000,
    pairs: Annotated[int, typer.Option(help="Turns of either, in turns.")] = 6,
    parts: Annotated[str, typer.Option(help="doors, serve, with commas.")] = "doors,serve",
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("hosts"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    words = text.read_text(encoding="utf-8").split()
    with tempfile.TemporaryDirectory() as scratch:
        techniques = {
            "lm-infinite": LMInfinite(window_length=window),
            "dual-chunk": DualChunkAttention(trained_length=window, chunk_length=3 * window // 4),
        }
        folders = {
            name: export(default_model_folder(), Path(scratch, name), each).folder for name, each in techniques.items()
        }
        if "doors" in parts:
            for name, technique in techniques.items():
                doors(name, technique, folders[name], words, prompts)
        if "serve" in parts:
            conversation(folders["lm-infinite"], techniques["lm-infinite"], words, tokens, short, pairs, out)


def doors(name: str, technique: Any, folder: Path, words: list[str], count: int) -> None:
    """Print how many prompts each door answers as the context manager does."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    plain, tokenizer = load_pretrained(device="cpu")
    texts = [" ".join(words[500 * n : 500 * n + 70 + 3 * n]) for n in range(count)]
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    inputs = [tokenizer(each, return_tensors="pt") for each in texts]
    batch = tokenizer(texts[:4], return_tensors="pt", padding=True)
    chats = [[{"role": "user", "content": each}] for each in texts]
    rendered = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in chats]
    model: Any = plain
    with technique(plain):
        wanted = [model.generate(**each, **settings)[0, each.input_ids.shape[1] :] for each in inputs]
        wanted_batch = model.generate(**batch, **settings)
        asked = [tokenizer(each, add_special_tokens=False, return_tensors="pt") for each in rendered]
        spoken = [model.generate(**each, **settings)[0, each.input_ids.shape[1] :] for each in asked]
    said, answers = (tokenizer.batch_decode(each, skip_special_tokens=True) for each in (wanted, spoken))
    door: dict[str, Any] = {"custom_generate": str(folder), "trust_remote_code": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    pipe: Any = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    harness = HFLM(pretrained=str(folder), trust_remote_code=True, max_length=10**6, device="cpu", batch_size=1)
    until = {"until": ["<none>"], "max_gen_toks": NEW, "do_sample": False}
    found = {
        "generate(custom_generate=)": [
            torch.equal(model.generate(**each, **settings, **door)[0, each.input_ids.shape[1] :], right)
            for each, right in zip(inputs, wanted, strict=True)
        ],
        "from_pretrained, ids by position": [
            torch.equal(loaded.generate(each.input_ids, **settings)[0, each.input_ids.shape[1] :], right)
            for each, right in zip(inputs, wanted, strict=True)
        ],
        "from_pretrained, padded batch of 4": [bool(torch.equal(loaded.generate(**batch, **settings), wanted_batch))],
        "pipeline": [
            pipe(each, return_full_text=False, **settings)[0]["generated_text"] == right
            for each, right in zip(texts, said, strict=True)
        ],
        "lm_eval's HFLM": [
            each == right
            for each, right in zip(
                harness.generate_until(
                    [Instance("generate_until", {}, (each, until), n) for n, each in enumerate(texts)],
                    disable_tqdm=True,
                ),
                said,
                strict=True,
            )
        ],
    }
    with served(folder) as server:
        talks = [Talk(server) for _ in texts]
        for talk, each in zip(talks, texts, strict=True):
            talk.say(each)
        found["transformers serve"] = [
            talk.messages[-1]["content"] == right for talk, right in zip(talks, answers, strict=True)
        ]
    shortest = min(each.input_ids.shape[1] for each in inputs)
    print(f"{name}: prompts of {shortest:,} tokens and more")
    for where, equal in found.items():
        print(f"  {where}: {sum(equal)} of {len(equal)} equal, token for token", flush=True)


def conversation(
    folder: Path, technique: Any, words: list[str], tokens: int, short: int, pairs: int, out: Path
) -> None:
    """Hold a conversation with the server, and print its statuses, memory and time."""
    loaded, tokenizer = load_pretrained(device="cpu")
    model: Any = loaded
    place = iter(range(20_000, len(words), 700))

    def text(length: int) -> str:
        start = next(place)
        return " ".join(words[start : start + length])

    def anew(talk: Talk) -> str:
        """Return the last answer of the context manager, which reads the whole conversation again."""
        ids: Any = tokenizer.apply_chat_template(
            talk.messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with technique(model):
            made = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return str(tokenizer.decode(made, skip_special_tokens=True))

    with served(folder) as server:
        talk_to(server, text, anew, tokens, short, pairs, out)


def talk_to(
    server: Server,
    text: Callable[[int], str],
    anew: Callable[[Talk], str],
    tokens: int,
    short: int,
    pairs: int,
    out: Path,
) -> None:
    long, brief = Talk(server), Talk(server)
    records: list[Turn] = []
    read = 0
    while read < tokens:
        server.peak_mib()
        seconds, used, read = long.say(text(700))
        records.append(Turn(len(records) + 1, read, round(seconds, 3), round(used, 2), round(server.peak_mib(), 1)))
    while brief.say(text(700))[2] < short:
        pass
    peaks = [each.peak_mib for each in records[9:]] or [0.0]
    print(f"{len(records)} turns to {read:,} tokens, every answer with status 200")
    print(
        f"peak memory of turns 10 to {len(records)}: {min(peaks):,.1f} to {max(peaks):,.1f} MiB, "
        f"{100 * (max(peaks) / max(1.0, min(peaks)) - 1):.2f} % apart",
        flush=True,
    )
    both = []
    for _ in range(pairs):
        said = text(250)
        both.append((long.say(said)[:2], brief.say(said)[:2]))
    for what, kind in enumerate(("seconds", "the server's processor seconds")):
        far, near = ([each[side][what] for each in both] for side in (0, 1))
        ratios = [left / right for left, right in zip(far, near, strict=True)]
        print(
            f"{kind} a turn at {read:,} tokens over those at {short:,}, {pairs} pairs: median "
            f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}; medians "
            f"{statistics.median(far):.2f} and {statistics.median(near):.2f} s",
            flush=True,
        )
    append_records(out / "turns.jsonl", records)
    last = brief.messages[:-2]
    edits = []
    for kept, said in ((last, "And what do you make of that?"), (brief.messages[:2], "Tell me more of it.")):
        edited = Talk(server, stream=True)
        edited.messages = list(kept)
        edited.say(said)
        edits.append(anew(edited) == edited.messages[-1]["content"])
    print(f"an edit of the last message, and a return to the second turn, streamed: equal to reading anew: {edits}")
    talks = [Talk(server, stream=number % 2 == 1) for number in range(4)]
    scripts = [[text(100) for _ in range(3)] for _ in talks]

    def speak(number: int) -> list[str]:
        for said in scripts[number]:
            talks[number].say(said)
        return [each["content"] for each in talks[number].messages[1::2]]

    with ThreadPoolExecutor(4) as pool:
        spoken = list(pool.map(speak, range(4)))
    alone = []
    for script in scripts:
        talk = Talk(server)
        for said in script:
            talk.say(said)
        alone.append([each["content"] for each in talk.messages[1::2]])
    same = [left == right for both in zip(spoken, alone, strict=True) for left, right in zip(*both, strict=True)]
    print(
        f"4 clients at once, 3 turns each: {sum(same)} of {len(same)} answers are those that each gets alone",
        flush=True,
    )
    folder = Path(server.folder)
    before = verify_export(folder), {path.name: os.stat(path).st_mtime_ns for path in folder.rglob("*")}
    server.kill()
    after = verify_export(folder), {path.name: os.stat(path).st_mtime_ns for path in folder.rglob("*")}
    with served(folder) as again:
        talk = Talk(again)
        talk.messages = brief.messages[:-2]
        talk.say(brief.messages[-2]["content"])
    print(f"kill -9: the folder is as it was: {before == after}; a new server gives the same answer: "
          f"{talk.messages[-1] == brief.messages[-1]}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
