"""The stores of the texts that are being read: built once a text, and freed with its encoder states."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from torch import Tensor

    from hf_longtrunc.cross_attention.datastore import Store


class Texts(NamedTuple):
    """A batch of texts that can be searched."""

    mask: Tensor  # [rows, 1, 1, n], true where a state is searched
    stores: list[Store]  # one a row
    version: int  # of the states' memory; each write in place changes it


class KnownTexts:
    """Texts by the tensor that holds their states.

    Several generations, in several threads or in turns, each find their own text. An entry does not keep its states
    alive: `generate()` holds them until it returns or raises, and then the entry goes too.

    Args:
        build: makes a store of states [n, width].
    """

    def __init__(self, build: Callable[[Tensor], Store]):
        self._build = build
        self._known: MutableMapping[Tensor, Texts] = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget all texts."""
        self._known.clear()

    def of(self, states: Tensor, mask: Tensor) -> Texts:
        """Return the texts that `states` [rows, n, width] hold, without gradients, built if they are not known.

        A text is built again if its mask [rows, 1, 1, n] has changed or its states were overwritten.
        """
        known = self._known.get(states)
        version = 0 if states.is_inference() else states._version
        if known is not None and known.version == version and _is_same(known.mask, mask):
            return known
        # Views of the states themselves would keep them alive, and so this entry.
        found = self._known[states] = Texts(mask, self.built(states.detach(), mask), version)
        return found

    def built(self, states: Tensor, mask: Tensor) -> list[Store]:
        """Return new stores, one a row, through which gradients flow to `states`."""
        return [self._build(text) for text in texts_in(states, mask)]


def texts_in(states: Tensor, mask: Tensor) -> list[Tensor]:
    """Return each row's real states [n, width], without padding and holes: views where there are no holes."""
    texts = []
    for row, span in enumerate(real_spans(mask[:, 0, 0], states.shape[1])):
        real = mask[row, 0, 0, span]
        texts.append(states[row, span] if real.all() else states[row, span][real])
    return texts


def real_spans(mask: Tensor, length: int) -> list[slice]:
    """Return where each row's text lies, from its first to its last real token, by its mask [rows, length]."""
    if mask.ndim != 2 or mask.shape[1] != length:
        raise ValueError(
            f"attention_mask must have a number per token, [rows, {length}], got shape {tuple(mask.shape)}: "
            "Unlimiformer cuts it into windows"
        )
    spans = []
    for row, real in enumerate(mask.bool()):
        places = real.nonzero()
        if not len(places):
            raise ValueError(f"attention_mask has no real token in row {row}: leave that row out")
        spans.append(slice(int(places[0]), int(places[-1]) + 1))
    return spans


def _is_same(mask: Tensor, other: Tensor) -> bool:
    return mask is other or (mask.shape == other.shape and bool((mask == other).all()))
