"""Sentence vectors of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModel, AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@torch.no_grad()
def sentence_vectors(encoder: str | None, texts: Sequence[str], batch_size: int) -> Tensor:
    """Return the mean of each text's token states, normalised, [texts, width]; None takes all-MiniLM-L6-v2."""
    if encoder is None:
        from all_minilm_l6_v2 import get_model_path

        encoder = str(get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    vectors = []
    for first in track(range(0, len(texts), batch_size), "sentence vectors", console=Console(stderr=True)):
        batch = tokenizer(list(texts[first : first + batch_size]), padding=True, truncation=True, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        vectors.append(torch.nn.functional.normalize((states * mask).sum(1), dim=1))
    return torch.cat(vectors)
