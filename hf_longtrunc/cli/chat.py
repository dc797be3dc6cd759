"""`hf-longtrunc chat`: a conversation without end, at constant memory, and about texts of any length."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer import Option

from hf_longtrunc.cli import common
from hf_longtrunc.cli.conversation import Conversation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hf_longtrunc import LMInfinite, TextIndex

HELP = {
    "/file PATH": "a text to talk about. One that half the window holds is read whole with your next message; of a "
    "longer one each message reads the passage that stands out for it, until /reset",
    "/sampler NAME [X]": "eta 0.002, epsilon 0.0009, top-n-sigma 1, p-less, top-h 0.4, min-k 3, xtc 0.5, dry 0.8, "
    "bat 0.002, top-p 0.9, min-p 0.05, plain, greedy",
    "/save PATH": "write the conversation as JSON lines",
    "/reset": "forget the conversation",
    "/status": "tokens seen, cache, speed",
    "/quit": "or Ctrl-D. Ctrl-C ends a reply or the reading of a message: its start stays",
}


def chat(
    model: common.Model = None,
    dtype: common.DType = None,
    device: common.Device = None,
    window: common.Window = None,
    sinks: common.Sinks = 16,
    blocks: Annotated[bool, Option("--blocks", help="Keep everything, attend to its best blocks; grows.")] = False,
    sampler: Annotated[str, Option(help='Such as "top-p 0.9" or greedy; /help lists them.')] = "eta 0.002",
    system: Annotated[str | None, Option(help="System prompt, in the model's chat template.")] = None,
    max_new_tokens: Annotated[
        int | None, Option(min=1, max=2**31 - 1, help="Tokens of a reply; no limit if left out.")
    ] = None,
    status_every: Annotated[
        int | None, Option(min=1, help="Print tokens, cache and speed every so many tokens.")
    ] = None,
    seed: Annotated[int, Option(help="Random seed for sampling.")] = 0,
) -> None:
    """Talk with a model without end: LM-Infinite keeps the memory constant. Lines of standard input are messages.

    Replies go to stdout, everything else to stderr. /help lists the commands.
    Without --blocks the model sees the first tokens and the last window of the conversation.
    """
    processors_of(sampler, None)  # raises before the model is loaded
    import torch

    loaded: Any
    loaded, tokenizer = common.load(model, dtype, device, needs="a causal LM")
    torch.manual_seed(seed)
    conversation = Conversation(loaded, tokenizer, system, technique_of(loaded, tokenizer, window, sinks, blocks))
    try:
        session = ChatSession(conversation, sampler, max_new_tokens, status_every)
        if sys.stdin.isatty():
            common.notes().print("[dim]/help lists the commands; Ctrl-C ends a reply, Ctrl-D the conversation[/dim]")
        for line in lines():
            if not session.handle(line):
                break
    finally:
        conversation.handle.detach()


def technique_of(model: Any, tokenizer: Any, window: int | None, sinks: int, blocks: bool) -> LMInfinite:
    """Return LM-Infinite, with the blocks that a message points at if they are asked for."""
    from hf_longtrunc import LMInfinite, TopBlocks, trained_length

    if not blocks:
        return LMInfinite(num_sink_tokens=sinks, window_length=window)
    quarter = window or max(1, trained_length(model.config) // 4)
    return LMInfinite(num_sink_tokens=sinks, window_length=quarter, retrieval=TopBlocks.for_chat(tokenizer))


def lines() -> Iterator[str]:
    """Yield the messages that a user types, with history and pasted lines in one message, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    session: PromptSession[str] = PromptSession("> ", output=create_output(sys.stderr))
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def processors_of(text: str, model: Any) -> list[Any] | None:
    """Return the processors of a sampler as the user names it, None for greedy decoding.

    Args:
        text: a name and, for most, a number.
        model: the one that generates; None checks the text only.

    Raises:
        ValueError: no such sampler, or a value that it does not take.
    """
    import transformers

    import hf_longtrunc as ours

    def basis_aware(epsilon: float) -> list[Any]:
        if model is None:
            return [ours.EtaLogitsProcessor(epsilon)]  # refuses the same numbers
        return [ours.BasisAwareLogitsProcessor(ours.SoftmaxBasis.from_model(model), epsilon)]

    name, _, value = text.strip().partition(" ")
    others: dict[str, tuple[float | None, Callable[[Any], list[Any] | None]]] = {
        "bat": (2e-3, basis_aware),
        "top-p": (0.9, lambda p: [transformers.TopPLogitsWarper(p)]),
        "min-p": (0.05, lambda p: [transformers.MinPLogitsWarper(p)]),
        "plain": (None, lambda _: []),
        "greedy": (None, lambda _: None),
    }
    try:
        number = float(value) if value else None
    except ValueError:
        raise ValueError(f"{name} takes a number, got {value}") from None
    if name in others:
        default, make = others[name]
        if value and default is None:
            raise ValueError(f"{name} takes no value, got {value}")
        return make(default if number is None else number)
    known = ours.sampler_names()
    if name.lower().replace("_", "-") not in known:
        raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}; chat also takes {', '.join(others)}")
    return [ours.sampler_by_name(name, number)]


