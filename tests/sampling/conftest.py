"""What the tests of the samplers share: the basis of the real model, made once."""

from __future__ import annotations

import pytest

from hf_longtrunc import SoftmaxBasis


@pytest.fixture(scope="session")
def real_basis(real_model) -> SoftmaxBasis:
    return SoftmaxBasis.from_model(real_model[0])
