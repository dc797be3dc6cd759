"""The tokenizer, the texts and the model of the evaluation's tests."""

from tests.evaluation.conftest import prose, tiny_folder, tokenizer, trained_tokenizer  # noqa: F401
from tests.evaluation.test_ranked import scores  # noqa: F401
