"""lora_perturbed against float64, on every backend this machine has."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from essa_kernels import NoiseKey, explain, lora_perturbed, lora_perturbed_linear

from .member_rows import CASES, KEY, groups, noise, offsets_of
from .oracle import (
    DTYPES,
    assert_linear_is_antithetic,
    assert_linear_no_worse_than_torch,
    assert_linear_takes_any_layout,
    assert_no_worse_than_torch,
    assert_rows_of_linear_are_apart,
    assert_threads_change_nothing,
    bad_base_layers,
    peaks,
    skip_unavailable,
)

SIGMA, SCALING = 0.37, 1.7


class Operands(NamedTuple):
    """The tensors that lora_perturbed takes."""

    x: Tensor
    a: Tensor
    b: Tensor
    members: Tensor
    offsets: Tensor

    def replace(self, **operands: Tensor) -> Operands:
        return self._replace(**operands)


def random_operands(
    members: list[int], counts: list[int], d_in: int, d_out: int, rank: int, dtype=torch.float32, device: str = "cpu"
) -> Operands:
    """Operands for groups of so many rows, scaled so that results are about 1."""
    return Operands(
        torch.randn(sum(counts), d_in).div(d_in**0.5).to(device, dtype),
        torch.randn(rank, d_in).to(device, dtype),
        torch.randn(d_out, rank).div(rank**0.5).to(device, dtype),
        torch.tensor(members, dtype=torch.int64, device=device),
        offsets_of(counts).to(device),
    )


def call(operands: Operands, y: Tensor | None = None, distribution: str = "gaussian", **arguments) -> Tensor:
    x, a, b, members, offsets = operands
    arguments = {"scaling": SCALING, "distribution": distribution, "y": y, **arguments}
    return lora_perturbed(x, a, b, KEY, SIGMA, members, offsets, **arguments)


def call_linear(
    operands: Operands, weight: Tensor, bias: Tensor | None = None, distribution: str = "gaussian", **arguments
) -> Tensor:
    x, a, b, members, offsets = operands
    arguments = {"scaling": SCALING, "distribution": distribution, **arguments}
    return lora_perturbed_linear(x, weight, a, b, KEY, SIGMA, members, offsets, bias, **arguments)


def with_torch(
    operands: Operands, y: Tensor | None, distribution: str, dtype: torch.dtype, part: Callable = torch.clone
) -> Tensor:
    """Member by member with its noise materialised, computed in ``dtype`` throughout: float64 for the truth.

    Args:
        part: what to take of everything that is multiplied or summed: `torch.abs` bounds the sums without signs.
    """
    x, a, b, members, offsets = operands
    result = torch.zeros(len(x), len(b), dtype=dtype, device=x.device) if y is None else part(y.to(dtype))
    x, a, b = (part(operand.to(dtype)) for operand in (x, a, b))
    for member, rows in groups(members, offsets):
        eps_a = part(noise(a.shape, distribution, KEY.site, member).to(x.device, dtype))
        eps_b = part(noise(b.T.shape, distribution, KEY.site + 1, member).to(x.device, dtype)).T
        result[rows] += SCALING * (x[rows] @ (a + SIGMA * eps_a).T) @ (b + SIGMA * eps_b).T
    return result


def assert_right(got: Tensor, operands: Operands, y: Tensor | None, distribution: str = "gaussian") -> None:
    """No worse than torch in float32 throughout with one rounding at the end."""
    truth, torchs = (with_torch(operands, y, distribution, dtype) for dtype in (torch.float64, torch.float32))
    sizes = with_torch(operands, y, distribution, torch.float64, torch.abs)
    terms = 4 * float(sizes.max()) if sizes.numel() else 0.0  # rounded in a, in h, in b, and when summed
    assert_no_worse_than_torch(got, torchs.to(got.dtype), truth, terms=terms)


@pytest.fixture(params=["gaussian", "rademacher"])
def distribution(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


# Values


@pytest.mark.parametrize("case", CASES)
def test_delta(backend, dtype, case, distribution, seed):
    name, device = backend
    operands = random_operands(*CASES[case], dtype, device)
    assert_right(call(operands, None, distribution, backend=name), operands, None, distribution)


@pytest.mark.parametrize("case", ["pairs", "rows of several tiles", "large rank"])
def test_accumulation_in_place(backend, dtype, case, distribution, seed):
    name, device = backend
    operands = random_operands(*CASES[case], dtype, device)
    y = torch.randn(len(operands.x), len(operands.b)).to(device, dtype)
    before = y.clone()
    assert call(operands, y, distribution, backend=name) is y
    assert_right(y, operands, before, distribution)


@given(
    members=st.lists(st.integers(0, 20), unique=True, max_size=12),
    data=st.data(),
    d_in=st.integers(1, 200),
    d_out=st.integers(1, 200),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
    data_seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(members, data, d_in, d_out, rank, dtype, distribution, data_seed):
    torch.manual_seed(data_seed)
    counts = data.draw(st.lists(st.integers(0, 12), min_size=len(members), max_size=len(members)))
    operands = random_operands(members, counts, d_in, d_out, rank, dtype)
    y = torch.randn(len(operands.x), d_out).to(dtype)
    assert_right(call(operands, y.clone(), distribution), operands, y, distribution)


def test_parameters_kept_in_float32(backend, distribution, seed):
    name, device = backend
    operands = random_operands(*CASES["pairs"], torch.float32, device)
    operands = operands.replace(x=operands.x.bfloat16())
    assert_right(call(operands, None, distribution, backend=name), operands, None, distribution)


def test_small_noise_on_large_parameters(backend, seed):
    """Were the factors rounded to bfloat16 after they are perturbed, this noise would be lost."""
    name, device = backend
    operands = random_operands(*CASES["pairs"], torch.bfloat16, device)
    halves = operands.x[:, : operands.x.shape[1] // 2]
    operands = operands.replace(x=torch.cat([halves, -halves], 1), a=torch.full_like(operands.a, 300))
    assert_right(call(operands, backend=name), operands, None)


def test_without_noise_it_is_lora(backend, dtype, seed):
    name, device = backend
    x, a, b, members, offsets = random_operands(*CASES["pairs"], dtype, device)
    got = lora_perturbed(x, a, b, KEY, 0.0, members, offsets, backend=name)
    truth, torchs = ((x.to(t) @ a.to(t).T) @ b.to(t).T for t in (torch.float64, torch.float32))
    assert_no_worse_than_torch(got, torchs.to(dtype), truth)


def test_a_pair_is_antithetic(backend, distribution, seed):
    """Member 2k + 1 at sigma is member 2k at -sigma, bit for bit."""
    name, device = backend
    x, a, b, _, offsets = random_operands([0, 1], [7, 5], 129, 65, 8, device=device)
    key, members = NoiseKey(3), torch.tensor([10, 11], device=device)
    options = {"distribution": distribution, "backend": name}
    plus = lora_perturbed(x, a, b, key, SIGMA, members, offsets, **options)
    minus = lora_perturbed(x, a, b, key, -SIGMA, members.flip(0), offsets, **options)
    assert torch.equal(plus, minus)


def test_a_row_depends_on_its_own_group_only(backend, dtype, seed):
    name, device = backend
    operands = random_operands([2, 3, 8], [30, 30, 30], 129, 65, 8, dtype, device)
    x = torch.full_like(operands.x, torch.nan)
    x[30:60] = operands.x[30:60]
    got = call(operands.replace(x=x), backend=name)
    assert_close(got[30:60], call(operands, backend=name)[30:60], rtol=0, atol=0)
    assert got[:30].isnan().all()
    assert got[60:].isnan().all()


# With its base layer


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_linear(backend, dtype, case, biased, distribution, seed):
    operands = random_operands(*CASES[case], dtype, backend[1])
    assert_linear(backend, operands, distribution, biased=biased)


def test_linear_with_parameters_kept_in_float32(backend, distribution, seed):
    operands = random_operands(*CASES["pairs"], torch.float32, backend[1])
    assert_linear(backend, operands.replace(x=operands.x.bfloat16()), distribution, biased=True)


def assert_linear(backend: tuple[str, str], operands: Operands, distribution: str, *, biased: bool) -> None:
    assert_linear_no_worse_than_torch(
        backend,
        "lora_perturbed_linear",
        lambda weight, bias: call_linear(operands, weight, bias, distribution, backend=backend[0]),
        lambda base, precision: with_torch(operands, base, distribution, precision),
        operands.x,
        len(operands.b),
        biased=biased,
        precision=torch.float32,
    )


def test_linear_of_any_layout(backend, dtype, seed):
    name, device = backend
    operands = random_operands([5, 4], [4, 8], 65, 33, 8, dtype, device)

    def of(x: Tensor, weight: Tensor) -> Tensor:
        return call_linear(operands.replace(x=x), weight, backend=name)

    assert_linear_takes_any_layout(backend, "lora_perturbed_linear", of, operands.x, 33)
    weight = torch.randn(33, 65).to(device, dtype)
    rank_major = operands.replace(b=operands.b.T.contiguous().T)
    assert_close(call_linear(rank_major, weight, backend=name), of(operands.x, weight))


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_linear_of_no_rows(backend, counts):
    name, device = backend
    skip_unavailable(name, device, "lora_perturbed_linear")
    operands = random_operands(list(range(len(counts))), counts, 65, 33, 8, device=device)
    assert call_linear(operands, torch.zeros(33, 65, device=device), backend=name).shape == (0, 33)


def test_a_pair_is_antithetic_in_linear(backend, distribution, seed):
    x, a, b, _, offsets = random_operands([0, 1], [7, 5], 129, 65, 8, device=backend[1])
    weight, options = torch.randn(65, 129, device=backend[1]), {"distribution": distribution, "backend": backend[0]}

    def of(sigma: float, members: Tensor) -> Tensor:
        return lora_perturbed_linear(x, weight, a, b, KEY, sigma, members, offsets, **options)

    assert_linear_is_antithetic(backend, "lora_perturbed_linear", of)


def test_a_row_of_linear_depends_on_its_own_group_only(backend, dtype, seed):
    name, device = backend
    operands = random_operands([2, 3, 8], [30, 30, 30], 129, 65, 8, dtype, device)
    weight = torch.randn(65, 129).to(device, dtype)
    assert_rows_of_linear_are_apart(
        backend,
        "lora_perturbed_linear",
        lambda x: call_linear(operands.replace(x=x), weight, backend=name),
        operands.x,
    )


# Layouts


def test_leading_dimensions_are_rows(backend, dtype, seed):
    name, device = backend
    operands = random_operands([5, 4], [4, 8], 65, 33, 8, dtype, device)
    flat = call(operands, backend=name)
    folded = operands.replace(x=operands.x.view(2, 3, 2, 65))
    assert_close(call(folded, backend=name), flat.view(2, 3, 2, 33))
    y = torch.zeros(2, 3, 2, 33, dtype=dtype, device=device)
    assert_close(call(folded, y, backend=name), flat.view(2, 3, 2, 33))


def test_strided_rows(backend, dtype, seed):
    name, device = backend
    operands = random_operands([0, 1], [5, 30], 65, 33, 8, dtype, device)
    expected = call(operands, backend=name)
    frame = torch.full((35, 100), torch.nan, dtype=dtype, device=device)
    frame[:, 3:68] = operands.x
    into = torch.full((35, 50), torch.nan, dtype=dtype, device=device)
    into[:, 7:40] = 0
    call(operands.replace(x=frame[:, 3:68]), into[:, 7:40], backend=name)
    assert_close(into[:, 7:40], expected)
    assert into[:, :7].isnan().all()
    assert into[:, 40:].isnan().all()


@pytest.mark.parametrize(
    "view", [lambda x: x.T.contiguous().T, lambda x: x.repeat_interleave(2, 1)[:, ::2], lambda x: x[:1].expand(35, -1)]
)
def test_x_of_any_strides(backend, seed, view):
    name, device = backend
    operands = random_operands([0, 1], [5, 30], 65, 33, 8, device=device)
    x = view(operands.x)
    expected = call(operands.replace(x=x.contiguous()), backend=name)
    assert_close(call(operands.replace(x=x), backend=name), expected)


def test_b_in_either_order(backend, dtype, seed):
    name, device = backend
    operands = random_operands([0, 1], [5, 30], 65, 129, 8, dtype, device)
    rank_major = operands.replace(b=operands.b.T.contiguous().T)
    assert_close(call(rank_major, backend=name), call(operands, backend=name))


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_no_rows(backend, counts):
    name, device = backend
    operands = random_operands(list(range(len(counts))), counts, 65, 33, 8, device=device)
    assert call(operands, backend=name).shape == (0, 33)


def test_threads_change_nothing(dtype, distribution, seed, native):
    operands = random_operands([*range(50), 77], [1] * 50 + [300], 300, 2100, 8, dtype)
    assert_threads_change_nothing(lambda: call(operands, None, distribution, backend="cpu"))


FORWARD = """
import torch
from essa_kernels import NoiseKey, lora_perturbed

