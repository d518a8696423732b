"""lowrank_perturbed against float64 and lowrank_update_ bit for bit, on every backend this machine has."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from essa_kernels import NoiseKey, lowrank_perturbed, lowrank_perturbed_linear, lowrank_update_

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
    run_tests,
    skip_unavailable,
)

SIGMA = 0.37

# members, d_out, d_in, rank
UPDATES = {
    "one of everything": (1, 1, 1, 1),
    "odd": (7, 129, 65, 1),
    "rank 3": (10, 70, 258, 3),
    "more than a tile": (3, 300, 1134, 2),
    "more factors than are held at once": (150, 33, 31, 1),
    "large rank": (4, 17, 40, 67),
    "several tiles of noise": (2, 4100, 3, 1),
}


class Operands(NamedTuple):
    """The tensors that lowrank_perturbed takes, and the sizes it cannot read from them."""

    x: Tensor
    members: Tensor
    offsets: Tensor
    d_out: int
    rank: int

    def replace(self, **operands: Tensor) -> Operands:
        return self._replace(**operands)


def random_operands(
    members: list[int], counts: list[int], d_in: int, d_out: int, rank: int, dtype=torch.float32, device: str = "cpu"
) -> Operands:
    """Operands for groups of so many rows, scaled so that results are about 1."""
    return Operands(
        torch.randn(sum(counts), d_in).div(d_in**0.5).to(device, dtype),
        torch.tensor(members, dtype=torch.int64, device=device),
        offsets_of(counts).to(device),
        d_out,
        rank,
    )


def call(operands: Operands, y: Tensor | None = None, distribution: str = "gaussian", **arguments) -> Tensor:
    x, members, offsets, d_out, rank = operands
    options = {"rank": rank, "distribution": distribution, "y": y, **arguments}
    return lowrank_perturbed(x, d_out, KEY, SIGMA, members, offsets, **options)


def call_linear(
    operands: Operands, weight: Tensor, bias: Tensor | None = None, distribution: str = "gaussian", **arguments
) -> Tensor:
    x, members, offsets, _, rank = operands
    options = {"rank": rank, "distribution": distribution, **arguments}
    return lowrank_perturbed_linear(x, weight, KEY, SIGMA, members, offsets, bias, **options)


def with_torch(operands: Operands, y: Tensor | None, distribution: str, dtype: torch.dtype) -> Tensor:
    """Member by member with its factors materialised, computed in ``dtype`` throughout: float64 for the truth."""
    x, members, offsets, d_out, rank = operands
    result = torch.zeros(len(x), d_out, dtype=dtype, device=x.device) if y is None else y.to(dtype)
    for member, rows in groups(members, offsets):
        f_t = noise((rank, x.shape[1]), distribution, KEY.site, member & ~1).to(x.device, dtype)
        e_t = noise((rank, d_out), distribution, KEY.site + 1, member & ~1).to(x.device, dtype)
        scale = (-SIGMA if member & 1 else SIGMA) / math.sqrt(rank)
        result[rows] += scale * (x[rows].to(dtype) @ f_t.T) @ e_t
    return result


def assert_right(got: Tensor, operands: Operands, y: Tensor | None, distribution: str = "gaussian") -> None:
    """No worse than torch in float32 throughout with one rounding at the end."""
    truth, torchs = (with_torch(operands, y, distribution, dtype) for dtype in (torch.float64, torch.float32))
    assert_no_worse_than_torch(got, torchs.to(got.dtype), truth)


@pytest.fixture(params=["gaussian", "rademacher"])
def distribution(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def without_grad():
    with torch.no_grad():
        yield


# Values of the forward


@pytest.mark.parametrize("case", CASES)
def test_perturbed(backend, dtype, case, distribution, seed):
    name, device = backend
    operands = random_operands(*CASES[case], dtype, device)
    y = torch.randn(len(operands.x), operands.d_out).to(device, dtype)
    before = y.clone()
    assert call(operands, y, distribution, backend=name) is y
    assert_right(y, operands, before, distribution)


@pytest.mark.parametrize("case", ["pairs", "rows of several tiles", "large rank"])
def test_without_y_it_starts_from_zero(backend, dtype, case, distribution, seed):
    name, device = backend
    operands = random_operands(*CASES[case], dtype, device)
    assert_right(call(operands, None, distribution, backend=name), operands, None, distribution)


@given(
    members=st.lists(st.integers(0, 20), unique=True, max_size=12),
    data=st.data(),
    d_in=st.integers(1, 200),
    d_out=st.integers(1, 200),
    rank=st.integers(1, 9),
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


def test_a_pair_is_antithetic(backend, distribution, seed):
    """Member 2k + 1 gives the negative of what member 2k gives, bit for bit."""
    name, device = backend
    x = torch.randn(7, 129, device=device)
    plus, minus = (
        lowrank_perturbed(
            x,
            65,
            KEY,
            SIGMA,
            torch.tensor([member], device=device),
            torch.tensor([0, 7], device=device),
            rank=3,
            distribution=distribution,
            backend=name,
        )
        for member in (10, 11)
    )
    assert torch.equal(plus, -minus)


def test_a_row_depends_on_its_own_group_only(backend, dtype, seed):
    name, device = backend
    operands = random_operands([2, 3, 8], [30, 30, 30], 129, 65, 2, dtype, device)
    x = torch.full_like(operands.x, torch.nan)
    x[30:60] = operands.x[30:60]
    got = call(operands.replace(x=x), backend=name)
    assert_close(got[30:60], call(operands, backend=name)[30:60], rtol=0, atol=0)
    assert got[:30].isnan().all()
    assert got[60:].isnan().all()


def test_layouts_of_rows(backend, dtype, seed):
    name, device = backend
    operands = random_operands([5, 4], [4, 8], 65, 33, 2, dtype, device)
    expected = call(operands, backend=name)
    assert_close(call(operands.replace(x=operands.x.view(2, 3, 2, 65)), backend=name), expected.view(2, 3, 2, 33))
    assert_close(call(operands.replace(x=operands.x.repeat_interleave(2, 1)[:, ::2]), backend=name), expected)
    frame = torch.full((12, 100), torch.nan, dtype=dtype, device=device)
    frame[:, 3:68] = operands.x
    into = torch.full((12, 50), torch.nan, dtype=dtype, device=device)
    into[:, 7:40] = 0
    call(operands.replace(x=frame[:, 3:68]), into[:, 7:40], backend=name)
    assert_close(into[:, 7:40], expected)
    assert into[:, :7].isnan().all()
    assert into[:, 40:].isnan().all()


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_no_rows(backend, counts):
    name, device = backend
    operands = random_operands(list(range(len(counts))), counts, 65, 33, 2, device=device)
    assert call(operands, backend=name).shape == (0, 33)


# With its base layer


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_linear(backend, dtype, case, biased, distribution, seed):
    operands = random_operands(*CASES[case], dtype, backend[1])
    assert_linear_no_worse_than_torch(
        backend,
        "lowrank_perturbed_linear",
        lambda weight, bias: call_linear(operands, weight, bias, distribution, backend=backend[0]),
        lambda base, precision: with_torch(operands, base, distribution, precision),
        operands.x,
        operands.d_out,
        biased=biased,
        precision=torch.float32,
    )


def test_linear_of_any_layout(backend, dtype, seed):
    operands = random_operands([5, 4], [4, 8], 65, 33, 2, dtype, backend[1])
    assert_linear_takes_any_layout(
        backend,
        "lowrank_perturbed_linear",
        lambda x, weight: call_linear(operands.replace(x=x), weight, backend=backend[0]),
        operands.x,
        33,
    )


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_linear_of_no_rows(backend, counts):
    name, device = backend
    skip_unavailable(name, device, "lowrank_perturbed_linear")
    operands = random_operands(list(range(len(counts))), counts, 65, 33, 2, device=device)
    assert call_linear(operands, torch.zeros(33, 65, device=device), backend=name).shape == (0, 33)


def test_a_pair_is_antithetic_in_linear(backend, distribution, seed):
    x, _, offsets, *_ = random_operands([0, 1], [7, 5], 129, 65, 3, device=backend[1])
    weight = torch.randn(65, 129, device=backend[1])
    options = {"rank": 3, "distribution": distribution, "backend": backend[0]}

    def of(sigma: float, members: Tensor) -> Tensor:
        return lowrank_perturbed_linear(x, weight, KEY, sigma, members, offsets, **options)

    assert_linear_is_antithetic(backend, "lowrank_perturbed_linear", of)


def test_a_row_of_linear_depends_on_its_own_group_only(backend, dtype, seed):
    name, device = backend
    operands = random_operands([2, 3, 8], [30, 30, 30], 129, 65, 2, dtype, device)
    weight = torch.randn(65, 129).to(device, dtype)
    assert_rows_of_linear_are_apart(
        backend,
        "lowrank_perturbed_linear",
        lambda x: call_linear(operands.replace(x=x), weight, backend=name),
        operands.x,
    )


def test_threads_change_nothing(dtype, distribution, seed, native):
    operands = random_operands([*range(50), 77], [1] * 50 + [300], 300, 2100, 2, dtype)
    assert_threads_change_nothing(lambda: call(operands, None, distribution, backend="cpu"))
    w, weights = torch.randn(300, 600).to(dtype), torch.randn(20)
    options = {"rank": 3, "distribution": distribution, "backend": "cpu"}
    assert_threads_change_nothing(lambda: lowrank_update_(w.clone(), KEY, weights, **options))


def test_every_instruction_set(isa_environment):
    """The tests of values, with those of lora_perturbed, in a process that is held to one instruction set."""
    files = __file__, __file__.replace("lowrank", "lora_perturbed")
    run_tests("any_sizes or any_update or (cpu-cpu and tile)", isa_environment, *files)


FORWARD = """
import torch
from essa_kernels import NoiseKey, lowrank_perturbed

