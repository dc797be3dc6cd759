r"""Reading the middle: which of the keys that neither window nor sinks hold a query gets to see all the same.

For a query at position i the *middle* is S <= j <= i - L. Every key of it is scored as if it stood at one constant
distance D_k, <R(D_k) q, k> with k un-rotated, so that its place in the text says nothing. Those that are chosen join
the softmax of window and sinks with that score. Two ways to choose:

- `TopK`: each head and row takes its k best keys.
- `TopBlocks`: a few rows at the end of a question are run twice. The first time the later layers say how much
  attention each head would pay to each block, in one softmax over window, sinks and middle; the sum decides, and the
  second time all heads and layers see the same few blocks. High-scoring keys that only one head likes cannot crowd the
  softmax, and it matters little how many keys there are to choose from. For a row that has a middle, the part of the
  window beyond D_k can be chosen with it, S <= j <= i - D_k: a key there may be seen twice, at its own distance and
  at D_k. Each chosen key counts for several.

A third way is one more `Retrieval`: it says which layers read, what a query reads, and how a forward is run.

Sources: Han et al. 2024, "LM-Infinite", arXiv 2308.16137: top-k with k = 5, D_k half the trained length,
for the last row of a forward. Deviations: any number of rows may read; blocks are ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch

from hf_longtrunc.arguments import number, one_of, whole
from hf_longtrunc.attention.middle import Choice, Sight, block_mass, choose_blocks, read_blocks, top_k
from hf_longtrunc.templates import template_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from hf_longtrunc.attention.lambda_attention import Retrieved, Scoring
    from hf_longtrunc.attention.middle import Middle

STORES = ("device", "cpu")
# The votes of each layer [batch, heads, 2, blocks + 1]: attention to each block by rows that vote and by rows before
# them, and how many rows there were.
Ballot = dict[int, "Tensor"]


class View(NamedTuple):
    """What one layer shows to the rows that read.

    Attributes:
        middle: the text.
        rotate: `rotate(query, steps)` turns queries on by steps [rows, n]; None where nothing turns.
        scoring: of the layer.
        num_sink_tokens: S.
        window: L.
        layer: of the model.
        chosen: what was chosen for each row; None: nothing yet.
        ballot: takes the layer's votes while blocks are being chosen, else None.
    """

    middle: Middle
    rotate: Callable[[Tensor, Tensor], Tensor] | None
    scoring: Scoring
    num_sink_tokens: int
    window: int
    layer: int
    chosen: Choice | None = None
    ballot: Ballot | None = None


@runtime_checkable
class Forward(Protocol):
    """One call of a decoder, as a strategy may run it."""

    @property
    def new(self) -> int:
        """How many tokens the call brings."""

    @property
    def has_middle(self) -> bool:
        """Whether there are tokens that are neither in the window nor sinks."""

    def ends_in(self, ids: Sequence[int]) -> Tensor | None:
        """Return which rows end in these tokens [batch]; None where that is not known or no tokens are named."""

    def archives(self) -> Sequence[Any]:
        """Return every layer's archive; raises ValueError where some layer has none."""

    def run(self, last: int | None = None, ballot: Ballot | None = None) -> Any:
        """Run the decoder on all new tokens or on the `last` of them; `ballot` makes it a vote."""

    def take_back(self, rows: int) -> None:
        """Take the last `rows` tokens out of the cache."""

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks that share the model's heads."""

    def with_first(self, first: Any, output: Any) -> Any:
        """Return the output of the last rows with the hidden states of the rows before, out of a first output."""


class Retrieval(ABC):
    """A way to read the middle: settings of its own, what they mean in a layer, and how a forward is run with them."""

    distance: int | None
    first_layer: int
    store: str

    @abstractmethod
    def seen_at(self, window: int) -> int:
        """Return D_k under a window of that length."""

    @abstractmethod
    def reading_rows(self, new: int, is_vote: bool) -> int:
        """Return how many of the last of `new` rows look at the middle."""

    @abstractmethod
    def read(self, view: View, query: Tensor, positions: Tensor, logits: Tensor) -> Retrieved | None:
        """Return what queries [batch, heads, n, dim] at positions [rows, n] see of the middle.

        `logits` [batch, heads, n, S + m] are those of window and sinks, which the same softmax holds.
        """

    def reads(self, layer: int, is_vote: bool) -> bool:
        """Whether that layer looks at the middle; `layer` is counted from 0."""
        return layer >= self.first_layer

    def for_layers(self, count: int) -> Retrieval:
        """Return the settings for a model of so many layers, with defaults that depend on it."""
        return self

    def check(self, layers: Sequence[int], caches_keys: bool, takes_back: bool) -> None:
        """Refuse a model that this strategy cannot read.

        Args:
            layers: which ones have full attention.
            caches_keys: whether they cache their keys, or what keys are made from.
            takes_back: whether every layer can take tokens back, or some carry a state.

        Raises:
            ValueError: the message says why.
        """
        if max(layers) < self.first_layer:
            raise ValueError(
                f"{type(self).__name__}: first_layer={self.first_layer} leaves no layer that reads: the last "
                f"one of full attention is layer {max(layers)}"
            )

    def is_run_twice(self, forward: Forward) -> bool:
        """Whether `run` does more than to run the forward once."""
        return False

    def run(self, forward: Forward) -> object:
        """Run a forward and return the decoder's output."""
        return forward.run()


