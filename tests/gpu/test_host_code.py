"""csrc/cuda's device code, compiled by the host compiler and run by emulated threads (host_code.cpp)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from essa_kernels.reference import es_update as reference_update
from essa_kernels.reference import lora_perturbed as reference_lora
from essa_kernels.reference import noise as reference

from .problems import DTYPES, SHAPES, Problem, assert_h, assert_y, problem

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")

SVD_LORA, SHRINK, EXPAND = range(3)
# rows per block, threads, parts, cluster: what svd_lora.cu chooses among, with fewer threads
GEOMETRIES = {
    "one block": (1, 32, 1, True),
    "cluster": (4, 64, 4, True),
    "wide block, no cluster": (4, 128, 2, False),
}


@pytest.fixture(scope="module")
def host_code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host_code") / "host_code.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-Wall", f"-I{CSRC}"]
    subprocess.run([COMPILER, *flags, HERE / "host_code.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def fill(host_code: ctypes.CDLL, distribution: str, shape: tuple[int, int], key: tuple[int, ...]) -> torch.Tensor:
    out = torch.full((shape[0] * shape[1] + 1,), float("nan"))
    seed, generation, site, member = key
    host_code.fill(
        int(distribution == "rademacher"),
        ctypes.c_void_p(out.data_ptr()),
        *map(ctypes.c_int64, shape),
        ctypes.c_uint64(seed),
        ctypes.c_uint32(generation),
        ctypes.c_uint32(site),
        ctypes.c_uint64(member),
    )
    assert out[-1].isnan(), "wrote past the end"
    return out[:-1].view(shape)


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
def test_fills_have_the_bits_of_the_contract(host_code, distribution, shape, key):
    expected = torch.empty(shape)
    getattr(reference, distribution)(expected, *key)
    got = fill(host_code, distribution, shape, key)
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def update(
    host_code: ctypes.CDLL,
    tensors: list[torch.Tensor],
    key: tuple[int, ...],
    sigma: float,
    weights: torch.Tensor | None,
) -> None:
    """perturb_ of (seed, generation, site, member) or, with the pairs' weights, es_update_; Rademacher where sigma < 0."""
    count = len(tensors)
    seed, generation, site, member = key
    host_code.es_update(
        int(sigma < 0),
        count,
        (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors)),
        (ctypes.c_int64 * count)(*(tensor.shape[0] for tensor in tensors)),
        (ctypes.c_int64 * count)(*(tensor.shape[1] for tensor in tensors)),
        (ctypes.c_int * count)(*(DTYPES.index(tensor.dtype) for tensor in tensors)),
        ctypes.c_uint64(seed),
        ctypes.c_uint32(generation),
        ctypes.c_uint32(site),
        ctypes.c_uint64(member),
        ctypes.c_float(sigma),
        None if weights is None else ctypes.c_void_p(weights.data_ptr()),
        ctypes.c_uint32(0 if weights is None else len(weights)),
    )


@pytest.mark.parametrize("sigma", [0.03, -0.03], ids=["gaussian", "rademacher"])
@pytest.mark.parametrize("member", [6, 2**33 - 1])
def test_updates_have_the_bits_of_the_reference(host_code, seed, sigma, member):
    """All dtypes in one list, rows that end in a tile, and a weight of 0."""
    distribution = "rademacher" if sigma < 0 else "gaussian"
    shapes = [(1, 1), (37, 129), (3, 2050), (130, 1), (2, 4096)]
    tensors = [torch.randn(shape).to(DTYPES[i % 3]) for i, shape in enumerate(shapes)]
    guarded = [torch.cat([tensor.flatten(), torch.ones(1, dtype=tensor.dtype)]) for tensor in tensors]
    got = [flat[:-1].view(shape) for flat, shape in zip(guarded, shapes, strict=True)]
    weights = torch.randn(5)
    weights[2] = 0.0
    update(host_code, got, (2**63 + 5, 7, 4, member), sigma, None)
    update(host_code, got, (2**63 + 5, 7, 4, 0), sigma, weights)
    reference_update.perturb_(tensors, 2**63 + 5, 7, 4, member, sigma, distribution)
    reference_update.es_update_(tensors, 2**63 + 5, 7, 4, weights, distribution)
    for a, b, flat in zip(got, tensors, guarded, strict=True):
        assert torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))
        assert flat[-1] == 1, "wrote past the end"


