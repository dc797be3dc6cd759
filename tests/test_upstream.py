"""What this package takes for granted in transformers, one test each: a release that ends it is named here first.

The tests of the rooms fail as well then, in many places; these say what happened and where the answer belongs.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_longtrunc
from hf_longtrunc.models import CACHE, cache_of

INSTALLED = Version(version("transformers"))
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def test_the_cache_has_one_name_in_calls_and_outputs(tiny_model):
    """5.24 renamed it, and takes the old name until 5.40. The next name belongs into `models.CACHE`."""
    assert (CACHE == "cache") == (Version("5.24") <= INSTALLED)
    for forward in (tiny_model.forward, tiny_model.model.forward, tiny_model.prepare_inputs_for_generation):
        assert CACHE in inspect.signature(forward).parameters
    given = DynamicCache()
    assert cache_of(tiny_model(IDS, use_cache=True, **{CACHE: given})) is given
    assert cache_of(tiny_model.generate(IDS, max_new_tokens=1, return_dict_in_generate=True)).get_seq_length() == 5
    assert cache_of(tiny_model(IDS, use_cache=False)) is None


def test_nothing_here_says_the_old_name():
    """It ends with 5.40; `models.py` alone knows both, and a docstring tells users of the older releases."""
    package = Path(hf_longtrunc.__file__).parent
    saying = {path.name for path in package.rglob("*.py") if "past_key_values" in path.read_text(encoding="utf-8")}
    assert saying == {"models.py", "streaming.py"}


def test_positions_that_start_again_are_read_as_documents(tiny_model):
    """Best-fit packing stands on it. Upstream may end it; the collator then hands over boundaries."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = tiny_model(IDS, position_ids=positions, use_cache=False).logits
    alone = [tiny_model(part, use_cache=False).logits for part in (IDS[:, :3], IDS[:, 3:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=0)


def test_positions_that_jump_beside_a_mask_are_not(tiny_model):
    """CREAM stands on it."""
    jumping, mask = torch.tensor([[0, 1, 2, 30, 31]]), torch.ones_like(IDS)
    whole = tiny_model(IDS, position_ids=jumping, attention_mask=mask, use_cache=False).logits
    cut = tiny_model(IDS[:, 3:], position_ids=jumping[:, 3:], use_cache=False).logits
    assert (whole[:, 3:] - cut).abs().max() > 1e-2


@pytest.mark.parametrize("door", ["_get_logits_processor", "_prepare_cache_for_generation"])
def test_a_private_door_of_generate_is_there(door):
    """attach_processors replaces the first on an instance, LMInfinite the second: neither has a public counterpart."""
    assert callable(getattr(GenerationMixin, door))


def test_attention_and_masks_are_looked_up_by_name():
    """LMInfinite registers both under a name of its own: a name without a mask function would drop the padding."""
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        assert "sdpa" in registry.valid_keys()
        assert callable(registry.register)
