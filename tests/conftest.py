"""What every test shares: strict warnings, shape-checked pure files, tiny models, the real one where it is cached."""

from __future__ import annotations

import builtins
import logging
import os
import sys
from pathlib import Path

import beartype
import hypothesis
import jaxtyping
import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

# The package names jaxtyping's types for readers and mypy only. Here they become real, so that beartype holds every
# call of a pure file to its declared shapes and dtypes. It must happen before the first import of those files.
PYPROJECT = tomllib.loads(Path(__file__, "../../pyproject.toml").resolve().read_text())
CONTRACTS = {contract["name"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
PURE_FILES = CONTRACTS["pure files know tensors, not transformers"]["source_modules"]
PURE_FILES.remove("hf_longtrunc.sampling.dry")  # a request's settings, which it checks in words of its own
PURE_FILES.remove("hf_longtrunc.attention.flex")  # traced by torch with tensors that stand for others
for shape_type in ("Bool", "Float", "Int", "UInt8"):
    setattr(builtins, shape_type, getattr(jaxtyping, shape_type))
# The hook takes a checker by name; this one takes an int for a float, as Python's type checkers do.
beartype.with_numeric_tower = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook(PURE_FILES, "beartype.with_numeric_tower")

from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from hf_longtrunc.pretrained import cached_model_folder, load_pretrained  # noqa: E402

torch.set_num_threads(1)
# A busy machine is slow, not wrong. The gate draws the same examples every time, so that it fails for a change and
# never by chance; HYPOTHESIS_PROFILE=thorough draws ten times as many, new ones each time.
for profile, examples in (("gate", 40), ("thorough", 400)):
    hypothesis.settings.register_profile(
        profile,
        deadline=None,
        derandomize=profile == "gate",
        max_examples=examples,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


def pytest_collection_modifyitems(items):
    """Coverage follows the first case of every test: tracing costs half of a test's time again, and further cases run
    the same lines."""
    seen = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in seen:
            item.add_marker(pytest.mark.no_cover)
        seen.add(name)


class _Deprecations(logging.Handler):
    """Collects what transformers logs about its own future: today's notice is the next release's failure."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower() or "will be removed" in message.lower():
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_transformers_deprecations(request):
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    excused = [mark.args[0] for mark in request.node.iter_markers("transformers_own_deprecation")]
    messages = [message for message in handler.messages if not any(part in message for part in excused)]
    assert not messages, f"transformers deprecates something that we use: {messages}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    is_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)  # a test that leaves gradients off fails, and no other one
    assert is_on, "gradients are off after this test: use `with torch.no_grad():`, which restores them"


@pytest.fixture(autouse=True)
def no_figures_left():
    """Plots stay open for their caller; matplotlib warns of the twenty-first, in whichever test draws it."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def tiny_config(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.4,  # spread logits: a tiny model that is not nearly uniform
    }
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture
def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4)
    config.eos_token_id = config.bos_token_id = None
    config.pad_token_id = 0
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M-Instruct; the default run fetches nothing."""
    if not cached_model_folder().exists():
        pytest.skip("the real model was never fetched: run `hf-longtrunc demo` once")
    return load_pretrained(device="cpu")


@pytest.fixture(scope="session")
def real_tokenizer(real_model) -> AutoTokenizer:
    return real_model[1]