class ChatSession:
    """A chat session: one user's commands, messages and settings."""

    _index: TextIndex | None

    def __init__(self, conversation: Conversation, sampler: str, most: int | None, every: int | None):
        self.conversation, self.most, self.every = conversation, most, every
        self.processors = processors_of(sampler, conversation.model)
        self._file, self._index = "", None
        self._turns: list[tuple[str, str]] = []
        self._speed = 0.0

    def handle(self, line: str) -> bool:
        """Run one line of the user's; return False where it ends the conversation."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/file": self._read, "/sampler": self._choose, "/save": self._save, "/reset": self._reset,
            "/status": lambda rest: self._status(), "/help": lambda rest: common.notes().print(_help()),
        }  # fmt: skip
        if command == "/quit":
            return False
        try:
            if command in commands:
                commands[command](rest.strip())
            elif command.startswith("/") and "\n" not in line:
                raise ValueError(f"no such command: {command}; /help lists them")
            elif line:
                self._answer(line)
        except BrokenPipeError:  # nobody reads any more
            return False
        except KeyboardInterrupt:
            common.notes().print(f"interrupted: {command} did nothing", markup=False)
        except (OSError, TypeError, ValueError, typer.BadParameter) as error:
            common.notes().print(f"{command}: {error}" if command.startswith("/") else str(error), markup=False)
        return True

    def _answer(self, line: str) -> None:
        message = self._message(line)
        with _interrupts() as interrupted:
            is_read = self.conversation.say(message, interrupted, progress=common.is_watched())
            since = time.perf_counter()
            reply = self.conversation.reply(self.processors, interrupted, self.most) if is_read else ()
            for count, piece in enumerate(reply, 1):
                print(piece, end="", flush=True)
                self._speed = count / (time.perf_counter() - since)
                if self.every and count % self.every == 0:
                    if sys.stdout.isatty():
                        print(file=sys.stderr)
                    self._status()
        print(flush=True)
        self._turns.append((line, self.conversation.messages[-1]["content"]))
        unread = f": {self.conversation.unread:,} tokens not read" if self.conversation.unread else ""
        self._status(f" (interrupted{unread})" if interrupted.is_set() else "")

    def _message(self, line: str) -> str:
        """Return the message that the model reads for a line: with a short file, or the best passage of a long one."""
        from hf_longtrunc.asking.answers import NOT_FOUND, find_passages
        from hf_longtrunc.asking.prompt import PROMPT, fill_prompt
        from hf_longtrunc.asking.rerank import Reranker

        if self._file:
            message, self._file = f"{self._file}\n\n{line}", ""
            return message
        if self._index is None:
            return line
        reranker = Reranker(self.conversation.model, self.conversation.tokenizer)
        passages, _ = find_passages(self._index, line, self._turns, reranker=reranker)
        if not passages:
            common.notes().print(f"[dim]({NOT_FOUND})[/dim]")
        return fill_prompt(PROMPT, passages, line)

    def _read(self, path: str) -> None:
        from hf_longtrunc import TextIndex
        from hf_longtrunc.asking.answers import default_finder

        if not path:
            raise ValueError("name a file: /file PATH")
        text = common.read_text(path)
        if self.conversation.fits(text):
            self._file, self._index, self._turns = text, None, []
            common.notes().print(f"{escape(path)}: {len(text):,} characters, read with your next message")
        else:
            index = TextIndex(text, default_finder(), progress=common.is_watched())
            self._file, self._index, self._turns = "", index, []
            common.notes().print(
                f"{escape(path)}: {len(text):,} characters, of which each message reads the best passage, until /reset"
            )

    def _choose(self, name: str) -> None:
        with common.notes().status("making the sampler"):
            self.processors = processors_of(name, self.conversation.model)
        common.notes().print(f"sampling by {escape(name)}")

    def _save(self, path: str) -> None:
        if not path:
            raise ValueError("name a file that does not exist: /save PATH")
        with Path(path).open("x", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(message, ensure_ascii=False)}\n" for message in self.conversation.messages)
        common.notes().print(f"{len(self.conversation.messages)} messages: {escape(path)}")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self._file, self._index, self._turns = "", None, []
        common.notes().print("forgotten")

    def _status(self, note: str = "") -> None:
        seen, held = self.conversation.seen, self.conversation.mebibytes
        kind = "growing" if self.conversation.grows else "constant"
        common.notes().print(
            f"[dim]{seen:,} tokens seen, cache {held:,.2f} MiB ({kind}), {self._speed:.1f} tokens/s{note}[/dim]"
        )


def _help() -> Any:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for command, meaning in HELP.items():
        table.add_row(escape(command), escape(meaning))
    return table


@contextmanager
def _interrupts() -> Iterator[Event]:
    """Let Ctrl-C set an event instead of raising: a forward that was begun is finished, and the cache stays whole."""
    interrupted = Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