def run(host_code: ctypes.CDLL, op: int, p: Problem, h: torch.Tensor, geometry: str) -> None:
    def size(value: int) -> ctypes.c_int64:
        return ctypes.c_int64(value)

    def address(tensor: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    (rows, d_in), (r_b, r_a), d_out, members = p.x.shape, p.core.shape, p.u_b.shape[0], p.s_a.shape[0]
    host_code.svd_lora(
        op,
        *(address(p.y), size(p.y.stride(0)), address(p.x), size(p.x.stride(0))),
        *(address(p.v_a), address(p.core), address(p.u_b), *map(size, p.u_b.stride())),
        *(address(p.s_a), address(p.s_b), address(p.offsets), address(h), size(h.stride(0))),
        *map(size, (rows, members, d_in, d_out, r_a, r_b)),
        DTYPES.index(p.x.dtype),
        *GEOMETRIES[geometry],
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_lora(host_code, seed, geometry, shape, dtype):
    p = problem(shape, dtype, transposed=geometry == "one block")
    y = p.y.clone()
    padding = p.y.as_strided((p.y.shape[0], 8), p.y.stride(), p.y.shape[1])
    padding.fill_(7)
    h = torch.full((p.x.shape[0], p.core.shape[0]), float("nan"))
    run(host_code, SVD_LORA, p, h, geometry)
    assert padding.eq(7).all(), "wrote beside y"
    assert_y(p.y, p._replace(y=y))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_lora_in_two_halves(host_code, seed, shape, dtype):
    p, geometry = problem(shape, dtype), "cluster"
    y = p.y.clone()
    h = torch.full((p.x.shape[0], p.core.shape[0] + 3), float("nan"))[:, 2:-1]
    run(host_code, SHRINK, p, h, geometry)
    assert_h(h, p)
    run(host_code, EXPAND, p, h, geometry)
    assert_y(p.y, p._replace(y=y), h)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_lora_perturbed(host_code, seed, geometry, distribution, dtype, parameter_dtype):
    """A pair apart, an odd member alone, an empty group, more rows than are taken at once; several tiles of noise."""
    members, offsets = torch.tensor([4, 2**33 - 1, 2, 5]), torch.tensor([0, 3, 5, 5, 12])
    d_in, d_out, rank = 2100, 129, 3
    key = (2**64 - 1, 2**32 - 1, 2**30 - 2)
    x = torch.randn(12, d_in + 8).div(d_in**0.5).to(dtype)[:, :d_in]
    a, b = torch.randn(rank, d_in).to(parameter_dtype), torch.randn(rank, d_out).to(parameter_dtype).T
    frame = torch.randn(12, d_out + 8).to(dtype)
    y, beside = frame[:, :d_out], frame[:, d_out:].clone()
    expected = y.clone()
    reference_lora.lora_perturbed_(expected, x, a, b, *key, 0.3, members, offsets, 2.0, distribution)
    host_code.lora_perturbed(
        *(ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(y.stride(0))),
        *(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0))),
        *(ctypes.c_void_p(a.data_ptr()), ctypes.c_void_p(b.data_ptr()), *map(ctypes.c_int64, b.stride())),
        *(ctypes.c_uint64(key[0]), ctypes.c_uint32(key[1]), ctypes.c_uint32(key[2]), ctypes.c_double(0.3)),
        *(ctypes.c_void_p(members.data_ptr()), ctypes.c_void_p(offsets.data_ptr()), ctypes.c_double(2.0)),
        int(distribution == "rademacher"),
        *map(ctypes.c_int64, (4, d_in, d_out, rank)),
        *(DTYPES.index(dtype), DTYPES.index(parameter_dtype), *GEOMETRIES[geometry]),
    )
    torch.testing.assert_close(y, expected)
    assert torch.equal(frame[:, d_out:], beside), "wrote beside y"
