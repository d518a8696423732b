"""svd_lora and its two halves against float64, on every backend this machine has."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from essa_kernels import dispatch, svd_lora, svd_lora_expand_, svd_lora_expand_linear, svd_lora_linear, svd_lora_shrink

from .oracle import (
    DTYPES,
    assert_linear_no_worse_than_torch,
    assert_linear_takes_any_layout,
    assert_no_worse_than_torch,
    assert_threads_change_nothing,
    bad_base_layers,
    run_tests,
)

# rows of each member, d_in, d_out, r_a, r_b
CASES = {
    "one of everything": ([1], 1, 1, 1, 1),
    "one row each": ([1] * 65, 129, 65, 8, 8),
    "ragged": ([3, 0, 1, 40, 0, 7], 1134, 129, 8, 8),
    "rank 16": ([5, 19], 896, 257, 16, 16),
    "odd ranks": ([2, 31, 2], 127, 1134, 7, 5),
    "large ranks": ([33, 2], 64, 96, 33, 129),
    "rank 1": ([7, 7, 7], 7, 7, 1, 1),
    "one member": ([130], 200, 100, 8, 8),
    "empty groups first": ([0, 0, 0, 9], 33, 31, 4, 4),
}


class Operands(NamedTuple):
    """What svd_lora takes, in its order."""

    x: Tensor
    v_a: Tensor
    core: Tensor
    u_b: Tensor
    s_a: Tensor
    s_b: Tensor
    offsets: Tensor

    @property
    def of_shrink(self) -> tuple[Tensor, ...]:
        return self.x, self.v_a, self.core, self.s_a, self.s_b, self.offsets

    def replace(self, **operands: Tensor) -> Operands:
        return self._replace(**operands)


def random_operands(
    counts: list[int], d_in: int, d_out: int, r_a: int, r_b: int, dtype=torch.float32, device: str = "cpu"
) -> Operands:
    """Operands for groups of so many rows, scaled so that results are about 1."""
    members = len(counts)
    return Operands(
        torch.randn(sum(counts), d_in).to(device, dtype),
        (torch.randn(r_a, d_in) / d_in**0.5).to(device, dtype),
        (torch.randn(r_b, r_a) / r_a**0.5).to(device),
        (torch.randn(d_out, r_b) / r_b**0.5).to(device, dtype),
        (torch.rand(members, r_a) + 0.5).to(device),
        (torch.rand(members, r_b) + 0.5).to(device),
        torch.tensor([0, *counts]).cumsum(0).to(device),
    )


def shrink_with_torch(operands: Operands, dtype: torch.dtype) -> Tensor:
    """Member by member, computed and rounded in ``dtype`` throughout: float64 for the truth."""
    x, v_a, core, _, s_a, s_b, offsets = (
        operand.to(dtype) if operand.is_floating_point() else operand for operand in operands
    )
    bounds = offsets.tolist()
    groups = [
        (x[first:last] @ v_a.T * s_a[m]) @ core.T * s_b[m] for m, (first, last) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat(groups) if groups else x.new_empty(0, core.shape[0])


def with_torch(operands: Operands, y: Tensor, dtype: torch.dtype) -> Tensor:
    """y plus the delta, computed in ``dtype`` throughout."""
    return y.to(dtype) + shrink_with_torch(operands, dtype) @ operands.u_b.to(dtype).T


@pytest.fixture(params=CASES)
def sizes(request: pytest.FixtureRequest):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


# Values


def test_delta(backend, dtype, sizes, seed):
    name, device = backend
    operands = random_operands(*sizes, dtype, device)
    truth = with_torch(operands, torch.zeros(1, device=device), torch.float64)
    got = svd_lora(*operands, backend=name)
    assert_no_worse_than_torch(got, with_torch(operands, torch.zeros(1, device=device), dtype), truth)


def test_accumulation_in_place(backend, dtype, sizes, seed):
    name, device = backend
    operands = random_operands(*sizes, dtype, device)
    y = torch.randn(len(operands.x), len(operands.u_b)).to(device, dtype)
    truth, torchs = (with_torch(operands, y, precision) for precision in (torch.float64, dtype))
    assert svd_lora(*operands, y, backend=name) is y
    assert_no_worse_than_torch(y, torchs, truth)


def test_the_halves_make_the_whole(backend, dtype, sizes, seed):
    name, device = backend
    operands = random_operands(*sizes, dtype, device)
    y = torch.randn(len(operands.x), len(operands.u_b)).to(device, dtype)
    truth, torchs = (with_torch(operands, y, precision) for precision in (torch.float64, dtype))
    h = svd_lora_shrink(*operands.of_shrink, backend=name)
    h_truth, h_torchs = (shrink_with_torch(operands, precision) for precision in (torch.float64, torch.float32))
    assert_no_worse_than_torch(h, h_torchs, h_truth)
    assert svd_lora_expand_(y, h, operands.u_b, backend=name) is y
    assert_no_worse_than_torch(y, torchs, truth)


def test_projections_that_share_one_x(backend, dtype, seed):
    name, device = backend
    counts, d_in, ranks, d_outs = [4, 0, 9], 130, (8, 8, 5), (64, 33, 1)
    single = [random_operands(counts, d_in, d_out, r, r, dtype, device) for d_out, r in zip(d_outs, ranks, strict=True)]
    single = [operands.replace(x=single[0].x) for operands in single]
    h = svd_lora_shrink(
        single[0].x,
        torch.cat([operands.v_a for operands in single]),
        torch.block_diag(*(operands.core for operands in single)),
        torch.cat([operands.s_a for operands in single], 1),
        torch.cat([operands.s_b for operands in single], 1),
        single[0].offsets,
        backend=name,
    )
    for operands, columns in zip(single, h.split(ranks, 1), strict=True):
        zeros = torch.zeros(len(operands.x), len(operands.u_b), dtype=dtype, device=device)
        y = svd_lora_expand_(zeros.clone(), columns, operands.u_b, backend=name)
        assert_no_worse_than_torch(y, *(with_torch(operands, zeros, precision) for precision in (dtype, torch.float64)))


@given(
    counts=st.lists(st.integers(0, 30), max_size=12),
    d_in=st.integers(1, 200),
    d_out=st.integers(1, 200),
    r_a=st.integers(1, 40),
    r_b=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    data_seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(counts, d_in, d_out, r_a, r_b, dtype, data_seed):
    torch.manual_seed(data_seed)
    operands = random_operands(counts, d_in, d_out, r_a, r_b, dtype)
    y = torch.randn(len(operands.x), d_out).to(dtype)
    truth, torchs = (with_torch(operands, y, precision) for precision in (torch.float64, dtype))
    assert_no_worse_than_torch(svd_lora(*operands, y), torchs, truth)


def test_a_row_depends_on_its_own_group_only(backend, dtype, seed):
    name, device = backend
    operands = random_operands([30, 30, 30], 129, 65, 8, 8, dtype, device)
    x = torch.full_like(operands.x, torch.nan)
    x[30:60] = operands.x[30:60]
    got = svd_lora(*operands.replace(x=x), backend=name)
    assert_close(got[30:60], svd_lora(*operands, backend=name)[30:60], rtol=0, atol=0)
    assert got[:30].isnan().all()
    assert got[60:].isnan().all()


# With its base layer


@pytest.mark.parametrize("biased", [False, True])
def test_linear(backend, dtype, sizes, biased, seed):
    operands = random_operands(*sizes, dtype, backend[1])
    assert_linear_no_worse_than_torch(
        backend,
        "svd_lora_linear",
        lambda weight, bias: svd_lora_linear(operands.x, weight, *operands[1:], bias, backend=backend[0]),
        lambda base, precision: with_torch(operands, base, precision),
        operands.x,
        len(operands.u_b),
        biased=biased,
    )


@pytest.mark.parametrize("biased", [False, True])
def test_expand_linear(backend, dtype, sizes, biased, seed):
    """From a range of the columns of an h that two projections share."""
    name, device = backend
    operands = random_operands(*sizes, dtype, device)
    projection = operands._asdict()
    u_b = projection.pop("u_b")
    h = svd_lora_shrink(**projection, backend=name)
    shared = torch.cat([torch.full_like(h, torch.nan), h, torch.full_like(h, torch.nan)], 1)
    assert_linear_no_worse_than_torch(
        backend,
        "svd_lora_expand_linear",
        lambda weight, bias: svd_lora_expand_linear(
            operands.x, weight, shared[:, h.shape[1] : 2 * h.shape[1]], u_b, bias, backend=name
        ),
        lambda base, precision: with_torch(operands, base, precision),
        operands.x,
        len(u_b),
        biased=biased,
    )


def test_linear_of_any_layout(backend, seed):
    name, device = backend
    operands = random_operands([4, 8], 65, 33, 8, 8, device=device)
    assert_linear_takes_any_layout(
        backend,
        "svd_lora_linear",
        lambda x, weight: svd_lora_linear(x, weight, *operands[1:], backend=name),
        operands.x,
        33,
    )
    h = svd_lora_shrink(**{n: v for n, v in operands._asdict().items() if n != "u_b"}, backend=name)
    assert_linear_takes_any_layout(
        backend,
        "svd_lora_expand_linear",
        lambda x, weight: svd_lora_expand_linear(x, weight, h, operands.u_b, backend=name),
        operands.x,
        33,
    )
    empty = random_operands([], 65, 33, 8, 8, device=device)
    assert svd_lora_linear(empty.x, torch.zeros(33, 65, device=device), *empty[1:], backend=name).shape == (0, 33)


def test_linear_is_registered(seed):
    operands, weight, bias = random_operands([2, 0, 3], 9, 7, 4, 3), torch.randn(7, 9), torch.randn(7)
    arguments = (operands.x, weight, *operands[1:], bias)
    torch.library.opcheck(torch.ops.essa.svd_lora_linear.default, arguments)
    compiled = torch.compile(svd_lora_linear, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), svd_lora_linear(*arguments))
    arguments = operands.x, weight, torch.randn(5, 3), operands.u_b, bias
    torch.library.opcheck(torch.ops.essa.svd_lora_expand_linear.default, arguments)
    compiled = torch.compile(svd_lora_expand_linear, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), svd_lora_expand_linear(*arguments))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *bad_base_layers(7, 9),
        ("x", torch.zeros(5, 8), r"x must have shape \[..., d_in\] = \[5, 9\], got \[5, 8\]"),
        (
            "offsets",
            torch.tensor([0, 2, 4]),
            "offsets must start with 0 and end with the number of rows, 5, got 0 and 4",
        ),
    ],
)
def test_bad_operands_of_linear_are_refused(name, value, message, seed):
    operands = random_operands([2, 3], 9, 7, 4, 3)._asdict() | {"weight": torch.randn(7, 9), "bias": torch.randn(7)}
    with pytest.raises(ValueError, match=f"^svd_lora_linear: {message}"):
        svd_lora_linear(**(operands | {name: value}))
    operands["weight"].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="svd_lora_linear: weight requires grad"):
        svd_lora_linear(**operands)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *bad_base_layers(7, 9),
        ("x", torch.zeros(5, 8), r"weight must have shape \[d_out, d_in\] = \[7, 8\], got \[7, 9\]"),
        ("x", torch.zeros(5, 9, dtype=torch.int64), "x must have dtype float32, bfloat16 or float16, got torch.int64"),
        ("h", torch.zeros(4, 3), r"h must have shape \[rows, r_b\] = \[5, 3\], got \[4, 3\]"),
        ("h", torch.zeros(5, 6)[:, ::2], r"h must be rows of adjacent elements, got strides \[6, 2\]"),
        ("u_b", torch.zeros(7, 6)[:, ::2], r"u_b or its transpose must be contiguous, got strides \[6, 2\]"),
    ],
)
def test_bad_operands_of_expand_linear_are_refused(name, value, message, seed):
    operands = {"x": torch.randn(5, 9), "weight": torch.randn(7, 9), "h": torch.randn(5, 3), "u_b": torch.randn(7, 3)}
    operands["bias"] = torch.randn(7)
    with pytest.raises(ValueError, match=f"^svd_lora_expand_linear: {message}"):
        svd_lora_expand_linear(**(operands | {name: value}))
    operands["x"].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="svd_lora_expand_linear: x requires grad"):
        svd_lora_expand_linear(**operands)


# In somebody else's module


class AdaptedLinear(nn.Module):
    """A linear layer whose rows belong to the members of a population."""

    def __init__(self, linear: nn.Linear, operands: Operands) -> None:
        super().__init__()
        self.linear = linear
        for name, operand in operands._asdict().items():
            if name != "x":
                self.register_buffer(name, operand)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return svd_lora(x, self.v_a, self.core, self.u_b, self.s_a, self.s_b, self.offsets, y)


def test_in_a_module(seed):
    operands = random_operands([2, 0, 3], 9, 7, 4, 3)
    model = nn.Sequential(AdaptedLinear(nn.Linear(9, 7), operands), nn.ReLU())
    expected = with_torch(operands, model[0].linear(operands.x), torch.float32).relu()
    assert_close(model(operands.x), expected)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(operands.x), expected)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="svd_lora: y requires grad"):
        model(operands.x)


def test_infinities_stay_infinite(dtype, seed, native):
    h, u_b = torch.randn(9, 8), (torch.rand(70, 8) + 0.5).to(dtype)
    h[3, 5], h[4, 0], h[5, 7] = torch.inf, -torch.inf, torch.nan
    y = svd_lora_expand_(torch.zeros(9, 70, dtype=dtype), h, u_b, backend="cpu")
    assert (y[3] == torch.inf).all()
    assert (y[4] == -torch.inf).all()
    assert y[5].isnan().all()
    assert y[[0, 1, 2, 6, 7, 8]].isfinite().all()


# Layouts


def test_leading_dimensions_are_rows(backend, dtype, seed):
    name, device = backend
    operands = random_operands([4, 8], 65, 33, 8, 8, dtype, device)
    flat = svd_lora(*operands, backend=name)
    folded = operands.replace(x=operands.x.view(2, 3, 2, 65))
    assert_close(svd_lora(*folded, backend=name), flat.view(2, 3, 2, 33))
    y = torch.zeros(2, 3, 2, 33, dtype=dtype, device=device)
    assert_close(svd_lora(*folded, y, backend=name), flat.view(2, 3, 2, 33))
    assert_close(svd_lora_shrink(*folded.of_shrink, backend=name), svd_lora_shrink(*operands.of_shrink, backend=name))


def test_strided_rows(backend, dtype, seed):
    name, device = backend
    operands = random_operands([5, 30], 65, 33, 8, 8, dtype, device)
    expected = svd_lora(*operands, backend=name)
    frame = torch.full((35, 100), torch.nan, dtype=dtype, device=device)
    frame[:, 3:68] = operands.x
    into = torch.full((35, 50), torch.nan, dtype=dtype, device=device)
    into[:, 7:40] = 0
    svd_lora(*operands.replace(x=frame[:, 3:68]), into[:, 7:40], backend=name)
    assert_close(into[:, 7:40], expected)
    assert into[:, :7].isnan().all()
    assert into[:, 40:].isnan().all()


@pytest.mark.parametrize("view", [lambda x: x.T.contiguous().T, lambda x: x.repeat_interleave(2, 1)[:, ::2]])
def test_x_of_any_strides(backend, seed, view):
    name, device = backend
    operands = random_operands([5, 30], 65, 33, 8, 8, device=device)
    expected = svd_lora(*operands, backend=name)
    assert_close(svd_lora(*operands.replace(x=view(operands.x)), backend=name), expected)


def test_one_row_for_all(backend, seed):
    name, device = backend
    operands = random_operands([5, 30], 65, 33, 8, 8, device=device)
    shared = operands.x[:1].expand(35, 65)
    expected = svd_lora(*operands.replace(x=shared.contiguous()), backend=name)
    assert_close(svd_lora(*operands.replace(x=shared), backend=name), expected)


@pytest.mark.parametrize("rank", [8, 5])
def test_u_b_in_either_order(backend, dtype, rank, seed):
    name, device = backend
    operands = random_operands([5, 30], 65, 129, rank, rank, dtype, device)
    rank_major = operands.replace(u_b=operands.u_b.T.contiguous().T)
    assert_close(svd_lora(*rank_major, backend=name), svd_lora(*operands, backend=name))
    y, h = torch.zeros(35, 129, dtype=dtype, device=device), torch.randn(35, rank, device=device)
    assert_close(
        svd_lora_expand_(y.clone(), h, rank_major.u_b, backend=name), svd_lora_expand_(y, h, operands.u_b, backend=name)
    )


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_no_rows(backend, counts):
    name, device = backend
    operands = random_operands(counts, 65, 33, 8, 8, device=device)
    assert svd_lora(*operands, backend=name).shape == (0, 33)
    h = svd_lora_shrink(*operands.of_shrink, backend=name)
    assert h.shape == (0, 8)
    assert svd_lora_expand_(torch.empty(0, 33, device=device), h, operands.u_b, backend=name).shape == (0, 33)


def test_threads_change_nothing(dtype, seed, native):
    operands = random_operands([1] * 50 + [77], 300, 200, 8, 8, dtype)
    assert_threads_change_nothing(lambda: svd_lora(*operands, backend="cpu"))


def test_the_plain_case_is_one_compiled_call(dtype, seed, native):
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch does not show tensors to compiled calls")
    operands = random_operands([4, 0, 8], 65, 33, 8, 8, dtype)
    y, h = torch.zeros(12, 33, dtype=dtype), torch.full((12, 8), torch.nan)
    for op, tensors in [
        ("svd_lora", (y, *operands)),
        ("svd_lora_shrink", (h, *operands.of_shrink)),
        ("svd_lora_expand_", (y, h, operands.u_b)),
    ]:
        before = tensors[0].clone()
        assert dispatch.direct(op)(*tensors, 0) is False
        assert_close(tensors[0], before, rtol=0, atol=0, equal_nan=True)
        assert dispatch.direct(op)(*tensors, 1) is True
        assert not torch.equal(tensors[0], before)
        assert dispatch.direct(op)(*tensors[:-1], tensors[-1][:-1], 1) is None


def test_a_torch_that_shows_no_tensors_computes_the_same(dtype, seed, native, monkeypatch):
    operands = random_operands([4, 0, 8], 65, 33, 8, 8, dtype)

    def both_ways() -> tuple[Tensor, Tensor]:
        h = svd_lora_shrink(*operands.of_shrink)
        return svd_lora(*operands), svd_lora_expand_(torch.zeros(12, 33, dtype=dtype), h, operands.u_b)

    expected = both_ways()
    monkeypatch.setattr(dispatch, "direct", lambda op: lambda *_: None)
    assert_close(both_ways(), expected, rtol=0, atol=0)


def test_every_instruction_set(isa_environment):
    """The tests of values, in a process that is held to one instruction set."""
    run_tests("any_sizes or (cpu-cpu and halves)", isa_environment, __file__)


# Registration


def test_opcheck(seed):
    operands = random_operands([2, 0, 3], 9, 7, 4, 3)
    y, h = torch.randn(5, 7), torch.randn(5, 3)
    torch.library.opcheck(torch.ops.essa.svd_lora.default, tuple(operands))
    torch.library.opcheck(torch.ops.essa.svd_lora_.default, (y, *operands))
    torch.library.opcheck(torch.ops.essa.svd_lora_shrink.default, operands.of_shrink)
    torch.library.opcheck(torch.ops.essa.svd_lora_expand_.default, (y, h, operands.u_b))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, seed):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def layer(operands: Operands, weight: Tensor) -> Tensor:
        y = operands.x @ weight
        svd_lora(*operands, y)
        x, v_a, core, _, s_a, s_b, offsets = operands
        h = svd_lora_shrink(x, v_a, core, s_a, s_b, offsets)
        return svd_lora_expand_(y * 2, h, operands.u_b) + svd_lora(*operands)

    for counts in ([2, 3], [4, 7]):
        operands = random_operands(counts, 9, 7, 4, 3)
        weight = torch.randn(9, 7)
        y = svd_lora(*operands, operands.x @ weight)
        expected = svd_lora(*operands, y * 2) + svd_lora(*operands)
        assert_close(layer(operands, weight), expected)


def test_meta_tensors_have_the_shape():
    operands = random_operands([2, 3], 9, 7, 4, 3, torch.bfloat16, "meta")
    assert svd_lora(*operands).shape == (5, 7)
    assert svd_lora(*operands).dtype is torch.bfloat16
    assert svd_lora_shrink(*operands.of_shrink).dtype is torch.float32


@pytest.mark.parametrize("name", ["x", "v_a", "core", "u_b", "s_a", "s_b"])
def test_gradients_are_refused(name, seed):
    operands = random_operands([2, 3], 9, 7, 4, 3)
    operands = operands.replace(**{name: getattr(operands, name).requires_grad_()})
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match=f"svd_lora: {name} requires grad, but svd_lora has no b"),
    ):
        svd_lora(*operands)
    svd_lora(*operands)


def test_gradients_of_y_and_h_are_refused(seed):
    operands = random_operands([2, 3], 9, 7, 4, 3)
    y, h = torch.zeros(5, 7), torch.zeros(5, 3)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="svd_lora: y requires grad"):
            svd_lora(*operands, torch.zeros(5, 7, requires_grad=True))
        with pytest.raises(RuntimeError, match="svd_lora_expand_: h requires grad"):
            svd_lora_expand_(y, torch.zeros(5, 3, requires_grad=True), operands.u_b)
        svd_lora_expand_(y, h, operands.u_b)


# Bad input: counts [2, 3], d_in 9, d_out 7, r_a 4, r_b 3


def _offsets(*values: int) -> Tensor:
    return torch.tensor(values)


BAD_SHRINK_OPERANDS = [
    ("x", torch.zeros(5, 9, dtype=torch.float64), "x must have dtype float32, bfloat16 or float16, got torch.float64"),
    ("x", torch.zeros(()), "x must have at least one dimension, got none"),
    ("x", torch.zeros(5, 8), r"x must have shape \[..., d_in\] = \[5, 9\], got \[5, 8\]"),
    ("x", torch.zeros(5, 9).half(), "v_a must have dtype torch.float16, got torch.float32"),
    ("v_a", torch.zeros(9), r"v_a must have shape \[r_a, d_in\] with r_a >= 1 and d_in >= 1, got \[9\]"),
    ("v_a", torch.zeros(0, 9), r"v_a must have shape \[r_a, d_in\] with r_a >= 1 and d_in >= 1, got \[0, 9\]"),
    ("v_a", torch.zeros(9, 4).T, r"v_a must be contiguous, got strides \[1, 4\]"),
    ("v_a", torch.zeros(4, 9, device="meta"), "v_a must be on cpu, got meta"),
    ("core", torch.zeros(4, 3), r"core must have shape \[r_b, r_a\] = \[3, 4\], got \[4, 3\]"),
    ("core", torch.zeros(3, 4).bfloat16(), "core must have dtype torch.float32, got torch.bfloat16"),
    ("core", torch.zeros(4, 3).T, r"core must be contiguous, got strides \[1, 3\]"),
    ("s_a", torch.zeros(3, 4), r"s_a must have shape \[members, r_a\] = \[2, 4\], got \[3, 4\]"),
    ("s_a", torch.zeros(2, 4).half(), "s_a must have dtype torch.float32, got torch.float16"),
    ("s_a", torch.zeros(2, 8)[:, ::2], r"s_a must be contiguous, got strides \[8, 2\]"),
    ("s_b", torch.zeros(2), r"s_b must have shape \[members, r_b\] with members >= 0 and r_b >= 1, got \[2\]"),
    ("s_b", torch.zeros(2, 5), r"core must have shape \[r_b, r_a\] = \[5, 4\], got \[3, 4\]"),
    ("s_b", torch.zeros(4, 3)[::2], r"s_b must be contiguous, got strides \[6, 1\]"),
    ("offsets", _offsets(0, 5), r"offsets must have shape \[members \+ 1\] = \[3\], got \[2\]"),
    ("offsets", _offsets(0, 2, 5).int(), "offsets must have dtype torch.int64, got torch.int32"),
    ("offsets", _offsets(1, 2, 5), "offsets must start with 0 and end with the number of rows, 5, got 1 and 5"),
    ("offsets", _offsets(0, 2, 4), "offsets must start with 0 and end with the number of rows, 5, got 0 and 4"),
    ("offsets", _offsets(0, 6, 5), "offsets must not descend, got 6, 5 at member 1"),
    ("offsets", _offsets(0, 9, 2, 9, 5)[::2], r"offsets must be contiguous, got strides \[2\]"),
]
BAD_U_B = [
    (torch.zeros(7), r"u_b must have shape \[d_out, r_b\] with d_out >= 1 and r_b >= 1, got \[7\]"),
    (torch.zeros(7, 4), r"u_b must have shape \[d_out, r_b\] = \[7, 3\], got \[7, 4\]"),
    (torch.zeros(7, 3).half(), "u_b must have dtype torch.float32, got torch.float16"),
    (torch.zeros(7, 6)[:, ::2], r"u_b or its transpose must be contiguous, got strides \[6, 2\]"),
]
BAD_Y = [
    (torch.zeros(5, 7).half(), "y must have dtype torch.float32, got torch.float16"),
    (torch.zeros(5, 6), r"y must have shape \[..., d_out\] = \[5, 7\], got \[5, 6\]"),
    (torch.zeros(6, 7), r"y must have shape \[..., d_out\] = \[5, 7\], got \[6, 7\]"),
    (torch.zeros(7, 5).T, r"y must be rows of adjacent elements at one stride, got strides \[1, 5\]"),
    (torch.zeros(7).expand(5, 7), r"y must be rows of adjacent elements at one stride, got strides \[0, 1\]"),
]


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize(("name", "value", "message"), BAD_SHRINK_OPERANDS)
def test_bad_operands_are_refused(name, value, message, grad_mode, seed):
    operands = random_operands([2, 3], 9, 7, 4, 3).replace(**{name: value})
    y = torch.full((*operands.x.shape[:-1], 7), 5.0)
    before = y.clone()
    with torch.set_grad_enabled(grad_mode):
        if name != "x":
            with pytest.raises(ValueError, match=f"^svd_lora: {message}"):
                svd_lora(*operands, y)
        with pytest.raises(ValueError, match=f"^svd_lora: {message}"):
            svd_lora(*operands)
        with pytest.raises(ValueError, match=f"^svd_lora_shrink: {message}"):
            svd_lora_shrink(*operands.of_shrink)
    assert torch.equal(y, before)


@pytest.mark.parametrize(("u_b", "message"), BAD_U_B)
def test_bad_u_b_is_refused(u_b, message, seed):
    operands = random_operands([2, 3], 9, 7, 4, 3).replace(u_b=u_b)
    with pytest.raises(ValueError, match=f"^svd_lora: {message}"):
        svd_lora(*operands)
    with pytest.raises(ValueError, match=f"^svd_lora: {message}"):
        svd_lora(*operands, torch.zeros(5, 7))


@pytest.mark.parametrize(("y", "message"), BAD_Y)
def test_bad_y_is_refused(y, message, seed):
    with pytest.raises(ValueError, match=f"^svd_lora: {message}"):
        svd_lora(*random_operands([2, 3], 9, 7, 4, 3), y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": torch.zeros(5, 7).double()}, "y must have dtype float32, bfloat16 or float16, got torch.float64"),
        ({"y": torch.zeros(())}, "y must have at least one dimension, got none"),
        ({"y": torch.zeros(5, 6)}, r"y must have shape \[..., d_out\] = \[5, 7\], got \[5, 6\]"),
        ({"y": torch.zeros(7, 5).T}, "y must be rows of adjacent elements at one stride"),
        ({"h": torch.zeros(4, 3)}, r"h must have shape \[rows, r_b\] = \[5, 3\], got \[4, 3\]"),
        ({"h": torch.zeros(5, 4)}, r"h must have shape \[rows, r_b\] = \[5, 3\], got \[5, 4\]"),
        ({"h": torch.zeros(5, 3).half()}, "h must have dtype torch.float32, got torch.float16"),
        ({"h": torch.zeros(3, 5).T}, r"h must be rows of adjacent elements, got strides \[1, 5\]"),
        ({"u_b": torch.zeros(7, 3).half()}, "u_b must have dtype torch.float32, got torch.float16"),
        ({"u_b": torch.zeros(7)}, r"u_b must have shape \[d_out, r_b\] with d_out >= 1 and r_b >= 1, got \[7\]"),
        ({"u_b": torch.zeros(7, 6)[:, ::2]}, r"u_b or its transpose must be contiguous, got strides \[6, 2\]"),
    ],
)
def test_bad_operands_of_expand_are_refused(arguments, message):
    arguments = {"y": torch.zeros(5, 7), "h": torch.zeros(5, 3), "u_b": torch.zeros(7, 3)} | arguments
    with pytest.raises(ValueError, match=f"^svd_lora_expand_: {message}"):
        svd_lora_expand_(**arguments)


def test_bad_backends_are_refused(seed):
    operands = random_operands([2, 3], 9, 7, 4, 3)
    with pytest.raises(
        ValueError, match="svd_lora: backend must be one of cpu, cuda, triton, reference or None, got 'x'"
    ):
        svd_lora(*operands, backend="x")
    with pytest.raises(RuntimeError, match="svd_lora: backend 'cuda' is not available: it takes cuda tensors, not cpu"):
        svd_lora(*operands, backend="cuda")


def test_no_tensor_is_refused(seed):
    operands = random_operands([2, 3], 9, 7, 4, 3)
    with pytest.raises(TypeError, match="svd_lora: v_a must be a tensor, got list"):
        svd_lora(*operands.replace(v_a=[1.0]))
    with pytest.raises(TypeError, match="svd_lora: x must be a tensor, got NoneType"):
        svd_lora(*[None] * 7)
    with pytest.raises(TypeError, match="svd_lora_expand_: h must be a tensor, got int"):
        svd_lora_expand_(operands.x, 1, operands.u_b)
    with pytest.raises(TypeError, match="y must be a tensor, got list"):
        svd_lora(*operands, y=[1.0])


def test_the_reference_is_exact_whatever_the_process_allows(seed):
    operands = random_operands([20, 44], 512, 300, 16, 16)
    exact = svd_lora(*operands, backend="reference")
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(svd_lora(*operands, backend="reference"), exact)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_autograd_notices_that_y_has_changed():
    weight, y = torch.ones(3, 5, requires_grad=True), torch.ones(3, 5)
    with torch.enable_grad():
        loss = (weight * y).sum()
    with torch.no_grad():
        svd_lora_expand_(y, torch.ones(3, 2), torch.ones(5, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