torch.set_num_threads(1)
x, a, b, y = (torch.randn(shape) for shape in ((4096, 256), (8, 256), (256, 8), (4096, 256)))
groups = {count: (torch.arange(count), torch.arange(0, 4097, 4096 // count)) for count in (8, 4096)}
lora_perturbed(x, a, b, NoiseKey(0), 0.1, *groups[8], y=y, backend="cpu")
"""


def test_memory_does_not_grow_with_the_members(native):
    """Of the same 4096 rows, beside them and y: the factors of one member are 16 KiB, those of 4096 are 64 MiB."""
    call = 'lora_perturbed(x, a, b, NoiseKey(1), 0.1, *groups[{}], y=y, backend="cpu")'
    few, many = peaks(FORWARD, call.format(8), call.format(4096))
    assert few < 1024
    assert many < 1024


# Registration


def test_opcheck(seed):
    x, a, b, *where = random_operands([2, 3, 9], [2, 0, 3], 9, 7, 3)
    arguments = (x, a, b, 5, 1, 2, SIGMA, *where, SCALING, "rademacher", None)
    torch.library.opcheck(torch.ops.essa.lora_perturbed.default, arguments)
    torch.library.opcheck(torch.ops.essa.lora_perturbed_.default, (torch.randn(5, 7), *arguments))
    for bias in (None, torch.randn(7)):
        arguments = (x, torch.randn(7, 9), a, b, 5, 1, 2, SIGMA, *where, bias, SCALING, "rademacher", None)
        torch.library.opcheck(torch.ops.essa.lora_perturbed_linear.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, seed):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def layer(operands: Operands, weight: Tensor) -> Tensor:
        y = operands.x @ weight
        call(operands, y)
        return call_linear(operands, weight.T.contiguous(), y[0]) + call(operands, distribution="rademacher")

    for members, counts in (([0, 1], [2, 3]), ([7, 2], [4, 7])):
        operands = random_operands(members, counts, 9, 7, 3)
        weight = torch.randn(9, 7)
        y = call(operands, operands.x @ weight)
        expected = call_linear(operands, weight.T.contiguous(), y[0]) + call(operands, distribution="rademacher")
        assert_close(layer(operands, weight), expected)


def test_meta_tensors_have_the_shape():
    operands = random_operands([0, 1], [2, 3], 9, 7, 3, torch.bfloat16, "meta")
    assert call(operands).shape == (5, 7)
    assert call(operands).dtype is torch.bfloat16
    y = call_linear(operands, torch.empty(7, 9, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype) == ((5, 7), torch.bfloat16)


@pytest.mark.parametrize("name", ["x", "a", "b", "y"])
def test_gradients_are_refused(name, seed):
    operands = {**random_operands([0, 1], [2, 3], 9, 7, 3)._asdict(), "y": torch.zeros(5, 7)}
    operands[name].requires_grad_()
    y = operands.pop("y")
    message = f"lora_perturbed: {name} requires grad, but lora_perturbed has no backward"
    with torch.enable_grad(), pytest.raises(RuntimeError, match=message):
        call(Operands(**operands), y)
    call(Operands(**operands), y.detach())


def test_autograd_notices_that_y_has_changed(seed):
    operands = random_operands([0, 1], [2, 3], 9, 7, 3)
    weight, y = torch.ones(5, 7, requires_grad=True), torch.ones(5, 7)
    with torch.enable_grad():
        loss = (weight * y).sum()
    call(operands, y)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Bad input: rows [2, 3], d_in 9, d_out 7, rank 3


BAD_OPERANDS = [
    ("x", torch.zeros(5, 9, dtype=torch.float64), "x must have dtype float32, bfloat16 or float16, got torch.float64"),
    ("x", torch.zeros(()), "x must have at least one dimension, got none"),
    ("x", torch.zeros(5, 8), r"x must have shape \[..., d_in\] = \[5, 9\], got \[5, 8\]"),
    ("a", torch.zeros(9), r"a must have shape \[r, d_in\] with r >= 1 and d_in >= 1, got \[9\]"),
    ("a", torch.zeros(0, 9), r"a must have shape \[r, d_in\] with r >= 1 and d_in >= 1, got \[0, 9\]"),
    ("a", torch.zeros(3, 9).half(), "a must have x's dtype, torch.float32, or torch.float32, got torch.float16"),
    ("a", torch.zeros(9, 3).T, r"a must be contiguous, got strides \[1, 3\]"),
    ("a", torch.zeros(3, 9, device="meta"), "a must be on cpu, got meta"),
    ("b", torch.zeros(7), r"b must have shape \[d_out, r\] with d_out >= 1 and r >= 1, got \[7\]"),
    ("b", torch.zeros(7, 4), r"b must have shape \[d_out, r\] = \[7, 3\], got \[7, 4\]"),
    ("b", torch.zeros(7, 3).bfloat16(), "b must have dtype torch.float32, got torch.bfloat16"),
    ("b", torch.zeros(7, 6)[:, ::2], r"b or its transpose must be contiguous, got strides \[6, 2\]"),
    ("members", torch.tensor([[0, 1]]), r"members must have shape \[groups\], got \[1, 2\]"),
    ("members", torch.tensor([0, 1]).int(), "members must have dtype torch.int64, got torch.int32"),
    ("members", torch.tensor([0, 1, 2]), r"offsets must have shape \[groups \+ 1\] = \[4\], got \[3\]"),
    ("members", torch.tensor([0, 5, 1])[::2], r"members must be contiguous, got strides \[2\]"),
    ("members", torch.tensor([0, -1]), r"members must be in 0 .. 2\*\*33 - 1, got -1"),
    ("members", torch.tensor([2**33, 0]), r"members must be in 0 .. 2\*\*33 - 1, got 8589934592"),
    ("members", torch.tensor([4, 4]), "members must be distinct, got 4 twice"),
    ("offsets", torch.tensor([0, 5]), r"offsets must have shape \[groups \+ 1\] = \[3\], got \[2\]"),
    ("offsets", torch.tensor([0, 2, 5]).int(), "offsets must have dtype torch.int64, got torch.int32"),
    ("offsets", torch.tensor([1, 2, 5]), "offsets must start with 0 and end with the number of rows, 5, got 1 and 5"),
    ("offsets", torch.tensor([0, 6, 5]), "offsets must not descend, got 6, 5 at member 1"),
]
BAD_Y = [
    (torch.zeros(5, 7).half(), "y must have dtype torch.float32, got torch.float16"),
    (torch.zeros(5, 6), r"y must have shape \[..., d_out\] = \[5, 7\], got \[5, 6\]"),
    (torch.zeros(7, 5).T, r"y must be rows of adjacent elements at one stride, got strides \[1, 5\]"),
    (torch.zeros(7).expand(5, 7), r"y must be rows of adjacent elements at one stride, got strides \[0, 1\]"),
]
BAD_ARGUMENTS = [
    ({"key": 5}, TypeError, "key must be a NoiseKey, got 5"),
    ({"key": NoiseKey(0, site=3)}, ValueError, "key.site must be even, the second factor draws from the next, got 3"),
    ({"sigma": "1"}, TypeError, "sigma must be a number, got '1'"),
    ({"sigma": float("nan")}, ValueError, "sigma must be finite in float32, got nan"),
    ({"scaling": 1e39}, ValueError, r"scaling must be finite in float32, got 1e\+39"),
    ({"distribution": "uniform"}, ValueError, "distribution must be gaussian or rademacher, got 'uniform'"),
    ({"backend": "x"}, ValueError, "backend must be one of cpu, cuda, triton, reference or None, got 'x'"),
    ({"backend": "cuda"}, RuntimeError, "backend 'cuda' is not available: it takes cuda tensors, not cpu tensors"),
    ({"a": [1.0]}, TypeError, "a must be a tensor, got list"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_OPERANDS)
def test_bad_operands_are_refused(name, value, message, seed):
    operands = random_operands([0, 1], [2, 3], 9, 7, 3).replace(**{name: value})
    y = torch.full((*operands.x.shape[:-1], 7), 5.0)
    before = y.clone()
    for into in (y, None) if name != "x" else (None,):
        with pytest.raises(ValueError, match=f"^lora_perturbed: ({message})"):
            call(operands, into)
    assert torch.equal(y, before)


@pytest.mark.parametrize(("name", "value", "message"), [*BAD_OPERANDS, *bad_base_layers(7, 9)])
def test_bad_operands_of_linear_are_refused(name, value, message, seed):
    arguments = {**random_operands([0, 1], [2, 3], 9, 7, 3)._asdict(), "weight": torch.zeros(7, 9), name: value}
    with pytest.raises(ValueError, match=f"^lora_perturbed_linear: ({message})"):
        lora_perturbed_linear(**arguments, key=KEY, sigma=SIGMA)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_gradients_of_linear_are_refused(name, seed):
    arguments = random_operands([0, 1], [2, 3], 9, 7, 3)._asdict() | {
        "weight": torch.zeros(7, 9),
        "bias": torch.zeros(7),
    }
    arguments[name].requires_grad_()
    message = f"^lora_perturbed_linear: {name} requires grad, but lora_perturbed_linear has no backward"
    with torch.enable_grad(), pytest.raises(RuntimeError, match=message):
        lora_perturbed_linear(**arguments, key=KEY, sigma=SIGMA)


@pytest.mark.parametrize(("y", "message"), BAD_Y)
def test_bad_y_is_refused(y, message, seed):
    with pytest.raises(ValueError, match=f"^lora_perturbed: {message}"):
        call(random_operands([0, 1], [2, 3], 9, 7, 3), y)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(arguments, error, message, seed):
    operands = random_operands([0, 1], [2, 3], 9, 7, 3)._asdict()
    with pytest.raises(error, match=f"^lora_perturbed: {message}"):
        lora_perturbed(**{**operands, "key": KEY, "sigma": SIGMA, **arguments})
    if arguments != {"backend": "cuda"}:
        with pytest.raises(error, match=f"^lora_perturbed_linear: {message}"):
            lora_perturbed_linear(**{**operands, "weight": torch.zeros(7, 9), "key": KEY, "sigma": SIGMA, **arguments})


def test_factors_beyond_the_counter_are_refused():
    """Meta tensors have the size without the memory: more than 2**32 blocks of noise."""
    x, a, b, *where = random_operands([0], [1], 2**20, 7, 1, device="meta")
    a, b = a.new_empty(2**15, 2**20), b.new_empty(7, 2**15)
    with pytest.raises(ValueError, match=r"a must fit the counter, rows \* ceil\(cols / 64\) \* 16 <= 2\*\*32, got"):
        lora_perturbed(x, a, b, KEY, SIGMA, *where)


def test_explain_says_what_each_noise_costs():
    text = explain("lora_perturbed")
    assert "* rademacher" in text and "multi_lora" in text
    assert "rademacher" not in explain("svd_lora")
