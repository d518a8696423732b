"""The rule by which results are held to the truth."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_no_worse_than_torch(got: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """The tolerance rule: the largest error may exceed that of torch's own computation in the same dtype by one part
    in 2**20 of the largest true value, plus half a unit in the last place of it for the one rounding of the result."""
    assert got.dtype == torchs.dtype
    assert got.shape == truth.shape
    if not truth.numel():
        return
    largest = truth.abs().max()
    allowed = (torchs.double() - truth).abs().max() + largest * (2**-20 + torch.finfo(got.dtype).eps / 2)
    worst = (got.double() - truth).abs().max()
    assert worst <= allowed, f"error {worst:.3e}, allowed {allowed:.3e}"
