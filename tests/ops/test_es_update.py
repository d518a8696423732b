"""perturb_ and es_update_: the same bits everywhere, float64 truth, lists of tensors, and other people's loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from essa_kernels import NoiseKey, es_update_, gaussian, perturb_, rademacher

from .noise_cases import different_bits

DRAW = {"gaussian": gaussian, "rademacher": rademacher}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = NoiseKey(2**63 + 2026, generation=3, site=4)
SHAPES = [(3, 1000), (1,), (37, 129), (5, 2050), (0, 5), (), (2, 3, 64), (2, 4097), (130, 1), (4, 0)]


@pytest.fixture(params=DRAW)
def distribution(request: pytest.FixtureRequest) -> str:
    return request.param


def parameters(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(shape).to(dtype).to(device) for shape in SHAPES]


def weights(members: int) -> Tensor:
    """Weights of so many members; the second pair's fold to 0."""
    drawn = torch.randn(members)
    drawn[2:4] = 0.75
    return drawn


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype is b.dtype
        assert not different_bits(a.cpu().float(), b.cpu().float()), SHAPES[i]


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree(backend, distribution, dtype, seed):
    name, device = backend
    ts, drawn = parameters(dtype), weights(13)
    updated = es_update_([t.clone() for t in ts], KEY, drawn, distribution=distribution, backend="reference")
    perturbed = perturb_([t.clone() for t in ts], KEY, 7, 0.03, distribution=distribution, backend="reference")
    on_device = [t.to(device) for t in ts]
    got = es_update_([t.clone() for t in on_device], KEY, drawn, distribution=distribution, backend=name)
    assert_same_bits(got, updated)
    got = perturb_([t.clone() for t in on_device], KEY, 7, 0.03, distribution=distribution, backend=name)
    assert_same_bits(got, perturbed)


def test_threads_change_nothing(distribution, seed, native):
    threads, ts, drawn = torch.get_num_threads(), parameters(torch.float32), weights(10)
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(es_update_([t.clone() for t in ts], KEY, drawn, distribution=distribution, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0])
