"""lora_perturbed, measured where it runs: right after its base layer has gone through the cache.

The rival does what torch offers: every member's noise is drawn with `normal_` (or `bernoulli_`), the factors are
perturbed, and two `bmm` multiply each member's rows with its own. A second one has the perturbed factors of all members
stored and pays for none of that: the price of drawing anew, against bytes that grow with the population.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from essa_kernels import NoiseKey, lora_perturbed, multi_lora

from .compare import compare
from .shapes import PROJECTIONS

MEMBERS, RANK, SIGMA = 64, 8, 0.01


def draw(shape: tuple[int, ...], distribution: str, dtype: torch.dtype) -> Tensor:
    """Noise of every pair, the odd member's with the other sign."""
    eps = torch.empty(len(range(0, shape[0], 2)), *shape[1:], dtype=dtype)
    eps = eps.normal_() if distribution == "gaussian" else eps.bernoulli_(0.5).mul_(2).sub_(1)
    return torch.stack([eps, -eps], 1).flatten(0, 1)


def perturbed(factor: Tensor, distribution: str) -> Tensor:
    """A factor of every member."""
    return factor + SIGMA * draw((MEMBERS, *factor.shape), distribution, factor.dtype)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rival", ["noise + bmm", "multi_lora, factors stored"])
def test_against_factors_in_memory(benchmark, record, rival, distribution, rows):
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
        h = torch.bmm(x.view(MEMBERS, rows, -1), perturbed(a, distribution).mT)
        y += torch.bmm(h, perturbed(b, distribution).mT).view(y.shape)

    def from_memory(y, x, a, b, site):
        multi_lora(x, *stored[site // 2], ids, y=y)

    what = f"lora_perturbed in situ, {distribution}, bf16 r={RANK}, {MEMBERS} x {rows} rows, 7 projections"
    theirs = materialised
    if rival != "noise + bmm":
        theirs, ids = from_memory, torch.arange(MEMBERS).repeat_interleave(rows)
        stored = [(perturbed(a, distribution), perturbed(b, distribution)) for _, a, b in layers]
    benchmark.pedantic(lambda: run(fused), rounds=3)
    record(compare(what, lambda: run(fused), rival, lambda: run(theirs), rounds=9))
