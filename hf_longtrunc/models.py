"""What every technique asks of the model that it is given: what PEFT has wrapped, and that it is left as it was."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from collections.abc import Iterator


def without_peft(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, and anything else as it is."""
    is_wrapper = not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model")
    return model.get_base_model() if is_wrapper else model


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into eval mode for the block; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