torch.set_num_threads(1)
x, y = torch.randn(4096, 256), torch.randn(4096, 256)
groups = {count: (torch.arange(count), torch.arange(0, 4097, 4096 // count)) for count in (8, 4096)}
lowrank_perturbed(x, 256, NoiseKey(0), 0.1, *groups[8], rank=8, y=y, backend="cpu")
"""


def test_memory_of_the_forward_does_not_grow_with_the_members(native):
    """Of the same 4096 rows, beside them and y: the factors of one pair are 16 KiB, those of 2048 are 32 MiB."""
    call = 'lowrank_perturbed(x, 256, NoiseKey(1), 0.1, *groups[{}], rank=8, y=y, backend="cpu")'
    few, many = peaks(FORWARD, call.format(8), call.format(4096))
    assert few < 1024
    assert many < 1024


# Values of the update


def assert_bits(got: Tensor, expected: Tensor) -> None:
    integers = torch.int32 if got.dtype is torch.float32 else torch.int16
    assert torch.equal(got.cpu().view(integers), expected.view(integers))


@pytest.mark.parametrize("case", UPDATES)
def test_update_has_the_bits_of_the_reference(backend, dtype, case, distribution, seed):
    name, device = backend
    if name == "reference":
        pytest.skip("it is what the others are held to")
    members, d_out, d_in, rank = UPDATES[case]
    w, weights = torch.randn(d_out, d_in).to(dtype), torch.randn(members)
    got = w.to(device, copy=True)
    options = {"rank": rank, "distribution": distribution}
    assert lowrank_update_(got, KEY, weights, backend=name, **options) is got
    assert_bits(got, lowrank_update_(w, KEY, weights, backend="reference", **options))


@given(
    members=st.integers(1, 40),
    d_out=st.integers(1, 300),
    d_in=st.integers(1, 300),
    rank=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
    data_seed=st.integers(0, 2**32 - 1),
)
def test_any_update(members, d_out, d_in, rank, dtype, distribution, data_seed):
    torch.manual_seed(data_seed)
    w, weights = torch.randn(d_out, d_in).to(dtype), torch.randn(members)
    weights[torch.rand(members) < 0.3] = 0
    options = {"rank": rank, "distribution": distribution}
    expected = lowrank_update_(w.clone(), KEY, weights, backend="reference", **options)
    assert_bits(lowrank_update_(w, KEY, weights, **options), expected)


def test_update_is_the_sum_of_the_members_noise(backend, dtype, distribution, seed):
    """The noise lowrank_perturbed multiplies with is the noise lowrank_update_ adds."""
    name, device = backend
    d_out, d_in, rank, weights = 65, 33, 2, [0.5, -1.0, 0.25, 0.0, 2.0]
    w = torch.randn(d_out, d_in).to(device, dtype)
    truth = w.double()
    for member, weight in enumerate(weights):
        f_t = noise((rank, d_in), distribution, KEY.site, member & ~1).to(device)
        e_t = noise((rank, d_out), distribution, KEY.site + 1, member & ~1).to(device)
        truth += (-weight if member & 1 else weight) / math.sqrt(rank) * e_t.T @ f_t
    lowrank_update_(w, KEY, weights, rank=rank, distribution=distribution, backend=name)
    assert_no_worse_than_torch(w, truth.float().to(dtype), truth)


def test_a_list_of_weights_draws_from_successive_sites(backend, dtype, seed):
    name, device = backend
    weights = torch.randn(6)
    many = [torch.randn(shape).to(device, dtype) for shape in ((5, 70), (64, 1), (129, 65))]
    alone = [w.clone() for w in many]
    assert lowrank_update_(many, KEY, weights, rank=2, backend=name) is many
    for i, (w, expected) in enumerate(zip(many, alone, strict=True)):
        lowrank_update_(expected, KEY.at(site=KEY.site + 2 * i), weights, rank=2, backend=name)
        assert torch.equal(w, expected)


def test_pairs_that_weigh_nothing_change_nothing(backend, seed):
    name, device = backend
    w = torch.randn(9, 7, device=device)
    before = w.clone()
    lowrank_update_(w, KEY, [0.0, 0.0, 1.5, 1.5, 0.0], backend=name)
    assert torch.equal(w, before)


UPDATE = """
import torch
from essa_kernels import NoiseKey, lowrank_update_

w, weights = torch.zeros(512, 1024, dtype=torch.bfloat16), {members: torch.randn(members) for members in (8, 512)}
lowrank_update_(w, NoiseKey(0), torch.ones(2), rank=8, backend="cpu")
"""


def test_memory_of_an_update_does_not_grow_with_the_members(native):
    """Beside w there is room for neither [members, d, rank] nor [d_out, d_in] in float32."""
    call = 'lowrank_update_(w, NoiseKey(0), weights[{}], rank=8, backend="cpu")'
    few, many = peaks(UPDATE, call.format(8), call.format(512))
    assert few < 1024
    assert many < 1024  # the pairs' factors in float32 would be 12 thousand, w in float32 two


# Registration


def test_opcheck(seed):
    x, *where, d_out, rank = random_operands([2, 3, 9], [2, 0, 3], 9, 7, 3)
    arguments = (x, d_out, 5, 1, 2, SIGMA, *where, rank, "rademacher", None)
    torch.library.opcheck(torch.ops.essa.lowrank_perturbed.default, arguments)
    torch.library.opcheck(torch.ops.essa.lowrank_perturbed_.default, (torch.randn(5, 7), *arguments))
    for bias in (None, torch.randn(7)):
        arguments = (x, torch.randn(7, 9), 5, 1, 2, SIGMA, *where, bias, rank, "rademacher", None)
        torch.library.opcheck(torch.ops.essa.lowrank_perturbed_linear.default, arguments)
    weights = [torch.randn(5, 7), torch.randn(3, 4)]
    torch.library.opcheck(
        torch.ops.essa.lowrank_update_.default, (weights, 5, 1, 2, torch.randn(3), 2, "gaussian", None)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, seed):
    def step(operands: Operands, weight: Tensor) -> Tensor:
        y = operands.x @ weight
        call(operands, y)
        lowrank_update_(weight, KEY, torch.arange(4.0), rank=2)
        return call_linear(operands, weight.T.contiguous(), y[0]) + call(operands, distribution="rademacher")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for members, counts in (([0, 1], [2, 3]), ([7, 2], [4, 7])):
        operands = random_operands(members, counts, 9, 7, 3)
        weight = torch.randn(9, 7)
        other = weight.clone()
        assert_close(compiled(operands, other), step(operands, weight))
        assert torch.equal(other, weight)


def test_meta_tensors_have_the_shape():
    operands = random_operands([0, 1], [2, 3], 9, 7, 3, torch.bfloat16, "meta")
    assert call(operands).shape == (5, 7)
    assert call(operands).dtype is torch.bfloat16
    y = call_linear(operands, torch.empty(7, 9, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype) == ((5, 7), torch.bfloat16)


def test_gradients_are_refused(seed):
    operands = random_operands([0, 1], [2, 3], 9, 7, 3)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="lowrank_perturbed: x requires grad, but lowrank_perturbed has no back"):
            call(operands.replace(x=operands.x.clone().requires_grad_()))
        for name in ("x", "weight", "bias"):
            linear = {"x": operands.x, "weight": torch.zeros(7, 9), "bias": torch.zeros(7), "key": KEY, "sigma": SIGMA}
            linear |= {"members": operands.members, "offsets": operands.offsets}
            linear[name] = linear[name].clone().requires_grad_()
            message = f"lowrank_perturbed_linear: {name} requires grad, but lowrank_perturbed_linear has no backward"
            with pytest.raises(RuntimeError, match=message):
                lowrank_perturbed_linear(**linear)
        with pytest.raises(RuntimeError, match="lowrank_perturbed: y requires grad"):
            call(operands, torch.zeros(5, 7, requires_grad=True))
        with pytest.raises(RuntimeError, match=r"lowrank_update_: w\[1\] requires grad"):
            lowrank_update_([torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)], KEY, [1.0])


def test_autograd_notices_that_a_tensor_has_changed(seed):
    factor, y, w = torch.ones(5, 7, requires_grad=True), torch.ones(5, 7), torch.ones(5, 7)
    with torch.enable_grad():
        losses = (factor * y).sum(), (factor * w).sum()
    call(random_operands([0, 1], [2, 3], 9, 7, 3), y)
    lowrank_update_(w, KEY, [1.0])
    for loss in losses:
        with torch.enable_grad(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Bad input: rows [2, 3], d_in 9, d_out 7, rank 3


BAD_OPERANDS = [
    ("x", torch.zeros(5, 9, dtype=torch.float64), "x must have dtype float32, bfloat16 or float16, got torch.float64"),
    ("x", torch.zeros(()), "x must have at least one dimension, got none"),
    ("x", torch.zeros(5, 0), r"x must have shape \[..., d_in\] with d_in >= 1, got \[5, 0\]"),
    ("x", torch.zeros(6, 9), r"y must have shape \[..., d_out\] = \[6, 7\], got \[5, 7\]"),
    ("x", torch.zeros(5, 9).half(), "y must have dtype torch.float16, got torch.float32"),
    ("y", torch.zeros(5, 6), r"y must have shape \[..., d_out\] = \[5, 7\], got \[5, 6\]"),
    ("y", torch.zeros(5, 7, device="meta"), "y must be on cpu, got meta"),
    ("y", torch.zeros(7, 5).T, r"y must be rows of adjacent elements at one stride, got strides \[1, 5\]"),
    ("y", torch.zeros(7).expand(5, 7), r"y must be rows of adjacent elements at one stride, got strides \[0, 1\]"),
    ("members", torch.tensor([[0, 1]]), r"members must have shape \[groups\], got \[1, 2\]"),
    ("members", torch.tensor([0, 1]).int(), "members must have dtype torch.int64, got torch.int32"),
    ("members", torch.tensor([0, -1]), r"members must be in 0 .. 2\*\*33 - 1, got -1"),
    ("members", torch.tensor([4, 4]), "members must be distinct, got 4 twice"),
    ("members", torch.tensor([0, 5, 1])[::2], r"members must be contiguous, got strides \[2\]"),
    ("offsets", torch.tensor([0, 5]), r"offsets must have shape \[groups \+ 1\] = \[3\], got \[2\]"),
    ("offsets", torch.tensor([0, 2, 4]), "offsets must start with 0 and end with the number of rows, 5, got 0 and 4"),
    ("offsets", torch.tensor([0, 6, 5]), "offsets must not descend, got 6, 5 at member 1"),
    ("d_out", 0, "d_out must be >= 1, got 0"),
    ("rank", 0, "rank must be >= 1, got 0"),
    ("rank", 2**29, r"\[rank, d_in\] must fit the counter, rows \* ceil\(cols / 64\) \* 16 <= 2\*\*32, got \[5368"),
    ("key", NoiseKey(0, site=3), "key.site must be even, the second factor draws from the next, got 3"),
    ("sigma", float("inf"), "sigma must be finite in float32, got inf"),
    ("distribution", "normal", "distribution must be gaussian or rademacher, got 'normal'"),
]
BAD_UPDATES = [
    ({"w": []}, ValueError, "w must be a tensor or a sequence of at least one, got none"),
    (
        {"w": torch.zeros(2, 3).double()},
        ValueError,
        "w must have dtype float32, bfloat16 or float16, got torch.float64",
    ),
    ({"w": torch.zeros(6)}, ValueError, r"w must have shape \[d_out, d_in\], got \[6\]"),
    ({"w": torch.zeros(3, 2).T}, ValueError, r"w must be contiguous, got strides \[1, 2\]"),
    (
        {"w": [torch.zeros(2, 3), torch.zeros(2, 3, device="meta")]},
        ValueError,
        r"w\[1\] must be on cpu, got meta",
    ),
    ({"key": NoiseKey(0, site=1)}, ValueError, "key.site must be even, the second factor draws from the next, got 1"),
    ({"key": None}, TypeError, "key must be a NoiseKey, got None"),
    ({"weights": []}, ValueError, r"weights must have shape \[members\] with members >= 1, got \[0\]"),
    ({"weights": ["one"]}, TypeError, r"weights must be a float32 tensor or a sequence of numbers, got \['one'\]"),
    ({"weights": torch.ones(2).double()}, ValueError, "weights must have dtype torch.float32, got torch.float64"),
    ({"weights": torch.ones(2, 2)}, ValueError, r"weights must have shape \[members\] with members >= 1, got \[2, 2\]"),
    ({"weights": [1.0, float("nan")]}, ValueError, "weights must be finite, got nan for member 1"),
    ({"rank": 0}, ValueError, "rank must be >= 1, got 0"),
    ({"rank": 1.5}, TypeError, "rank must be an integer, got 1.5"),
    ({"rank": 2**29}, ValueError, r"w must fit the counter, rows \* ceil\(cols / 64\) \* 16 <= 2\*\*32, got \[2, 3\]"),
    ({"distribution": "normal"}, ValueError, "distribution must be gaussian or rademacher, got 'normal'"),
    ({"backend": "cuda"}, RuntimeError, "backend 'cuda' is not available: lowrank_update_ has no CUDA kernel"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_OPERANDS)
def test_bad_operands_are_refused(name, value, message, seed):
    arguments = {**random_operands([0, 1], [2, 3], 9, 7, 3)._asdict(), "y": torch.full((5, 7), 5.0)}
    before = arguments["y"].clone()
    with pytest.raises(ValueError, match=f"^lowrank_perturbed: {message}"):
        lowrank_perturbed(**{**arguments, "key": KEY, "sigma": SIGMA, name: value})
    assert torch.equal(arguments["y"], before)


BAD_WEIGHT = (
    "weight",
    torch.zeros(9),
    r"weight must have shape \[d_out, d_in\] with d_out >= 1 and d_in >= 1, got \[9\]",
)
OF_LINEAR = [bad for bad in BAD_OPERANDS if bad[0] not in ("x", "y", "d_out")]


@pytest.mark.parametrize(
    ("name", "value", "message"), [*BAD_OPERANDS[:3], *OF_LINEAR, *bad_base_layers(7, 9), BAD_WEIGHT]
)
def test_bad_operands_of_linear_are_refused(name, value, message, seed):
    x, members, offsets, *_ = random_operands([0, 1], [2, 3], 9, 7, 3)
    arguments = {
        "x": x,
        "weight": torch.zeros(7, 9),
        "members": members,
        "offsets": offsets,
        "key": KEY,
        "sigma": SIGMA,
    }
    with pytest.raises(ValueError, match=f"^lowrank_perturbed_linear: {message}"):
        lowrank_perturbed_linear(**{**arguments, name: value})


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_UPDATES)
def test_bad_updates_are_refused(arguments, error, message):
    w = torch.zeros(2, 3)
    with pytest.raises(error, match=f"^lowrank_update_: {message}"):
        lowrank_update_(**{"w": w, "key": KEY, "weights": [1.0, 2.0], **arguments})
    assert not w.any()


def test_no_tensor_is_refused(seed):
    operands = random_operands([0, 1], [2, 3], 9, 7, 3)
    with pytest.raises(TypeError, match="lowrank_perturbed: x must be a tensor, got list"):
        call(operands.replace(x=[1.0]))