@dataclass(frozen=True, kw_only=True)
class TopK(Retrieval):
    """Each head of the last rows of a forward reads its `k` best keys of the middle.

    Args:
        k: keys a head and row; 5 in the paper.
        distance: D_k, at which every key of the middle is scored and seen; None takes half the window, as the paper.
        first_layer: the first layer that reads; 4 to 6 in the paper.
        rows: how many of the last rows of each forward read: of a whole prompt, of each chunk of a prompt that comes in
            chunks, of every decoded token its own. 1 is the paper's setting, None lets every row read.
        store: where the whole text's keys and values are kept: on the model's "device", or on the "cpu" (pinned memory
            for CUDA), where they are searched too, so that only what was chosen travels.

    Cost: O(n) memory; a reading row costs O(n) time in each layer.
    """

    k: int = 64
    distance: int | None = None
    first_layer: int = 4
    rows: int | None = 64
    store: str = "device"

    def __post_init__(self) -> None:
        _check_counts(self, k=1, distance=1, first_layer=0, rows=1)

    def seen_at(self, window: int) -> int:
        """Return D_k under a window of that length."""
        return max(1, window // 2) if self.distance is None else self.distance

    def reading_rows(self, new: int, is_vote: bool) -> int:
        """Return how many of the last of `new` rows look at the middle."""
        return new if self.rows is None else self.rows

    def read(self, view: View, query: Tensor, positions: Tensor, logits: Tensor) -> Retrieved | None:
        """Return the k best keys of each head and row."""
        away = self.seen_at(view.window)
        turned = query if view.rotate is None else view.rotate(query, away - positions)
        return top_k(
            turned, positions, view.middle, self.k, Sight(away, view.num_sink_tokens, view.window, view.scoring)
        )


@dataclass(frozen=True, kw_only=True)
class TopBlocks(Retrieval):
    """All heads and layers read the same few blocks of the middle, those that the later layers attend to most.

    A forward of at least `voting_rows` tokens (a prompt, a turn of a chat, a chunk of a prompt) lets its last
    `voting_rows` rows choose, and runs its last `rows` a second time with what was chosen; what is decoded afterwards
    goes on reading that choice. Shorter forwards keep the choice there is. Needs the cache that `generate` builds.

    Args:
        blocks: how many.
        block_size: tokens a block, counted from the end of the sinks.
        distance: D_k; None takes a quarter of the window. What is farther away than that, in the window too, can be
            chosen, and is scored and seen as if it stood there.
        emphasis: how many keys each chosen key counts for in the softmax; 1 leaves it at its score.
        first_layer: the first layer that reads.
        first_voting_layer: the first layer that has a say; None takes two fifths of the model's layers (12 of 30), and
            never less than `first_layer`. Layers below look at what is salient, not at what is asked.
        voting_rows: how many of a forward's last rows choose. In our runs recall fell when more rows voted.
        rows: how many of a forward's last rows read: `voting_rows` to 64, as many as the ring can take back. The whole
            question should be among them.
        ending_rows: how many of the last rows come behind the question and do not vote: a chat template's
            `<|im_end|> <|im_start|> assistant`. `for_chat` counts them.
        ending_ids: the tokens of these rows. A row of the batch that ends otherwise asks nothing, and gets no blocks;
            a forward of such rows alone, part of a text or a draft of several tokens, leaves the choice as it is.
            Empty: every forward that is long enough asks.
        contrast_rows: how many rows before those that vote say what is attended to anyway. Blocks are then chosen by
            how many times as much attention each head pays them for the rows that vote (see `choose_blocks`), and
            emphasised by that much, the best by `emphasis` at most; those that are worth less than `least_contrast`
            are not read: where nothing is asked, nothing is. 0 chooses by the vote of all heads together.
        least_contrast: see `contrast_rows`.
        margin: keys on either side of a block that are read with it, lest a number be cut in two.
        store: as for `TopK`.

    Cost: O(n) memory; `rows` rows more and O(n) time a choice; a decoded token costs blocks * block_size keys more.
    """

    blocks: int = 8
    block_size: int = 64
    distance: int | None = None
    emphasis: float = 4.0
    first_layer: int = 4
    first_voting_layer: int | None = None
    voting_rows: int = 8
    rows: int = 16
    ending_rows: int = 0
    ending_ids: tuple[int, ...] = ()
    contrast_rows: int = 0
    least_contrast: float = 1.5
    margin: int = 0
    store: str = "device"

    def __post_init__(self) -> None:
        least = {"blocks": 1, "block_size": 1, "distance": 1, "first_layer": 0, "first_voting_layer": 0}
        _check_counts(self, **least, voting_rows=1, ending_rows=0, contrast_rows=0, margin=0)
        for name in ("emphasis", "least_contrast"):
            object.__setattr__(self, name, number(f"TopBlocks: {name}", getattr(self, name), above=0))
        rows = whole("TopBlocks: rows", self.rows, least=1)
        if not self.voting_rows <= rows <= 64:
            raise ValueError(
                f"TopBlocks: rows must lie between voting_rows and 64, as many as the cache can take back, got "
                f"rows={rows}, voting_rows={self.voting_rows}"
            )
        object.__setattr__(self, "rows", rows)
        if not isinstance(self.ending_ids, Iterable):
            raise TypeError(f"TopBlocks: ending_ids must be token ids, as many as ending_rows, got {self.ending_ids!r}")
        ending = tuple(whole("TopBlocks: ending_ids", token, least=0) for token in self.ending_ids)
        object.__setattr__(self, "ending_ids", ending)
        if ending and len(ending) != self.ending_rows:
            raise ValueError(
                f"TopBlocks: ending_ids are the tokens of ending_rows={self.ending_rows} rows, got {len(ending)}"
            )

    @classmethod
    def for_chat(cls, tokenizer: Any, **options: Any) -> TopBlocks:
        """Return the settings for questions that end in a tokenizer's chat template, changed by `options`.

        What the template puts behind a question has no say, and a forward that does not end in it asks nothing. The
        twelve rows before it choose four blocks, in contrast to 64 rows before them; these are read with a margin of
        16 keys by the last 48 rows, each key counting for up to eight.

        Raises:
            TypeError: `options` holds what TopBlocks does not take.
        """
        ending = ids_behind_question(tokenizer)
        chat = {"ending_rows": len(ending), "ending_ids": ending, "contrast_rows": 64, "margin": 16}
        return cls(**{**chat, "voting_rows": 12, "blocks": 4, "emphasis": 8.0, "rows": 48, **options})

    def seen_at(self, window: int) -> int:
        """Return D_k under a window of that length."""
        return max(1, window // 4) if self.distance is None else self.distance

    def votes_from(self, layers: int) -> int:
        """Return the first layer that has a say, in a model of that many."""
        if self.first_voting_layer is None:
            return max(self.first_layer, 2 * layers // 5)
        return self.first_voting_layer

    def reading_rows(self, new: int, is_vote: bool) -> int:
        """Return how many of the last rows look at the middle: those that vote, or those that read."""
        return self.ending_rows + self.voting_rows + self.contrast_rows if is_vote else self.rows

    def for_layers(self, count: int) -> TopBlocks:
        """Return the settings with the first layer that votes."""
        return replace(self, first_voting_layer=self.votes_from(count))

    def reads(self, layer: int, is_vote: bool) -> bool:
        """Whether that layer votes, or reads."""
        return layer >= ((self.first_voting_layer or 0) if is_vote else self.first_layer)

    def check(self, layers: Sequence[int], caches_keys: bool, takes_back: bool) -> None:
        """Refuse a model without a layer that reads or votes, one whose keys are not cached, and one with states."""
        super().check(layers, caches_keys, takes_back)
        if not takes_back:
            raise ValueError(
                "TopBlocks runs the end of a question twice, and the recurrent or convolutional layers of this model "
                "carry a state that cannot go back to before it: take TopK"
            )
        if not caches_keys:
            raise ValueError(
                "its cache holds what keys are made from (multi-head latent attention), and TopBlocks searches "
                "keys that are cached: take TopK"
            )
        if max(layers) < self.votes_from(max(layers) + 1):
            raise ValueError(
                f"TopBlocks: first_voting_layer={self.first_voting_layer} leaves no layer that chooses: the last one "
                f"of full attention is layer {max(layers)}"
            )

    def is_run_twice(self, forward: Forward) -> bool:
        """Whether the forward chooses: a text that has a middle, and a question or no choice yet."""
        if not forward.has_middle:
            return False
        asks = forward.ends_in(self.ending_ids)
        if asks is not None and not bool(asks.any()):
            return False
        archives = forward.archives()
        return forward.new >= self.voting_rows + self.ending_rows or (archives[0].chosen is None and forward.new > 1)

    def run(self, forward: Forward) -> object:
        """Run the forward, let its last rows vote, take the last rows back, and run these with what was chosen."""
        ballot: Ballot = {}
        first = forward.run(ballot=ballot)
        votes = torch.cat(list(ballot.values()), dim=1)  # the heads of all layers
        vote, background = (votes[..., :-1] / votes[..., -1:].clamp_min(1)).unbind(2)
        chosen = choose_blocks(vote, background, self.blocks, self.emphasis, self.least_contrast, forward.total)
        asks = forward.ends_in(self.ending_ids)
        if asks is not None:  # a row that asks nothing reads nothing
            chosen = chosen._replace(blocks=chosen.blocks.masked_fill(~asks.cpu()[:, None], -1))
        rows = min(self.rows, forward.new)
        forward.take_back(rows)
        for archive in forward.archives():
            archive.choose(Choice(*(part.to(first[0].device) for part in chosen)))
        return forward.with_first(first, forward.run(last=rows))

    def read(self, view: View, query: Tensor, positions: Tensor, logits: Tensor) -> Retrieved | None:
        """Vote while blocks are being chosen, and return the chosen blocks' keys otherwise."""
        away, sinks = self.seen_at(view.window), view.num_sink_tokens
        if view.ballot is None and view.chosen is None:
            return None
        turned = query if view.rotate is None else view.rotate(query, away - positions)
        sight = Sight(away, sinks, min(away, view.window), view.scoring, view.window + sinks)
        if view.ballot is not None:
            last = view.middle.positions[..., -1:].to(positions.device)
            groups = self.groups(positions, last)
            votes = block_mass(turned, positions, view.middle, logits.logsumexp(-1), self.block_size, sight, groups)
            self.cast(view.ballot, view.layer, votes, groups)
            return None
        assert view.chosen is not None
        return read_blocks(turned, positions, view.middle, view.chosen, self.block_size, self.margin, sight)

    def groups(self, positions: Tensor, last: Tensor) -> Tensor:
        """Return which of the last rows vote, and which stand before them [2, rows, n]; padding is neither.

        Args:
            positions: of the rows that look at the text [rows, n].
            last: position of the last token [rows, 1].
        """
        voting = (last - self.ending_rows - self.voting_rows < positions) & (positions <= last - self.ending_rows)
        before = ~voting & (positions <= last - self.ending_rows)
        return torch.stack([voting, before]) & (positions >= 0)

    def cast(self, ballot: Ballot, layer: int, votes: Tensor, groups: Tensor) -> None:
        """Add a layer's votes [batch, heads, 2, blocks] to those of its rows before, with how many rows these are."""
        counted = groups.sum(-1).T[:, None, :, None].expand(*votes.shape[:3], 1)
        cast = torch.cat([votes, counted.to(votes)], dim=-1).cpu()
        ballot[layer] = ballot[layer] + cast if layer in ballot else cast


def ids_behind_question(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that a chat template puts behind a user's words up to the answer; none without one."""
    if not getattr(tokenizer, "chat_template", None):
        return ()
    mark = "<<question>>"
    _, behind = template_parts(tokenizer, [{"role": "user", "content": mark}], mark)
    return tuple(tokenizer(behind, add_special_tokens=False).input_ids)


def _check_counts(strategy: Any, **least: int) -> None:
    """Store a strategy's counts as plain ints of at least `least`, None where the default may be; check its store."""
    owner, may_be_none = (
        type(strategy).__name__,
        {"distance", "first_voting_layer", *(["rows"] if "k" in least else [])},
    )
    for name, bound in least.items():
        value = getattr(strategy, name)
        if value is not None or name not in may_be_none:
            object.__setattr__(strategy, name, whole(f"{owner}: {name}", value, least=bound))
    one_of(f"{owner}: store", strategy.store, STORES)
