"""`hf-longtrunc chat`: a conversation without end, at constant memory, and about texts of any length."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from hf_longtrunc.cli.common import Model, Sinks, Window, is_watched, load, notes, read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from hf_longtrunc import LMInfinite, TextIndex

HELP = {
    "/file PATH": "a text to talk about. One that half the window holds is read whole with your next message; of a "
    "longer one each message reads the passage that stands out for it, until /reset",
    "/sampler NAME [X]": "eta 0.002, epsilon 0.0009, top-n-sigma 1, p-less, top-h 0.4, min-k 3, xtc 0.5, dry 0.8, "
    "bat 0.002, top-p 0.9, min-p 0.05, plain, "
    "greedy",
    "/save PATH": "write the conversation as JSON lines",
    "/reset": "forget the conversation",
    "/status": "tokens seen, cache, speed",
    "/quit": "or Ctrl-D. Ctrl-C ends a reply or the reading of a message: its start stays",
}
_CHUNK = 256  # tokens a forward while reading
_MARK = "longtrunc-reply"


def chat(
    model: Model = None,
    window: Window = None,
    sinks: Sinks = 16,
    blocks: Annotated[
        bool,
        typer.Option("--blocks", help="Keep everything and attend to its best blocks: finds distant facts; grows."),
    ] = False,
    sampler: Annotated[str, typer.Option(help="As /sampler takes it.")] = "eta 0.002",
    system: Annotated[str | None, typer.Option(help="What the model is told first, in its chat template.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a reply; until the model ends it if left out.")
    ] = None,
    status_every: Annotated[int | None, typer.Option(min=1, help="A line on stderr every so many tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Talk with a model without end: LM-Infinite keeps the memory constant. Lines of standard input are messages.

    What the model says goes to stdout, everything else to stderr. /help lists the commands. Without --blocks the model
    sees the first tokens and the last window of the conversation.
    """
    processors_of(sampler, None)  # a wrong name is told before the model is loaded
    import torch

    loaded: Any
    loaded, tokenizer = load(model, needs="a causal LM")
    torch.manual_seed(seed)
    conversation = Conversation(loaded, tokenizer, system, technique_of(loaded, tokenizer, window, sinks, blocks))
    try:
        session = ChatSession(conversation, sampler, max_new_tokens, status_every)
        if sys.stdin.isatty():
            notes().print("[dim]/help lists the commands; Ctrl-C ends a reply, Ctrl-D the conversation[/dim]")
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
    """Yield what a user types, with history and pasted lines in one message, or the lines of a pipe."""
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
        model: the one that speaks; None checks the text only.

    Raises:
        ValueError: no such sampler, or a value that it does not take.
    """
    import transformers

    import hf_longtrunc as ours

    name, _, value = text.strip().partition(" ")
    others: dict[str, tuple[float | None, Callable[[float], list[Any] | None]]] = {
        "bat": (2e-3, lambda epsilon: [_basis_aware(epsilon, model)]),
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
        return make((default or 0.0) if number is None else number)
    try:
        return [ours.sampler_by_name(name, number)]
    except ValueError as error:
        unknown = "name must be one of "
        if not str(error).startswith(unknown):
            raise
        known = str(error).removeprefix(unknown).rpartition(", got ")[0]
        raise ValueError(f"no such sampler: {name}; there are {known}, {', '.join(others)}") from None


def _basis_aware(epsilon: float, model: Any) -> Any:
    from hf_longtrunc import BasisAwareLogitsProcessor, EtaLogitsProcessor, SoftmaxBasis

    plain = EtaLogitsProcessor(epsilon)  # takes the same numbers
    return plain if model is None else BasisAwareLogitsProcessor(SoftmaxBasis.from_model(model), epsilon)


class Conversation:
    """What a model has read and written so far, in its cache; every token is fed to it once.

    A reply that is ended early stays in the cache as far as it was written, a message as far as it was read.

    Args:
        model: the one that speaks.
        tokenizer: of it.
        system: what it is told first.
        technique: how it reads.

    Attributes:
        handle: of the technique that is attached: `detach()` it at the end.
        unread: tokens of the last message that were not read.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None, technique: LMInfinite):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.grows = technique.retrieval is not None
        self.handle = technique.attach(model)
        stops = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
        self._stops = {each for stop in stops for each in (stop if isinstance(stop, list) else [stop])} - {None}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.messages: list[dict[str, str]] = []
        self.unread = 0
        self._cache: Any = None
        self._fed: list[Tensor] = []  # every token that was read, for samplers that look back
        self._logits: Any = None

    def fits(self, text: str) -> bool:
        """Whether half of the window holds a text, so that it is still there when the reply ends."""
        resolved: Any = self.handle.resolved
        length = len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return bool(2 * length <= resolved.window_length)

    @property
    def seen(self) -> int:
        """How many tokens the model has read and written."""
        return 0 if self._cache is None else int(self._cache.get_seq_length())

    @property
    def mebibytes(self) -> float:
        """What the cache holds."""
        from hf_longtrunc.evaluation import cache_bytes

        return 0.0 if self._cache is None else cache_bytes(self._cache) / 2**20

    def say(self, text: str, should_stop: Event, *, progress: bool = False) -> bool:
        """Let the model read a user's message; return whether it came to its end.

        Otherwise `messages` has the part that was read, and an empty reply.
        """
        import torch
        from tqdm.auto import tqdm

        prompt = self._turn(text)
        self.messages.append({"role": "user", "content": text})
        begins = self._cache is None and not self._has_template
        read = self.tokenizer(prompt, add_special_tokens=begins, return_tensors="pt", verbose=False)
        ids = read.input_ids
        self.unread = ids.shape[1]
        with tqdm(
            total=self.unread, desc="reading", unit=" tokens", delay=0.5, leave=False, disable=not progress
        ) as bar:
            # The last piece is a whole one: what it ends with is what retrieval chooses by.
            for part in torch.split(ids.to(self.model.device), _sizes(ids.shape[1]), dim=1):
                if should_stop.is_set():
                    self._keep_what_was_read(prompt, text, read)
                    return False
                self._feed(part)
                self.unread -= part.shape[1]
                bar.update(part.shape[1])
        return True

    def _keep_what_was_read(self, prompt: str, text: str, read: Any) -> None:
        count = read.input_ids.shape[1] - self.unread
        if not count:
            self.messages.pop()
            self.unread = 0
            return
        if read.is_fast:
            span = read.token_to_chars(count - 1)
            end = 0 if span is None else span.end
        else:
            end = len(self.tokenizer.decode(read.input_ids[0, :count]))
        begin = prompt.rfind(text.strip())
        self.messages[-1]["content"] = prompt[begin : max(begin, end)][: len(text)]
        self.messages.append({"role": "assistant", "content": ""})

    def reply(self, processors: list[Any] | None, should_stop: Event, most: int | None = None) -> Iterator[str]:
        """Yield what the model answers, a token's text at a time, until it ends, `most` tokens or `should_stop`."""
        from hf_longtrunc.pieces import pieces

        self.messages.append({"role": "assistant", "content": ""})
        for piece in pieces(self.tokenizer, self._tokens(processors, should_stop, most)):
            self.messages[-1]["content"] += piece
            yield piece

    def _tokens(self, processors: list[Any] | None, should_stop: Event, most: int | None) -> Iterator[int]:
        import torch

        count = 0
        while not should_stop.is_set() and (most is None or count < most):
            scores = self._logits[:, -1].float()
            if processors is None:
                token = scores.argmax(-1, keepdim=True)
            else:
                for processor in processors:
                    scores = processor(torch.cat(self._fed, dim=1), scores)
                token = torch.multinomial(scores.softmax(-1), 1)
            if int(token) in self._stops:
                return
            self._feed(token)
            count += 1
            yield int(token)

    def _feed(self, ids: Tensor) -> None:
        import torch

        from hf_longtrunc.evaluation import start_stream
        from hf_longtrunc.models import CACHE, parameters_of

        if self._cache is None:
            self._cache, self._logits = start_stream(self.model, ids)
            self._fed = [ids]
            return
        self._fed.append(ids)
        last = {"logits_to_keep": 1} if "logits_to_keep" in parameters_of(self.model) else {}
        with torch.no_grad():
            output = self.model(input_ids=ids, use_cache=True, **{CACHE: self._cache}, **last)
        self._logits = output.logits

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _turn(self, text: str) -> str:
        """Return the prompt text between the last token that was fed and the reply to `text`."""
        before = self.messages if self._cache is None else []
        if not self._has_template:
            return "".join([*(message["content"] for message in before), text])
        user = {"role": "user", "content": text}
        if self._cache is None:
            first = [] if self.system is None else [{"role": "system", "content": self.system}]
            return str(self._rendered([*first, *before, user]))
        # The template's text between a reply and the next one does not depend on the messages.
        marked = [{"role": role, "content": _MARK} for role in ("user", "assistant")]
        parts = self._rendered([*marked, user]).split(_MARK, 2)
        if len(parts) < 3:
            raise ValueError("the chat template does not repeat messages unchanged: take another model, or /reset")
        return parts[1] + parts[2] if self.unread else parts[2]

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error


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
        """Do what a line says; False where it ends the conversation."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/file": self._read, "/sampler": self._choose, "/save": self._save, "/reset": self._reset,
            "/status": lambda rest: self._status(), "/help": lambda rest: notes().print(_help()),
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
        except (OSError, TypeError, ValueError, typer.BadParameter) as error:
            notes().print(f"{command}: {error}" if command.startswith("/") else str(error), markup=False)
        return True

    def _answer(self, line: str) -> None:
        message = self._message(line)
        with _interrupts() as interrupted:
            is_read = self.conversation.say(message, interrupted, progress=is_watched())
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

        if self._file:
            message, self._file = f"{self._file}\n\n{line}", ""
            return message
        if self._index is None:
            return line
        passages, _ = find_passages(self._index, line, self._turns)
        if not passages:
            notes().print(f"[dim]({NOT_FOUND})[/dim]")
        return fill_prompt(PROMPT, passages, line)

    def _read(self, path: str) -> None:
        from hf_longtrunc import TextIndex
        from hf_longtrunc.asking.answers import default_finder

        if not path:
            raise ValueError("name a file: /file PATH")
        text = read_text(path)
        self._file, self._index, self._turns = "", None, []
        if self.conversation.fits(text):
            self._file = text
            notes().print(f"{escape(path)}: {len(text):,} characters, read with your next message")
        else:
            self._index = TextIndex(text, default_finder(), progress=is_watched())
            notes().print(
                f"{escape(path)}: {len(text):,} characters, of which each message reads the best passage, until /reset"
            )

    def _choose(self, name: str) -> None:
        with notes().status("making the sampler"):
            self.processors = processors_of(name, self.conversation.model)
        notes().print(f"sampling by {escape(name)}")

    def _save(self, path: str) -> None:
        if not path:
            raise ValueError("name a file that does not exist: /save PATH")
        with Path(path).open("x", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(message, ensure_ascii=False)}\n" for message in self.conversation.messages)
        notes().print(f"{len(self.conversation.messages)} messages: {escape(path)}")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self._file, self._index, self._turns = "", None, []
        notes().print("forgotten")

    def _status(self, note: str = "") -> None:
        seen, held = self.conversation.seen, self.conversation.mebibytes
        kind = "growing" if self.conversation.grows else "constant"
        notes().print(
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
    if current_thread() is not main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _sizes(length: int) -> list[int]:
    whole, rest = divmod(length, _CHUNK)
    return [*([rest] if rest else []), *[_CHUNK] * whole]
