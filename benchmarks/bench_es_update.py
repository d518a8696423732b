"""Full-rank noise on parameters against the same in torch: one seeded draw and one `add_` for every member.

The last benchmark is a whole step of ES at Scale (arXiv 2509.24372) on a 0.5B-shaped model, without the evaluations:
every member's parameters made and taken back, and the update from all.
"""

from __future__ import annotations

import pytest
import torch

from essa_kernels import NoiseKey, es_update_, perturb_

from .compare import compare, timed
from .shapes import qwen_parameters

SIZE = 1 << 22
KEY = NoiseKey(seed=1)
SIGMA = 1e-3


@pytest.mark.parametrize(("draws_per_pair", "rival"), [(2, "per member"), (1, "per pair")])
@pytest.mark.parametrize("members", [32, 256])
def test_gaussian(benchmark, record, members, draws_per_pair, rival):
    """The rival draws for every member, as loops of others do, or folds pairs as we do."""
    t, weights, eps = torch.zeros(SIZE), torch.randn(members), torch.empty(SIZE)
    generator = torch.Generator()

    def with_torch():
        for n in range(members // 2 * draws_per_pair):
            torch.randn(SIZE, generator=generator.manual_seed(n), out=eps)
            t.add_(eps, alpha=0.1)

    benchmark.pedantic(es_update_, (t, KEY, weights), rounds=3)
    what = f"es_update_, {members} members, {SIZE} fp32"
    rounds = 9 if members == 32 else 3
    name = f"seeded randn + add_ {rival}"
    record(compare(what, timed(lambda: es_update_(t, KEY, weights)), name, timed(with_torch), rounds=rounds))


@pytest.mark.parametrize(("draws_per_pair", "rival"), [(2, "per member"), (1, "per pair")])
def test_rademacher(benchmark, record, draws_per_pair, rival, members=32):
    t, weights, eps = torch.zeros(SIZE), torch.randn(members), torch.empty(SIZE)
    generator = torch.Generator()

    def ours():
        es_update_(t, KEY, weights, distribution="rademacher")

    def with_torch():
        """That eps is 0 or 1, not -1 or 1, is left to one subtraction at the end of all."""
        for n in range(members // 2 * draws_per_pair):
            eps.bernoulli_(0.5, generator=generator.manual_seed(n))
            t.add_(eps, alpha=0.2)

    benchmark.pedantic(ours, rounds=3)
    what = f"es_update_, rademacher, {members} members, {SIZE} fp32"
    record(compare(what, timed(ours, 20), f"bernoulli_ + add_ {rival}", timed(with_torch), rounds=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturb(benchmark, record, dtype):
    t = torch.zeros(SIZE, dtype=dtype)
    eps = torch.empty_like(t)

    def with_torch():
        torch.randn(SIZE, out=eps)
        t.add_(eps, alpha=SIGMA)

    benchmark(perturb_, t, KEY, 0, SIGMA)
    what = f"perturb_, {SIZE} {str(dtype).removeprefix('torch.')}"
    record(
        compare(what, timed(lambda: perturb_(t, KEY, 0, SIGMA), 10), "randn + add_", timed(with_torch, 4), rounds=15)
    )


def test_step_of_es_at_scale(benchmark, record, members=4):
    """Ours goes back to a stored copy; the loop that is the rival draws the noise again and drifts."""
    parameters, weights = qwen_parameters(torch.bfloat16), torch.full((members,), 1e-4)
    weights[::2] = 2e-4
    base = [parameter.clone() for parameter in parameters]
    generator = torch.Generator()

    def ours():
        for member in range(members):
            perturb_(parameters, KEY, member, SIGMA)
            torch._foreach_copy_(parameters, base)
        es_update_(parameters, KEY, weights)

    def add_noise(member: int, scale: float):
        generator.manual_seed(member)
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=scale)

    def with_torch():
        for member in range(members):
            add_noise(member, SIGMA)
            add_noise(member, -SIGMA)
        for member, weight in enumerate(weights.tolist()):
            add_noise(member, weight)

    benchmark.pedantic(ours, rounds=1)
    what = f"ES at Scale, a step of {members} members, {sum(p.numel() for p in parameters) / 1e6:.0f} M bf16"
    record(compare(what, timed(ours), "its loop in torch", timed(with_torch), rounds=3))
