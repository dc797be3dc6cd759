from __future__ import annotations

from tests.command_line import model_folder  # noqa: F401
from tests.evaluation.conftest import prose, tiny_folder, tokenizer, trained_tokenizer  # noqa: F401
