r"""Key retrieval: which keys outside sinks and window a query sees in addition.

For a query at position i the *distant* keys are S <= j <= i - L. Each is scored as if it stood at one constant distance
D_k, <R(D_k) q, k> with k un-rotated, so that its place in the text does not matter. Selected keys join the softmax of
window and sinks with that score. There are two ways to select:

- `TopK`: each head and row takes its k best keys.
- `TopBlocks`: the rows of a question run twice. In the scoring pass the later layers report how much
  attention each head would give to each block of keys, in one softmax over window, sinks and distant keys. The blocks
  are selected from these scores, and in the second pass all heads and layers see them. Single heads' favourites cannot
  crowd the softmax, and it matters little how many keys there are to select from. For a row that has distant keys, the
  part of the window beyond D_k can be selected too, S <= j <= i - D_k: such a key may be seen twice, at its own
  distance and at D_k. Each selected key counts for several.

A third way is one more subclass of `Retrieval`.

Source: Han et al. 2024, "LM-Infinite", arXiv 2308.16137: top-k with k = 5, D_k half the trained length, for the last
row of a forward. Deviations: any number of rows may read; blocks are our own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hf_longtrunc.arguments import NamedSettings, check_choice, check_float, check_int
from hf_longtrunc.attention.block_scores import (
    BlockScores,
    DistantKeys,
    Selection,
    block_keys,
    block_scores,
    select_blocks,
    top_k,
)
from hf_longtrunc.errors import UnsupportedModelError
from hf_longtrunc.templates import template_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from hf_longtrunc.attention.context import DecoderCall
    from hf_longtrunc.attention.kernels import ExtraKeys

STORES = ("device", "cpu")


class Retrieval(NamedSettings, ABC):
    """Settings for reading distant keys: which layers and rows read, which keys, and how a decoder call is run."""

    usage: ClassVar[str] = "give it to a technique, LMInfinite(retrieval={name}(...))"
    distance: int | None
    first_layer: int
    store: str

    @abstractmethod
    def query_rows(self, new: int, is_scoring: bool) -> int:
        """Return how many of the last of `new` rows look at distant keys."""

    @abstractmethod
    def extra_keys(self, distant: DistantKeys, query: Tensor, positions: Tensor, logits: Tensor) -> ExtraKeys | None:
        """Return the extra keys of queries [batch, heads, n, dim] at positions [rows, n].

        `logits` [batch, heads, n, S + m] are those of window and sinks, which the same softmax holds.
        """

    def reads(self, layer: int, is_scoring: bool) -> bool:
        """Return whether that layer looks at distant keys; layers count from 0."""
        return layer >= self.first_layer

    def prefill_chunk(self, chunk: int, new: int) -> int:
        """Return the tokens to read at once of a prompt of `new`, where `generate` was asked to read `chunk`."""
        return chunk

    def for_layers(self, count: int) -> Retrieval:
        """Return the settings for a model of so many layers, with defaults that depend on it."""
        return self

    def check(self, layers: Sequence[int], caches_keys: bool, can_crop: bool) -> None:
        """Raise ValueError if a model cannot be read this way.

        Args:
            layers: which ones have full attention; -1 where a module does not say.
            caches_keys: whether they cache their keys, or what keys are made from.
            can_crop: whether every layer can drop its last tokens, or some carry a state.
        """
        if -1 in layers:
            raise UnsupportedModelError(
                "its attention modules do not say which layer they are, by which layers that read are told apart"
            )
        if max(layers) < self.first_layer:
            raise ValueError(
                f"{type(self).__name__}: first_layer={self.first_layer} leaves no layer that reads: the last "
                f"one of full attention is layer {max(layers)}"
            )

    def run(
        self,
        call: DecoderCall,
        run: Callable[..., Any],
        layers: Callable[[], Sequence[Any]],
        total: Callable[[Tensor], Tensor],
    ) -> object:
        """Run a decoder call and return the decoder's output; `run(call, block_scores)` runs it once.

        `layers` returns the cache layers that hold a selection, and raises ValueError where there are none; `total`
        returns a tensor's sum over the ranks that share the model's heads.
        """
        return run(call, None)


@dataclass(frozen=True, kw_only=True)
class TopK(Retrieval):
    """Each head of the last rows of a forward reads its `k` best distant keys.

    Examples:
        >>> LMInfinite(window_length=512, retrieval=TopK(k=16)).retrieval.k
        16

    Args:
        k: keys a head and row; 5 in the paper.
        distance: D_k, at which every distant key is scored and seen; None takes half the window, as the paper.
        first_layer: the first layer that reads; 4 to 6 in the paper.
        rows: how many of the last rows of each forward read: of a whole prompt, of each chunk of a prompt that comes in
            chunks, of every decoded token its own. 1 is the paper's setting, None lets every row read.
        store: where the whole text's keys and values are kept: on the model's "device", or on the "cpu" (pinned memory
            for CUDA), where they are searched too, so that only selected keys are transferred.

    Cost: O(n) memory; a reading row costs O(n) time in each layer.
    """

    k: int = 64
    distance: int | None = None
    first_layer: int = 4
    rows: int | None = 64
    store: str = "device"

    def __post_init__(self) -> None:
        _check_fields(self, k=1, distance=1, first_layer=0, rows=1)

    def query_rows(self, new: int, is_scoring: bool) -> int:
        """Return how many of the last of `new` rows look at distant keys."""
        return new if self.rows is None else self.rows

    def extra_keys(self, distant: DistantKeys, query: Tensor, positions: Tensor, logits: Tensor) -> ExtraKeys | None:
        """Return the k best keys of each head and row."""
        distance = self.distance or max(1, distant.window // 2)
        return top_k(query, positions, distant._replace(distance=distance), self.k)


@dataclass(frozen=True, kw_only=True)
class TopBlocks(Retrieval):
    """All heads and layers read the same few blocks of distant keys, those that the later layers attend to most.

    A forward of at least `voting_rows` tokens (a prompt, a turn of a chat, a chunk of a prompt) scores the blocks with
    its last `voting_rows` rows, and runs its last `rows` a second time with the selected ones; decoded tokens go on
    reading that selection. Shorter forwards keep the selection there is. Needs the cache that `generate` builds.

    Examples:
        >>> TopBlocks(blocks=4, block_size=64).blocks
        4

    Args:
        blocks: how many.
        block_size: tokens a block, counted from the end of the sinks.
        distance: D_k; None takes a quarter of the window. Keys farther away than that, in the window too, can be
            selected, and are scored and seen as if they stood there.
        emphasis: how many keys each selected key counts for in the softmax; 1 leaves it at its score.
        first_layer: the first layer that reads.
        first_voting_layer: the first layer that scores; None takes two fifths of the model's layers (12 of 30), and
            never less than `first_layer`. Lower layers attend to salient tokens, whatever the question is.
        voting_rows: how many of a forward's last rows score. In our runs recall fell when more rows scored.
        question_rows: how many of the last rows may belong to a question, whatever follows it. They score in stretches
            of `voting_rows`, and for each block the stretch with the largest score counts. None: `voting_rows`.
        rows: how many of a forward's last rows read: `voting_rows` to 64, as many as the ring can take back. The whole
            question should be among them.
        opening_ids: the tokens that open a user's turn. Rows before the last ones do not score. `for_chat` finds them.
        ending_ids: the tokens that follow a question, a chat template's `<|im_end|> <|im_start|> assistant`. They do
            not score. A row of the batch without them asks nothing, and gets no blocks; a forward of such rows alone,
            part of a text or a draft of several tokens, leaves the selection as it is. Up to 64 tokens may follow them
            in the same forward, as drafts do in assisted decoding. Empty: every forward that is long enough asks.
        contrast_rows: how many rows before the scoring ones give a baseline. Blocks are then ranked by attention
            relative to it (see `select_blocks`) and emphasised by that much, the best by `emphasis` at most; blocks
            below `least_contrast` are ignored. 0 ranks by the total attention of all heads.
        least_contrast: see `contrast_rows`.
        margin: keys on either side of a block that are read with it, so that no number is cut in two.
        store: as for `TopK`.

    Cost: O(n) memory; `rows` rows more and O(n) time a selection; a decoded token costs blocks * block_size keys more.
    """

    blocks: int = 8
    block_size: int = 64
    distance: int | None = None
    emphasis: float = 4.0
    first_layer: int = 4
    first_voting_layer: int | None = None
    voting_rows: int = 8
    question_rows: int | None = None
    rows: int = 16
    opening_ids: tuple[int, ...] = ()
    ending_ids: tuple[int, ...] = ()
    contrast_rows: int = 0
    least_contrast: float = 1.5
    margin: int = 0
    store: str = "device"

    def __post_init__(self) -> None:
        least = {"blocks": 1, "block_size": 1, "distance": 1, "first_layer": 0, "first_voting_layer": 0}
        _check_fields(self, **least, voting_rows=1, question_rows=1, contrast_rows=0, margin=0)
        for name in ("emphasis", "least_contrast"):
            object.__setattr__(self, name, check_float(f"TopBlocks: {name}", getattr(self, name), gt=0))
        rows = check_int("TopBlocks: rows", self.rows, minimum=1)
        if not self.voting_rows <= rows <= 64:
            raise ValueError(
                f"TopBlocks: rows must lie between voting_rows and 64, as many as the cache can take back, got "
                f"rows={rows}, voting_rows={self.voting_rows}"
            )
        object.__setattr__(self, "rows", rows)
        for name in ("opening_ids", "ending_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, Iterable):
                raise TypeError(f"TopBlocks: {name} must be token ids, got {ids!r}")
            object.__setattr__(self, name, tuple(check_int(f"TopBlocks: {name}", token, minimum=0) for token in ids))

    @classmethod
    def for_chat(cls, tokenizer: Any, **options: Any) -> TopBlocks:
        """Return the settings for questions that end in a tokenizer's chat template, changed by `options`.

        The tokens that the template puts after a question do not score, and a forward without them asks nothing. The
        last user turn scores, up to 64 rows of it, in stretches of eight rows and against a baseline of the rows
        before. Up to four blocks of a contrast of 3 are read with a margin of 16 keys by the last 64 rows, each key
        counting for up to eight.

        Raises:
            TypeError: it is no tokenizer, or `options` holds what TopBlocks does not take.
        """
        if not callable(getattr(tokenizer, "apply_chat_template", None)):
            raise TypeError(
                "TopBlocks.for_chat takes the model's tokenizer, whose chat template it reads, got "
                f"{type(tokenizer).__name__}"
            )
        opening, ending = chat_ids(tokenizer)
        chat = {"opening_ids": opening, "ending_ids": ending, "question_rows": 64, "contrast_rows": 64, "rows": 64}
        return cls(**{**chat, "blocks": 4, "emphasis": 8.0, "least_contrast": 3.0, "margin": 16, **options})

    def query_rows(self, new: int, is_scoring: bool) -> int:
        """Return how many of the last rows look at distant keys: those that score, or those that read."""
        return len(self.ending_ids) + self.max_question_rows + self.contrast_rows if is_scoring else self.rows

    @property
    def max_question_rows(self) -> int:
        """How many of the last rows may score."""
        return max(self.voting_rows, self.question_rows or 0)

    def prefill_chunk(self, chunk: int, new: int) -> int:
        """Return a size of at most `chunk`, such that the last chunk holds all rows that score, read or are a baseline.

        Raises:
            ValueError: there is none.
        """
        needed = min(new, max(self.rows, self.query_rows(new, is_scoring=True)))
        for size in range(min(chunk, new), needed - 1, -1):
            if (new - 1) % size + 1 >= needed:
                return size
        raise ValueError(
            f"prefill_chunk_size={chunk} cuts the question of a prompt of {new} tokens, of which TopBlocks needs the "
            f"last {needed} in one chunk: take more, or leave it out"
        )

    def for_layers(self, count: int) -> TopBlocks:
        """Return the settings with the first layer that scores."""
        if self.first_voting_layer is not None:
            return self
        return replace(self, first_voting_layer=max(self.first_layer, 2 * count // 5))

    def reads(self, layer: int, is_scoring: bool) -> bool:
        """Return whether that layer scores, or reads."""
        return layer >= ((self.first_voting_layer or 0) if is_scoring else self.first_layer)

    def check(self, layers: Sequence[int], caches_keys: bool, can_crop: bool) -> None:
        """Refuse a model without a layer that reads or scores, one that caches no keys, and one with states."""
        super().check(layers, caches_keys, can_crop)
        if not can_crop:
            raise ValueError(
                "TopBlocks runs the end of a question twice, and the recurrent or convolutional layers of this model "
                "carry a state that cannot go back to before it: take TopK"
            )
        if not caches_keys:
            raise ValueError(
                "its cache holds what keys are made from (multi-head latent attention), and TopBlocks searches "
                "keys that are cached: take TopK"
            )
        if not self.reads(max(layers), is_scoring=True):
            raise ValueError(
                f"TopBlocks: first_voting_layer={self.first_voting_layer} leaves no layer that scores: the last one "
                f"of full attention is layer {max(layers)}"
            )

    def run(
        self,
        call: DecoderCall,
        run: Callable[..., Any],
        layers: Callable[[], Sequence[Any]],
        total: Callable[[Tensor], Tensor],
    ) -> object:
        """Run the call, select from its last rows' scores, take the last rows back and run them with the selection."""
        if call.new == 1:
            return run(call, None)
        behind = call.tokens_after(self.ending_ids)
        asks = None if behind is None else behind >= 0
        if asks is not None and not bool(asks.any()):
            return run(call, None)
        drafts = 0 if behind is None or asks is None else int(behind[asks].min())
        if drafts:  # of assisted decoding, which come in the same forward as the question
            first = self.run(call.part(0, call.new - drafts), run, layers, total)
            return _append_rows(first, run(call.part(call.new - drafts, call.new), None))
        held = layers()
        if call.new < self.voting_rows + len(self.ending_ids) and held[0].selection is not None:
            return run(call, None)
        call.refuse_hidden_states()
        turn = call.tokens_after(self.opening_ids, within=len(self.ending_ids) + self.max_question_rows)
        collected = BlockScores(turn)
        first = run(call, collected)
        selection = self.select(collected, total)
        if asks is not None:  # a row that asks nothing reads nothing
            selection = selection._replace(indices=selection.indices.masked_fill(~asks.cpu()[:, None], -1))
        rows = min(self.rows, call.new)
        call.cache.crop(-rows)
        for layer in held:
            layer.selection = selection.map(lambda x: x.to(first[0].device))
        again = run(call.part(call.new - rows, call.new), None)
        return _append_rows(first, again, dropped=rows)

    def select(self, collected: BlockScores, total: Callable[[Tensor], Tensor]) -> Selection:
        """Select blocks by the scores of all layers."""
        scores = torch.cat(list(collected.layers.values()), dim=1)  # the heads of all layers
        by_row = scores[..., :-1] / scores[..., -1:].clamp_min(1)
        stretches, baseline = by_row[:, :, :-1], by_row[:, :, -1]
        return select_blocks(stretches, baseline, self.blocks, self.emphasis, self.least_contrast, total)

    def extra_keys(self, distant: DistantKeys, query: Tensor, positions: Tensor, logits: Tensor) -> ExtraKeys | None:
        """Score the blocks during a scoring pass, and return the selected blocks' keys otherwise."""
        collected, selection, window = distant.block_scores, distant.selection, distant.window
        distance, first_query = self.distance or max(1, window // 4), window + distant.num_sink_tokens
        distant = distant._replace(distance=distance, window=min(distance, window), first_query=first_query)
        if collected is not None:
            last = distant.text.positions[..., -1:].to(positions.device)
            groups = self.groups(positions, last, collected)
            scores = block_scores(query, positions, distant, logits.logsumexp(-1), self.block_size, groups)
            self.collect(collected, distant.layer, scores, groups)
            return None
        if selection is None:
            return None
        return block_keys(query, positions, distant, selection, self.block_size, self.margin)

    def groups(self, positions: Tensor, last: Tensor, collected: BlockScores) -> Tensor:
        """Return which of the last rows belong to each stretch of the question, and to the baseline before it.

        From the rows' positions [rows, n] and the last token's [rows, 1] to [stretches + 1, rows or batch, n]; padding
        belongs to none.
        """
        back = last - len(self.ending_ids) - positions  # 0: the last row of the question
        asks = (back >= 0) & (back < self.max_question_rows)
        if collected.turn is not None:
            turn = collected.turn.to(back.device)[:, None]
            asks = asks & ((turn < 0) | (back < turn - len(self.ending_ids)))
        count = -(-self.max_question_rows // self.voting_rows)
        stretches = [asks & (back // self.voting_rows == number) for number in range(count)]
        return torch.stack([*stretches, (back >= 0) & ~asks]) & (positions >= 0)

    def collect(self, collected: BlockScores, layer: int, scores: Tensor, groups: Tensor) -> None:
        """Add a layer's scores [batch, heads, groups, blocks] to those of its rows before, with the number of rows."""
        counted = groups.sum(-1).T[:, None, :, None].expand(*scores.shape[:3], 1)
        part = torch.cat([scores, counted.to(scores)], dim=-1).cpu()
        held = collected.layers.get(layer)
        collected.layers[layer] = part if held is None else held + part


def _append_rows(first: Any, second: Any, dropped: int = 0) -> Any:
    """Return `second` with the hidden states of `first`, without its last `dropped` rows, before its own."""
    hidden = torch.cat([first[0][:, : first[0].shape[1] - dropped], second[0]], dim=1)
    if isinstance(second, tuple):
        return hidden, *second[1:]
    second["last_hidden_state"] = hidden
    return second


def chat_ids(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens with which a chat template opens a user's turn, and those between it and the answer.

    None without a template, and no opening where first and later turns begin differently.
    """
    if not getattr(tokenizer, "chat_template", None):
        return (), ()
    marks = ("<<question>>", "<<answer>>", "<<another>>")
    chat = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)]
    first, ending = template_parts(tokenizer, chat[:1], marks[0])
    later = template_parts(tokenizer, chat, *marks)[2]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(later), strict=False))
    opening = "".join(letter for letter, _ in same)[::-1].strip()
    before, after = (tuple(tokenizer(part, add_special_tokens=False).input_ids) for part in (opening, ending))
    return before, after


def _check_fields(strategy: Any, **least: int) -> None:
    """Store a strategy's counts as plain ints of at least `least`, or None if typed so; check its store."""
    owner, optional = type(strategy).__name__, {each.name for each in fields(strategy) if "None" in str(each.type)}
    for name, bound in least.items():
        value = getattr(strategy, name)
        if value is not None or name not in optional:
            object.__setattr__(strategy, name, check_int(f"{owner}: {name}", value, minimum=bound))
    check_choice(f"{owner}: store", strategy.store, STORES)
