"""lora_perturbed, measured where it runs: right after its base layer has gone through the cache.

The rival does what torch offers: every member's noise is drawn with `normal_` (or `bernoulli_`), the factors are
perturbed, and two `bmm` multiply each member's rows with its own.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from essa_kernels import NoiseKey, lora_perturbed

from .compare import compare
from .shapes import PROJECTIONS

MEMBERS, RANK, SIGMA = 64, 8, 0.01


def draw(shape: tuple[int, ...], distribution: str, dtype: torch.dtype) -> Tensor:
    """Noise of every pair, the odd member's with the other sign."""
    eps = torch.empty(len(range(0, shape[0], 2)), *shape[1:], dtype=dtype)
    eps = eps.normal_() if distribution == "gaussian" else eps.bernoulli_(0.5).mul_(2).sub_(1)
    return torch.stack([eps, -eps], 1).flatten(0, 1)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_against_materialised_noise(benchmark, record, distribution, rows):
    """A decoder layer's seven projections in turn, each base product followed by its delta; only the delta is timed."""
    dtype = torch.bfloat16
    layers = [
        (
            torch.randn(d_out, d_in, dtype=dtype) / d_in**0.5,
            torch.randn(RANK, d_in, dtype=dtype) / d_in**0.5,
            torch.randn(d_out, RANK, dtype=dtype),
        )
        for d_in, d_out in PROJECTIONS
    ]
    inputs = {d_in: torch.randn(MEMBERS * rows, d_in, dtype=dtype) for d_in, _ in PROJECTIONS}
    members, offsets = torch.arange(MEMBERS), torch.arange(MEMBERS + 1) * rows

    def run(delta) -> float:
        seconds = 0.0
        for i, (weight, a, b) in enumerate(layers):
            x = inputs[weight.shape[1]]
            y = F.linear(x, weight)
            start = time.perf_counter()
            delta(y, x, a, b, 2 * i)
            seconds += time.perf_counter() - start
        return seconds

    def fused(y, x, a, b, site):
        lora_perturbed(x, a, b, NoiseKey(1, site=site), SIGMA, members, offsets, distribution=distribution, y=y)

    def materialised(y, x, a, b, site):
        a_of = a + SIGMA * draw((MEMBERS, *a.shape), distribution, dtype)
        b_of = b + SIGMA * draw((MEMBERS, *b.shape), distribution, dtype)
        h = torch.bmm(x.view(MEMBERS, rows, -1), a_of.mT)
        y += torch.bmm(h, b_of.mT).view(y.shape)

    what = f"lora_perturbed in situ, {distribution}, bf16 r={RANK}, {MEMBERS} x {rows} rows, 7 projections"
    benchmark.pedantic(lambda: run(fused), rounds=3)
    record(compare(what, lambda: run(fused), "noise + bmm", lambda: run(materialised), rounds=9))
