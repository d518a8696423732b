"""The noise contract: published and own known answers, the same bits everywhere, and what the bits look like."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import essa_kernels
from essa_kernels import NOISE_VERSION, NoiseKey, dispatch, gaussian, rademacher
from essa_kernels.noise import BLOCKS_PER_TILE, GAUSSIAN_TILE, RADEMACHER_TILE
from essa_kernels.reference import noise as reference

from . import make_known_answers, noise_cases
from .noise_cases import different_bits

DISTRIBUTIONS = {"gaussian": (gaussian, GAUSSIAN_TILE), "rademacher": (rademacher, RADEMACHER_TILE)}
KEY = NoiseKey(2026, generation=3, site=5)


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request: pytest.FixtureRequest) -> str:
    return request.param


# Known answers


# From Random123's kat_vectors, philox 4x32 10: counter, key, result.
PHILOX_ANSWERS = """
00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("answer", PHILOX_ANSWERS.strip().splitlines())
def test_philox_gives_the_published_answers(answer):
    c0, c1, c2, c3, k0, k1, *expected = (int(word, 16) for word in answer.split())
    words = reference.philox(torch.tensor([c0]), c1, c2, c3, k1 << 32 | k0)
    assert [int(word) for word in words] == expected


def test_known_answers(backend):
    name, device = backend
    answers = json.loads(make_known_answers.PATH.read_text())
    assert answers["noise_version"] == NOISE_VERSION
    for vector in answers["vectors"]:
        seed, generation, site, member = vector["key"]
        draw, _ = DISTRIBUTIONS[vector["distribution"]]
        out = draw(vector["shape"], NoiseKey(seed, generation, site), member, device=device, backend=name)
        assert make_known_answers.summary(out).items() <= vector.items(), vector


def test_the_compiled_module_speaks_this_version(native):
    from essa_kernels import _C

    assert _C.build_info()["noise_version"] == NOISE_VERSION


# The same bits everywhere


def test_fma_rounds_once(seed):
    exact = pytest.importorskip("numpy").longdouble
    a, b = torch.randn(2, 100_000)
    c = -(a.double() * b.double()).float() * torch.tensor([1.0, 1.0 + 2**-23, 0.5, 2.0**-20]).repeat(25_000)
    # A product of float32 has 48 bits; beside a close addend, the extended sum is exact.
    close = c.abs() > (a * b).abs() / 4
    expected = (a.numpy().astype(exact) * b.numpy() + c.numpy()).astype("f4")
    assert not different_bits(reference.fma(a, b, c)[close], torch.from_numpy(expected)[close])


def test_backends_agree(backend, seed):
    name, device = backend
    expected = noise_cases.draw(seed, "reference")
    assert sum(e.numel() for e in expected) > 1_000_000
    for case, got, want in zip(noise_cases.cases(seed), noise_cases.draw(seed, name, device), expected, strict=True):
        assert not different_bits(got, want), case


def test_instruction_sets_agree(isa_environment, seed, tmp_path):
    path = tmp_path / "noise.pt"
    subprocess.run([sys.executable, noise_cases.__file__, str(seed), str(path)], env=isa_environment, check=True)
    for got, want in zip(torch.load(path), noise_cases.draw(seed, "reference"), strict=True):
        assert not different_bits(got, want)


