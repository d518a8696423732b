"""What the tests of ops share."""

from __future__ import annotations

import pytest
import torch

from .oracle import DTYPES


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
