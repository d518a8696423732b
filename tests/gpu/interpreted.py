"""The Triton kernels in Triton's interpreter: run by test_interpreter.py in a process with TRITON_INTERPRET=1.

The interpreter multiplies and adds what the compiled kernels do, with a correctly rounded fma. It truncates where they
round to bfloat16, hence the larger errors allowed there.
"""

from __future__ import annotations

import pytest
import torch

from essa_kernels.reference import noise as reference
from essa_kernels.tl import config, noise, svd_lora

from .problems import DTYPES, SHAPES, assert_h, assert_y, problem

NEVER, ALWAYS = 10**9, 0
PATHS = {
    "fused": {"fused": {"min_rows": ALWAYS}},
    "two launches": {"fused": {"min_rows": NEVER}, "mix_expand": {"max_rows": NEVER}},
    "three launches": {"fused": {"min_rows": NEVER}, "mix_expand": {"max_rows": ALWAYS}},
}


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch):
    """Overrides entries of configs.json for the interpreter."""

    def override(entries: dict[str, dict[str, int]]) -> None:
        base = config.CONFIGS["cpu"]
        merged = base | {kernel: base.get(kernel, {}) | entry for kernel, entry in entries.items()}
        monkeypatch.setitem(config.CONFIGS, "cpu", merged)
        config.config_of.cache_clear()

    yield override
    monkeypatch.undo()
    config.config_of.cache_clear()


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ((1, 1), (0, 0, 0, 0)),
        ((3, 1000), (2**64 - 1, 2**32 - 1, 2**30 - 1, 2**33 - 1)),
        ((37, 129), (2**63 + 5, 7, 1, 2)),
        ((5, 2050), (11, 2**31, 3, 1)),
        ((16, 65536), (2026, 1, 2, 3)),
    ],
)
def test_fills_have_the_bits_of_the_contract(configure, distribution, shape, key):
    if shape[1] == 65536:
        configure({"gaussian": {"tiles": 4096}, "rademacher": {"tiles": 128}})
    got, expected = torch.full((shape[0] + 1, shape[1]), float("nan")), torch.empty(shape)
    getattr(reference, distribution)(expected, *key)
    getattr(noise, distribution)(got[:-1], *key)
    assert torch.equal(got[:-1].view(torch.int32), expected.view(torch.int32))
    assert got[-1].isnan().all(), "wrote past the end"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_lora(configure, seed, path, shape, dtype):
    configure(PATHS[path])
    p = problem(shape, dtype, transposed=path == "two launches")
    y = p.y.clone()
    padding = p.y.as_strided((p.y.shape[0], 8), p.y.stride(), p.y.shape[1])
    padding.fill_(7)
    svd_lora.svd_lora_(*p)
    assert padding.eq(7).all(), "wrote beside y"
    truncation = {"units": 1.0, "h_error": 2**-14} if dtype is torch.bfloat16 else {}
    assert_y(p.y, p._replace(y=y), **truncation)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_sums_its_splits(configure, seed, splits, dtype):
    configure({"project": {"programs": splits}})
    p = problem("odd", dtype)
    h = torch.full((p.x.shape[0], p.core.shape[0] + 3), float("nan"))[:, 2:-1]
    svd_lora.svd_lora_shrink(h, *p.of_shrink)
    assert_h(h, p)


def test_owners_are_found_in_more_than_one_step(seed):
    members = 5000
    offsets = torch.randint(0, 41, (members - 1,)).sort().values
    p = problem("one of everything", torch.float32)
    p = p._replace(
        x=torch.randn(40, 1),
        s_a=torch.rand(members, 1),
        s_b=torch.rand(members, 1),
        offsets=torch.cat([torch.tensor([0]), offsets, torch.tensor([40])]),
    )
    h = torch.full((40, 1), float("nan"))
    svd_lora.svd_lora_shrink(h, *p.of_shrink)
    assert_h(h, p)