def test_an_unknown_instruction_set_is_refused(native):
    call = "import essa_kernels as e; e.gaussian(3, e.NoiseKey(0))"
    child = subprocess.run(
        [sys.executable, "-c", call],
        env=os.environ | {"ESSA_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode != 0
    assert "ESSA_CPU_ISA is 'sse9'" in child.stderr


@pytest.mark.slow
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_hundred_million_values_agree(distribution, seed, native):
    draw, _ = DISTRIBUTIONS[distribution]
    shape = (1000, 12_500)
    for member in range(8):
        key = NoiseKey(seed, site=member)
        got, want = (draw(shape, key, member, backend=backend) for backend in ("cpu", "reference"))
        assert not different_bits(got, want)


def test_threads_change_nothing(distribution, seed, native):
    draw, _ = DISTRIBUTIONS[distribution]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = draw((300, 4097), KEY, backend="cpu")
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert not different_bits(draw((300, 4097), KEY, backend="cpu"), expected)
    finally:
        torch.set_num_threads(threads)


# Layout


@given(
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
    seed=st.integers(0, 2**64 - 1),
    member=st.integers(0, 2**33 - 1),
    rows=st.integers(1, 5),
    cols=st.integers(1, 5000),
    data=st.data(),
)
def test_an_element_is_a_function_of_its_position(name, seed, member, rows, cols, data):
    draw, tile_size = DISTRIBUTIONS[name]
    key = NoiseKey(seed, 11, 12)
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    tile, element = row * -(-cols // tile_size) + col // tile_size, col % tile_size
    tag = sorted(DISTRIBUTIONS).index(name)
    if name == "gaussian":
        lane, word, bit = element % 16, element // 16, 0
    else:
        lane, word, bit = element % 16, element // 16 % 4, element // 64
    counter = torch.tensor([tile * BLOCKS_PER_TILE + lane])
    words = reference.philox(counter, 12 | tag << 30, member >> 1, 11, seed)
    if name == "gaussian":
        pair = reference.box_muller(*words[word // 2 * 2 : word // 2 * 2 + 2])
        expected = pair[word % 2]
    else:
        expected = 1.0 - 2.0 * (words[word] >> (31 - bit) & 1).float()
    assert draw((rows, cols), key, member)[row, col] == (-expected if member % 2 else expected)


@given(rows=st.integers(2, 40), cols=st.integers(1, 3000), name=st.sampled_from(sorted(DISTRIBUTIONS)))
def test_rows_do_not_depend_on_the_rows_after_them(rows, cols, name):
    draw, _ = DISTRIBUTIONS[name]
    full = draw((rows, cols), KEY)
    assert torch.equal(draw((rows // 2, cols), KEY), full[: rows // 2])


def test_leading_dimensions_are_rows(backend, distribution):
    name, device = backend
    draw, _ = DISTRIBUTIONS[distribution]
    matrix = draw((6, 70), KEY, device=device, backend=name)
    assert torch.equal(draw((2, 3, 70), KEY, device=device, backend=name), matrix.view(2, 3, 70))
    assert torch.equal(draw(70, KEY, device=device, backend=name), matrix[0])
    assert torch.equal(draw([], KEY, device=device, backend=name), matrix[0, 0])


@pytest.mark.parametrize("shape", [0, (0, 5), (5, 0), (2, 0, 3)])
def test_nothing_to_draw(backend, distribution, shape):
    name, device = backend
    draw, _ = DISTRIBUTIONS[distribution]
    out = draw(shape, KEY, device=device, backend=name)
    assert out.numel() == 0


def test_out_is_filled(backend, distribution):
    name, device = backend
    draw, _ = DISTRIBUTIONS[distribution]
    out = torch.full((5, 300), torch.nan, device=device)
    assert draw((5, 300), KEY, 9, out=out, backend=name) is out
    assert torch.equal(out, draw((5, 300), KEY, 9, device=device, backend=name))


# What the bits look like


def test_pairs_are_antithetic(backend, distribution):
    name, device = backend
    draw, _ = DISTRIBUTIONS[distribution]
    plus, minus = (draw((9, 1134), KEY, member, device=device, backend=name) for member in (6, 7))
    assert not different_bits(minus, -plus)


def test_streams_are_independent(distribution, seed):
    draw, _ = DISTRIBUTIONS[distribution]
    key = NoiseKey(seed, 4, 8)
    draws = torch.stack(
        [
            draw(200_000, key),
            draw(200_000, key, 2),
            draw(200_000, key.at(site=9)),
            draw(200_000, key.at(generation=5)),
            draw(200_000, NoiseKey(seed + 1, 4, 8)),
            draw(200_000, NoiseKey(seed + 2**32, 4, 8)),
            gaussian(200_000, key) if draw is rademacher else rademacher(200_000, key),
        ]
    )
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 6 / 200_000**0.5


def test_fields_do_not_mix():
    keys = [NoiseKey(1), NoiseKey(0, 1), NoiseKey(0, 0, 1), NoiseKey(2**32)]
    first = [gaussian(1, key).item() for key in keys] + [gaussian(1, NoiseKey(0), 2).item()]
    assert len(set(first)) == 5


def test_normals_are_normal(seed):
    z = gaussian(4_000_000, NoiseKey(seed)).double()
    n = len(z)
    # six standard errors of each estimate
    assert abs(z.mean()) < 6 * (1 / n) ** 0.5
    assert abs(z.var() - 1) < 6 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 6 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 6 * (96 / n) ** 0.5
    for threshold in (1.0, 2.0, 3.0, 4.0):
        p = 2 * stats.norm.sf(threshold)
        assert abs((z.abs() > threshold).double().mean() - p) < 6 * (p * (1 - p) / n) ** 0.5
    assert stats.kstest(z[:500_000].numpy(), "norm").pvalue > 1e-6


def test_neighbours_are_uncorrelated(distribution, seed):
    draw, _ = DISTRIBUTIONS[distribution]
    z = draw(1_000_000, NoiseKey(seed))
    for lag in (1, 16, 32, 48, 64, 2048):
        assert abs((z[lag:] * z[:-lag]).double().mean()) < 6 / len(z) ** 0.5
        assert abs((z[lag:] ** 2 * z[:-lag] ** 2).double().mean() - 1) < 6 * 8**0.5 / len(z) ** 0.5


def test_the_normal_map_is_accurate_to_its_ends():
    edge = torch.tensor([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    x0, x1 = torch.cartesian_prod(torch.cat([edge, torch.randint(2**32, (300,))]), edge).T
    z0, z1 = reference.box_muller(x0, x1)
    u = (x0 >> 1).float().double() * 2**-31 + 2**-32
    radius = torch.sqrt(-2 * torch.log(u.float().double()))
    signed = torch.where(x1 < 2**31, x1, x1 - 2**32)
    angle = (signed >> 2 | 1).double() * 2**-30 * torch.pi / 2
    sine, cosine = torch.sin(angle), torch.cos(angle)
    sign, swap = 1 - 2 * (x1 & 1), x1 & 2 == 2
    for got, truth in (
        (z0, sign * radius * torch.where(swap, sine, cosine)),
        (z1, sign * radius * torch.where(swap, cosine, sine)),
    ):
        torch.testing.assert_close(got.double(), truth, rtol=5e-7, atol=1e-9)
    assert max(z0.abs().max(), z1.abs().max()) < 6.67


def test_signs_are_signs(seed):
    signs = rademacher(4_000_000, NoiseKey(seed))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.double().mean()) < 6 / len(signs) ** 0.5


# Registration


def test_opcheck(distribution):
    op = getattr(torch.ops.essa, f"{distribution}_").default
    torch.library.opcheck(op, (torch.empty(3, 70), -1, 2, 3, 4))


def test_compiles_whole(distribution):
    draw, _ = DISTRIBUTIONS[distribution]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def shifted(x: torch.Tensor, member: int) -> torch.Tensor:
        return x + draw(tuple(x.shape), KEY, member)

    x = torch.ones(3, 70)
    for member in (4, 5):
        assert torch.equal(shifted(x, member), x + draw((3, 70), KEY, member))


def test_meta_tensors_have_the_shape(distribution):
    draw, _ = DISTRIBUTIONS[distribution]
    assert draw((3, 70), KEY, device="meta").shape == (3, 70)


# Bad input


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed must be in 0 .. 2\*\*64 - 1, got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be in 0 .. 2\*\*64 - 1, got 18446744073709551616"),
        ({"seed": 1.5}, TypeError, r"seed must be an integer, got 1.5"),
        ({"seed": 0, "generation": 2**32}, ValueError, r"generation must be in 0 .. 2\*\*32 - 1, got 4294967296"),
        ({"seed": 0, "generation": None}, TypeError, r"generation must be an integer, got None"),
        ({"seed": 0, "site": 2**30}, ValueError, r"site must be in 0 .. 2\*\*30 - 1, got 1073741824"),
        ({"seed": 0, "site": "3"}, TypeError, r"site must be an integer, got '3'"),
    ],
)
def test_bad_keys_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        NoiseKey(**fields)


def test_a_key_at_another_place():
    assert KEY.at(generation=9) == NoiseKey(2026, 9, 5)
    assert KEY.at(site=0) == NoiseKey(2026, 3, 0)
    with pytest.raises(ValueError, match="site must be"):
        KEY.at(site=-1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"member": 2**33}, ValueError, r"member must be in 0 .. 2\*\*33 - 1, got 8589934592"),
        ({"member": -1}, ValueError, r"member must be in 0 .. 2\*\*33 - 1, got -1"),
        ({"member": 0.0}, TypeError, r"member must be an integer, got 0.0"),
        ({"key": 3}, TypeError, r"key must be a NoiseKey, got 3"),
        ({"shape": (2, -3)}, ValueError, r"shape must have no negative size, got \[2, -3\]"),
        ({"shape": "ab"}, TypeError, r"shape must be an integer or a sequence of integers, got 'ab'"),
        ({"shape": (2.5,)}, TypeError, r"shape must be an integer or a sequence of integers, got \(2.5,\)"),
        (
            {"shape": (2**28 + 1, 1), "device": "meta"},
            ValueError,
            r"shape must fit the counter, .* got \[268435457, 1\]",
        ),
        ({"out": [1.0]}, TypeError, r"out must be a tensor, got \[1.0\]"),
        ({"out": torch.empty(3)}, ValueError, r"out must have shape \[4, 6\], got \[3\]"),
        ({"out": torch.empty(4, 6).double()}, ValueError, r"out must have dtype torch.float32, got torch.float64"),
        ({"out": torch.empty(6, 4).T}, ValueError, r"out must be contiguous, got strides \[1, 4\]"),
        (
            {"out": torch.empty(4, 6), "device": "meta"},
            ValueError,
            r"device must be that of out, cpu, or None, got meta",
        ),
        ({"out": torch.empty(4, 6, requires_grad=True)}, RuntimeError, r"out requires grad"),
        ({"backend": "numpy"}, ValueError, r"backend must be one of cpu, cuda, triton, reference or None, got 'numpy'"),
        ({"backend": "cuda"}, RuntimeError, r"backend 'cuda' is not available: it takes cuda tensors, not cpu tensors"),
    ],
)
def test_bad_arguments_are_refused(distribution, arguments, error, message):
    arguments = {"shape": (4, 6), "key": KEY} | arguments
    with pytest.raises(error, match=message) as raised:
        getattr(essa_kernels, distribution)(**arguments)
    assert str(raised.value).startswith(f"{distribution}: ")


def test_the_largest_matrix_is_allowed():
    assert gaussian((2**28, 1), KEY, device="meta").numel() == 2**28


# Dispatch


def test_explain_names_every_backend():
    text = essa_kernels.explain("gaussian")
    assert text.startswith("gaussian")
    assert "reference" in text
    assert "cuda tensors" in text
    assert "thread pool shared with" in text or "* reference" in text
    assert repr(text) == str(text)
    with pytest.raises(ValueError, match="op must be one of gaussian"):
        essa_kernels.explain("normal")


def test_an_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(dispatch, "compiled_module_error", lambda: "it was not built")
    dispatch.resolve.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="gaussian: backend 'cpu' is not available: it was not built"):
            gaussian(3, KEY, backend="cpu")
        with pytest.warns(UserWarning, match="gaussian with plain torch on cpu, slowly. cpu: it was not built"):
            assert torch.equal(gaussian(3, KEY), gaussian(3, KEY, backend="reference"))
    finally:
        dispatch.resolve.cache_clear()


def test_the_report_is_plain_data():
    report = json.loads(json.dumps(essa_kernels.env_report()))
    assert report["noise_version"] == NOISE_VERSION
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["backends"]["cpu"]["reference"] == "available"
