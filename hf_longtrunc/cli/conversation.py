"""A conversation with a model, of any length, in its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Event

    from torch import Tensor

    from hf_longtrunc import LMInfinite

_CHUNK = 256  # tokens a forward while reading
_MARK = "longtrunc-reply"


class Conversation:
    """A conversation in a model's cache; every token is fed to it once.

    A reply that is ended early stays in the cache as far as it was written, a message as far as it was read.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        system: a system prompt.
        technique: attached to the model until `handle.detach()`.

    Attributes:
        handle: of the attached technique.
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
        """Size of the cache."""
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
            # The last chunk is a whole one: retrieval selects blocks by its end.
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
        """Yield the model's answer, a token's text at a time, until it ends, `most` tokens or `should_stop`."""
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


def _sizes(length: int) -> list[int]:
    whole, rest = divmod(length, _CHUNK)
    return [*([rest] if rest else []), *[_CHUNK] * whole]
