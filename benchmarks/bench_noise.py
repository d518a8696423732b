"""Noise fills against torch's own: `normal_` and `bernoulli_`."""

from __future__ import annotations

import pytest
import torch

from essa_kernels import NoiseKey, gaussian, rademacher

from .compare import compare, timed

KEY = NoiseKey(seed=1)
SIZES = (1 << 16, 1 << 20, 1 << 22)


@pytest.mark.parametrize("size", SIZES)
def test_gaussian(benchmark, record, size):
    out = torch.empty(size)
    calls = max(4, (1 << 21) // size)
    benchmark(gaussian, (size,), KEY, out=out)
    ours, rival = timed(lambda: gaussian((size,), KEY, out=out), calls), timed(out.normal_, calls)
    record(compare(f"gaussian, {size} values", ours, "torch.Tensor.normal_", rival, rounds=25))


@pytest.mark.parametrize("size", SIZES)
def test_rademacher(benchmark, record, size):
    out = torch.empty(size)
    calls = max(4, (1 << 21) // size)
    benchmark(rademacher, (size,), KEY, out=out)
    ours = timed(lambda: rademacher((size,), KEY, out=out), calls)
    rival = timed(lambda: out.bernoulli_(0.5), calls)
    record(compare(f"rademacher, {size} values", ours, "torch.Tensor.bernoulli_", rival, rounds=15))
