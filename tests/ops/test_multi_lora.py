"""multi_lora and its gradients against float64, on every backend this machine has."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from essa_kernels import dispatch, multi_lora

from .oracle import DTYPES, assert_no_worse_than_torch, assert_threads_change_nothing, run_tests

# ids of the rows, ranks of the adapters, d_in, d_out
CASES = {
    "one of everything": ([0], [1], 1, 1),
    "one row each": (list(range(12)), [8] * 12, 129, 65),
    "any order, mixed ranks": ([2, 0, -1, 2, 5, 0, 0, 2, -1, 5], [4, 1, 16, 7, 2, 33], 200, 129),
    "one for all": ([1] * 70, [8, 16], 130, 257),
    "none for all": ([-1] * 5, [8, 4], 33, 31),
    "empty adapters": ([4, 4, 4], [8] * 6, 40, 1134),
    "wide ranks": ([0, 1] * 9, [72, 5], 96, 130),
}


class Operands(NamedTuple):
    """What multi_lora takes: a sequence of adapters, or a stack where all ranks are the same."""

    x: Tensor
    a: Tensor | list[Tensor]
    b: Tensor | list[Tensor]
    ids: Tensor

    def replace(self, **operands) -> Operands:
        return self._replace(**operands)

    @property
    def stacked(self) -> Operands:
        return self.replace(a=torch.stack(self.a), b=torch.stack(self.b))


def random_operands(
    ids: list[int], ranks: list[int], d_in: int, d_out: int, dtype=torch.float32, device="cpu", factors=None
) -> Operands:
    """Operands whose results are about 1. ``factors``: the adapters' dtype, by default x's."""
    factors = factors or dtype
    return Operands(
        torch.randn(len(ids), d_in).to(device, dtype),
        [(torch.randn(r, d_in) / d_in**0.5).to(device, factors) for r in ranks],
        [(torch.randn(d_out, r) / r**0.5).to(device, factors) for r in ranks],
        torch.tensor(ids, dtype=torch.int64, device=device),
    )


def with_torch(operands: Operands, y: Tensor, dtype: torch.dtype, scalings: list[float] | None = None) -> Tensor:
    """y plus the deltas, adapter by adapter, computed and rounded in ``dtype`` throughout: float64 for the truth."""
    x, y = operands.x.to(dtype), y.to(dtype)
    for k, (a, b) in enumerate(zip(operands.a, operands.b, strict=True)):
        mine = (operands.ids == k).to(dtype)[..., None]
        y = y + (scalings[k] if scalings else 1.0) * (x @ a.to(dtype).T @ b.to(dtype).T) * mine
    return y


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest):
    return CASES[request.param]


# Values


def test_deltas(backend, dtype, case, seed):
    name, device = backend
    operands = random_operands(*case, dtype, device)
    zeros = torch.zeros(1, device=device)
    got = multi_lora(*operands, backend=name)
    assert_no_worse_than_torch(got, *(with_torch(operands, zeros, precision) for precision in (dtype, torch.float64)))


def test_accumulation_in_place(backend, dtype, case, seed):
    name, device = backend
    operands = random_operands(*case, dtype, device)
    scalings = [0.5 + k for k in range(len(operands.a))]
    y = torch.randn(len(operands.x), case[3]).to(device, dtype)
    before = y.clone()
    truth, torchs = (with_torch(operands, y, precision, scalings) for precision in (torch.float64, dtype))
    assert multi_lora(*operands, scaling=scalings, y=y, backend=name) is y
    assert_no_worse_than_torch(y, torchs, truth)
    without = operands.ids == -1
    assert torch.equal(y[without], before[without])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_shorter_rows(backend, dtype, seed):
    name, device = backend
    operands = random_operands(*CASES["any order, mixed ranks"], dtype, device, factors=torch.float32)
    zeros = torch.zeros(1, device=device)
    got = multi_lora(*operands, backend=name)
    truth = with_torch(operands, zeros, torch.float64)
    assert_no_worse_than_torch(got, with_torch(operands, zeros, torch.float32).to(dtype), truth)


def test_a_stack_is_a_sequence(backend, dtype, seed):
    name, device = backend
    operands = random_operands([3, 0, 0, -1, 2], [8] * 4, 65, 33, dtype, device)
    expected = multi_lora(*operands, backend=name)
    assert torch.equal(multi_lora(*operands.stacked, backend=name), expected)
    assert torch.equal(multi_lora(*operands.replace(a=tuple(operands.a)), backend=name), expected)


def test_zeros_stand_for_a_smaller_rank(backend, dtype, seed):
    name, device = backend
    operands = random_operands([1, 0, 2, 1], [3, 8, 1], 65, 33, dtype, device)
    a = nn.utils.rnn.pad_sequence(operands.a, batch_first=True).requires_grad_()
    b = nn.utils.rnn.pad_sequence([b.T for b in operands.b], batch_first=True).mT.contiguous().requires_grad_()
    y = multi_lora(operands.x, a, b, operands.ids, backend=name)
    assert_close(y.detach(), multi_lora(*operands, backend=name))
    y.backward(torch.randn_like(y))
    for k, r in enumerate([3, 8, 1]):
        assert a.grad[k, r:].eq(0).all()
        assert b.grad[k, :, r:].eq(0).all()


def test_scaling(backend, dtype, seed):
    name, device = backend
    operands = random_operands([1, 0, 2, 1], [3, 8, 1], 65, 33, dtype, device)
    each = [0.5, -2.0, 3.0]
    got = multi_lora(*operands, scaling=each, backend=name)
    zeros = torch.zeros(1, device=device)
    torchs, truth = (with_torch(operands, zeros, precision, each) for precision in (dtype, torch.float64))
    assert_no_worse_than_torch(got, torchs, truth)
    assert torch.equal(multi_lora(*operands, scaling=torch.tensor(each, device=device), backend=name), got)
    alike = multi_lora(*operands, scaling=[2.0] * 3, backend=name)
    assert torch.equal(multi_lora(*operands, scaling=2, backend=name), alike)


@given(
    ids=st.lists(st.integers(-1, 4), max_size=40),
    ranks=st.lists(st.integers(1, 20), min_size=5, max_size=5),
    d_in=st.integers(1, 150),
    d_out=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    data_seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(ids, ranks, d_in, d_out, dtype, data_seed):
    torch.manual_seed(data_seed)
    operands = random_operands(ids, ranks, d_in, d_out, dtype)
    y = torch.randn(len(ids), d_out).to(dtype)
    truth, torchs = (with_torch(operands, y, precision) for precision in (torch.float64, dtype))
    assert_no_worse_than_torch(multi_lora(*operands, y=y), torchs, truth)


def test_a_row_depends_on_its_own_adapter_only(backend, dtype, seed):
    name, device = backend
    operands = random_operands([0, 1, -1, 2, 1] * 6, [8, 8, 8], 129, 65, dtype, device)
    expected = multi_lora(*operands, backend=name)
    mine = operands.ids == 1
    x = operands.x.where(mine[:, None], torch.nan)
    a, b = ([t if k == 1 else torch.full_like(t, torch.nan) for k, t in enumerate(ts)] for ts in operands[1:3])
    got = multi_lora(x, a, b, operands.ids, backend=name)
    assert torch.equal(got[mine], expected[mine])
    assert got[operands.ids == -1].eq(0).all()
    assert got[operands.ids == 0].isnan().all()


# Gradients


def gradients(operands: Operands, d_y: Tensor, op) -> list[Tensor]:
    """Of x and of every adapter's factors."""
    leaves = [t.detach().clone().requires_grad_() for t in (operands.x, *operands.a, *operands.b)]
    count = len(operands.a)
    y = op(Operands(leaves[0], leaves[1 : count + 1], leaves[count + 1 :], operands.ids))
    y.backward(d_y.to(y.dtype))
    return [leaf.grad for leaf in leaves]


def test_gradients(backend, dtype, case, seed):
    name, device = backend
    operands = random_operands(*case, dtype, device)
    scalings = [0.5 + k for k in range(len(operands.a))]
    d_y = torch.randn(len(operands.x), case[3]).to(device, dtype)
    zeros = torch.zeros(1, device=device)
    exact = operands.replace(
        x=operands.x.double(), a=[t.double() for t in operands.a], b=[t.double() for t in operands.b]
    )
    truth = gradients(exact, d_y, lambda o: with_torch(o, zeros, torch.float64, scalings))
    torchs = gradients(operands, d_y, lambda o: with_torch(o, zeros, dtype, scalings))
    got = gradients(operands, d_y, lambda o: multi_lora(*o, scaling=scalings, backend=name))
    for mine, theirs, true in zip(got, torchs, truth, strict=True):
        assert_no_worse_than_torch(mine, theirs, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_float32_adapters(backend, dtype, seed):
    name, device = backend
    operands = random_operands(*CASES["any order, mixed ranks"], dtype, device, factors=torch.float32)
    d_y = torch.randn(len(operands.x), 129).to(device, dtype)
    zeros = torch.zeros(1, device=device)
    exact = operands.replace(
        x=operands.x.double(), a=[t.double() for t in operands.a], b=[t.double() for t in operands.b]
    )
    truth = gradients(exact, d_y, lambda o: with_torch(o, zeros, torch.float64))
    torchs = gradients(operands, d_y, lambda o: with_torch(o, zeros, torch.float32))
    got = gradients(operands, d_y, lambda o: multi_lora(*o, backend=name))
    for mine, theirs, true in zip(got, torchs, truth, strict=True):
        assert mine.dtype is theirs.dtype
        assert_no_worse_than_torch(mine, theirs, true)


def test_gradcheck(backend, seed):
    name, device = backend
    operands = random_operands([2, 0, -1, 2, 0], [2, 3, 1], 5, 4, device=device)
    leaves = [t.double().requires_grad_() for t in (operands.x, *operands.a, *operands.b)]

    def op(x: Tensor, *factors: Tensor) -> Tensor:
        single = [factor.float() for factor in factors]
        return multi_lora(x.float(), single[:3], single[3:], operands.ids, scaling=[1, 2, 3], backend=name).double()

    # The function is linear in every operand, so that a large step costs no accuracy.
    assert torch.autograd.gradcheck(op, leaves, eps=0.1, atol=1e-5, rtol=1e-4)


def test_only_what_is_asked_for(backend, seed):
    name, device = backend
    operands = random_operands([1, 0, 1], [2, 3], 9, 7, device=device)
    everything = gradients(operands, torch.ones(3, 7), partial(_sum_of, name))
    for asked in ([0], [1], [2, 4], [3]):
        leaves = [
            t.detach().clone().requires_grad_(i in asked) for i, t in enumerate((operands.x, *operands.a, *operands.b))
        ]
        _sum_of(name, Operands(leaves[0], leaves[1:3], leaves[3:], operands.ids)).backward(
            torch.ones(3, 7, device=device)
        )
        for i, (leaf, expected) in enumerate(zip(leaves, everything, strict=True)):
            assert (leaf.grad is None) if i not in asked else torch.equal(leaf.grad, expected)


def _sum_of(backend: str, operands: Operands) -> Tensor:
    return multi_lora(*operands, backend=backend)


def test_gradient_through_y(backend, seed):
    name, device = backend
    operands = random_operands([1, -1, 1], [2, 3], 9, 7, device=device)
    x, weight = operands.x.requires_grad_(), torch.randn(9, 7, device=device, requires_grad=True)
    y = x @ weight
    assert multi_lora(*operands, y=y, backend=name) is y
    y.sum().backward()
    d_x, d_weight = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    with_torch(operands, x @ weight, torch.float32).sum().backward()
    assert_close(d_x, x.grad)
    assert_close(d_weight, weight.grad)


def test_no_second_derivative(seed):
    operands = random_operands([1, 0], [2, 3], 9, 7)
    x = operands.x.requires_grad_()
    (d_x,) = torch.autograd.grad(multi_lora(*operands).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="multi_lora has no second derivative"):
        d_x.sum().backward()


# Layouts


@pytest.mark.parametrize("ids_shape", [(2,), (2, 3), (2, 3, 4)])
def test_ids_of_leading_dimensions(backend, dtype, seed, ids_shape):
    name, device = backend
    operands = random_operands([0] * 24, [8, 5, 3], 65, 33, dtype, device)
    ids = torch.randint(-1, 3, ids_shape, device=device)
    folded = operands.replace(x=operands.x.view(2, 3, 4, 65), ids=ids)
    each = ids.reshape(*ids_shape, *[1] * (3 - len(ids_shape))).expand(2, 3, 4).reshape(-1)
    expected = multi_lora(*operands.replace(ids=each), backend=name).view(2, 3, 4, 33)
    assert torch.equal(multi_lora(*folded, backend=name), expected)
    y = torch.zeros(2, 3, 4, 33, dtype=dtype, device=device)
    assert torch.equal(multi_lora(*folded, y=y, backend=name), expected)


def test_strided_rows(backend, dtype, seed):
    name, device = backend
    operands = random_operands([0, 1, 1, -1, 2] * 4, [8, 5, 3], 65, 33, dtype, device)
    d_y = torch.randn(33, 20, device=device).to(dtype).T
    expected, of_expected = multi_lora(*operands, backend=name), gradients(operands, d_y, partial(_sum_of, name))
    frame = torch.full((20, 100), torch.nan, dtype=dtype, device=device)
    frame[:, 3:68] = operands.x
    into = torch.full((20, 50), torch.nan, dtype=dtype, device=device)
    into[:, 7:40] = 0
    strided = operands.replace(x=frame[:, 3:68], ids=operands.ids.repeat_interleave(2)[::2])
    multi_lora(*strided, y=into[:, 7:40], backend=name)
    assert torch.equal(into[:, 7:40], expected)
    assert into[:, :7].isnan().all()
    assert into[:, 40:].isnan().all()
    transposed = operands.replace(x=operands.x.T.contiguous().T)
    assert torch.equal(multi_lora(*transposed, backend=name), expected)
    for mine, other in zip(gradients(transposed, d_y, partial(_sum_of, name)), of_expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(0, 65), (0, 4, 65), (3, 0, 65)])
def test_no_rows(backend, shape):
    name, device = backend
    operands = random_operands([], [8, 5], 65, 33, device=device)
    operands = operands.replace(x=torch.zeros(shape, device=device), ids=operands.ids.new_zeros(shape[:1]))
    y = multi_lora(*operands, backend=name)
    assert y.shape == (*shape[:-1], 33)
    for d in gradients(operands, torch.zeros_like(y), partial(_sum_of, name)):
        assert d.eq(0).all()


def test_threads_change_nothing(dtype, seed, native):
    operands = random_operands([*range(50), *[3] * 300, *[7] * 77], [8] * 50, 300, 200, dtype)
    d_y = torch.randn(427, 200).to(dtype)

    def results() -> Tensor:
        every = [multi_lora(*operands, backend="cpu"), *gradients(operands, d_y, partial(_sum_of, "cpu"))]
        return torch.cat([tensor.flatten() for tensor in every])

    assert_threads_change_nothing(results)


def test_the_plain_case_is_one_compiled_call(dtype, seed, native):
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch does not show tensors to compiled calls")
    sequence = random_operands([1, -1, 0], [8, 8], 65, 33, dtype)
    scalings = torch.tensor([1.0, 2.0])
    for x, a, b, ids in (sequence, sequence.replace(ids=torch.tensor([0, 1, 1])), sequence.stacked):
        a, b = ([factor] if isinstance(factor, Tensor) else factor for factor in (a, b))
        y = torch.zeros(3, 33, dtype=dtype)
        call = partial(dispatch.direct("multi_lora"), y)
        assert call(x, a, b, ids, scalings, 1.0, 0) is False
        assert not y.any()
        assert call(x, a, b, ids, scalings, 1.0, 1) is True
        assert y[0].all()
        for misfit in [
            (x, a, b, ids, scalings[1:]),
            (x, a, b, ids + 1, None),
            (x, a, b, ids[1:], None),
            (x, a, b[:-1], ids, None),
            (x, a, [*b[:-1], b[-1][..., 1:]], ids, None),
            (x[:, 1:], a, b, ids, None),
            (x[:0], a, b, ids[:0], None),
        ]:
            assert call(*misfit, 1.0, 1) is None


def test_every_instruction_set(isa_environment):
    """The tests of values, in a process that is held to one instruction set."""
    run_tests("any_sizes or (cpu-cpu and (gradients or float32_adapters))", isa_environment, __file__)


# Registration


def test_opcheck(seed):
    x, a, b, ids = random_operands([1, -1, 0, 1], [2, 3], 9, 7)
    leaves = x.requires_grad_(), [t.requires_grad_() for t in a], [t.requires_grad_() for t in b]
    scalings = torch.tensor([1.0, 2.0])
    torch.library.opcheck(torch.ops.essa.multi_lora.default, (*leaves, ids, scalings, 1.0, None))
    fixed = x.detach(), [t.detach() for t in a], [t.detach() for t in b], ids, None, 0.5
    torch.library.opcheck(torch.ops.essa.multi_lora_.default, (torch.randn(4, 7), *fixed, None))
    everything = [True, True, True]
    torch.library.opcheck(torch.ops.essa.multi_lora_backward.default, (torch.randn(4, 7), *fixed, everything, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, seed):
    def layer(operands: Operands, weight: Tensor) -> Tensor:
        y = operands.x @ weight
        return multi_lora(*operands, scaling=2.0, y=y) + multi_lora(*operands)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for ids in ([1, 0, 1], [0, -1, 1, 1, 0]):
        operands, weight = random_operands(ids, [2, 3], 9, 7), torch.randn(9, 7)
        with torch.no_grad():
            assert_close(compiled(operands, weight), layer(operands, weight))
        d_y = torch.randn(len(ids), 7)
        expected = gradients(operands, d_y, lambda o: layer(o, weight))  # noqa: B023
        for mine, other in zip(gradients(operands, d_y, lambda o: compiled(o, weight)), expected, strict=True):  # noqa: B023
            assert_close(mine, other)


def test_meta_tensors_have_the_shape():
    operands = random_operands([2, 0], [2, 3, 4], 9, 7, torch.bfloat16, "meta")
    assert multi_lora(*operands).shape == (2, 7)
    assert multi_lora(*operands).dtype is torch.bfloat16


# Bad input: 4 rows, d_in 9, d_out 7, ranks 2 and 3


BAD_OPERANDS = [
    ("x", torch.zeros(4, 9).double(), "x must have dtype float32, bfloat16 or float16, got torch.float64"),
    ("x", torch.zeros(4, 8), r"x must have shape \[..., d_in\] = \[4, 9\], got \[4, 8\]"),
    ("x", torch.zeros(()), "x must have at least one dimension, got none"),
    ("a", [], "a must be a tensor or a sequence of at least one, got none"),
    ("a", [torch.zeros(2, 9)], "b must hold as many adapters as a, 1, got 2"),
    (
        "a",
        [torch.zeros(2, 9), torch.zeros(3, 8)],
        r"a\[1\] must have shape \[r_k, d_in\] with d_in = 9, .* got \[3, 8\]",
    ),
    ("a", [torch.zeros(2, 9), torch.zeros(9)], r"a\[1\] must have shape \[r_k, d_in\] with d_in = 9, .* got \[9\]"),
    ("a", [torch.zeros(0, 9), torch.zeros(3, 9)], r"a\[0\] must have shape \[r_k, d_in\] and sizes >= 1, got \[0, 9\]"),
    (
        "a",
        [torch.zeros(2, 9).half()] * 2,
        r"a\[0\] must have x's dtype, torch.float32, or torch.float32, got .*float16",
    ),
    ("a", [torch.zeros(2, 9), torch.zeros(3, 9).half()], r"a\[1\] must have dtype torch.float32, got torch.float16"),
    ("a", [torch.zeros(2, 9), torch.zeros(9, 3).T], r"a\[1\] must be contiguous, got strides \[1, 3\]"),
    ("a", [torch.zeros(2, 9), torch.zeros(3, 9, device="meta")], r"a\[1\] must be on cpu, got meta"),
    ("b", [torch.zeros(7, 2), torch.zeros(7, 2)], r"b\[1\] must have shape \[d_out, r_k\] = \[7, 3\], got \[7, 2\]"),
    ("b", [torch.zeros(7, 2), torch.zeros(6, 3)], r"b\[1\] must have shape \[d_out, r_k\] = \[7, 3\], got \[6, 3\]"),
    ("b", [torch.zeros(7, 2), torch.zeros(7, 3).half()], r"b\[1\] must have dtype torch.float32, got torch.float16"),
    ("b", [torch.zeros(7, 2), torch.zeros(3, 7).T], r"b\[1\] must be contiguous, got strides \[1, 7\]"),
    ("ids", torch.zeros(4).int(), "adapter_ids must have dtype torch.int64, got torch.int32"),
    ("ids", torch.zeros(3).long(), r"adapter_ids must have the shape \[4\] or its beginning, got \[3\]"),
    ("ids", torch.zeros(4, 9).long(), r"adapter_ids must have the shape \[4\] or its beginning, got \[4, 9\]"),
    ("ids", torch.tensor(0), r"adapter_ids must have the shape \[4\] or its beginning, got \[\]"),
    ("ids", torch.tensor([0, 1, 2, 0]), r"adapter_ids must be in -1 .. 1, got 2"),
    ("ids", torch.tensor([0, 1, -2, 0]), r"adapter_ids must be in -1 .. 1, got -2"),
]
BAD_STACKS = [
    (torch.zeros(2, 3, 9), torch.zeros(2, 7, 4), r"b must have shape \[K, d_out, r\] = \[2, 7, 3\], got \[2, 7, 4\]"),
    (torch.zeros(2, 3, 9), torch.zeros(1, 7, 3), r"b must have shape \[K, d_out, r\] = \[2, 7, 3\], got \[1, 7, 3\]"),
    (torch.zeros(0, 3, 9), torch.zeros(0, 7, 3), r"a must have shape \[K, r, d_in\] and sizes >= 1, got \[0, 3, 9\]"),
    (torch.zeros(2, 3, 18)[..., ::2], torch.zeros(2, 7, 3), "a must be contiguous"),
]


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize(("name", "value", "message"), BAD_OPERANDS)
def test_bad_operands_are_refused(name, value, message, grad_mode, seed):
    operands = random_operands([0, 1, -1, 1], [2, 3], 9, 7).replace(**{name: value})
    if grad_mode:
        operands.b[0].requires_grad_()
    y = torch.full((4, 7), 5.0)
    for into in (None, y):
        if name == "x" and into is not None and not value.dim():
            continue
        with pytest.raises(ValueError, match=f"^multi_lora: {message}"):
            multi_lora(*operands, y=into)
    assert y.eq(5).all()


@pytest.mark.parametrize(("a", "b", "message"), BAD_STACKS)
def test_bad_stacks_are_refused(a, b, message):
    with pytest.raises(ValueError, match=f"^multi_lora: {message}"):
        multi_lora(torch.zeros(4, 9), a, b, torch.zeros(4).long())


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"y": torch.zeros(3, 4, 7)}, ValueError, r"y must have shape \[..., d_out\] = \[4, 7\], got \[3, 4, 7\]"),
        ({"y": [0.0]}, TypeError, "y must be a tensor, got list"),
        ({"y": torch.zeros(4, 7).half()}, ValueError, "y must have dtype torch.float32, got torch.float16"),
        ({"y": torch.zeros(4, 6)}, ValueError, r"y must have shape \[..., d_out\] = \[4, 7\], got \[4, 6\]"),
        ({"y": torch.zeros(7, 4).T}, ValueError, "y must be rows of adjacent elements at one stride"),
        ({"scaling": torch.zeros(3)}, ValueError, r"scaling must have shape \[K\] = \[2\], got \[3\]"),
        ({"scaling": torch.zeros(2).half()}, ValueError, "scaling must have dtype torch.float32, got torch.float16"),
        ({"scaling": [1.0]}, ValueError, r"scaling must have shape \[K\] = \[2\], got \[1\]"),
        ({"scaling": float("nan")}, ValueError, "scaling must be finite in float32, got nan"),
        ({"scaling": "1"}, TypeError, "scaling must be a number, got '1'"),
        ({"scaling": torch.ones(2, requires_grad=True)}, RuntimeError, "scaling requires grad"),
        ({"backend": "x"}, ValueError, "backend must be one of cpu, cuda, triton, reference or None, got 'x'"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' is not available: multi_lora has no CUDA kernel"),
        ({"a": 3}, TypeError, "a must be a tensor or a sequence of tensors, got int"),
        ({"b": [torch.zeros(7, 2), None]}, TypeError, "b must be a tensor or a sequence of tensors, got NoneType"),
        ({"adapter_ids": [0] * 4}, TypeError, "adapter_ids must be a tensor, got list"),
    ],
)
def test_other_bad_input_is_refused(arguments, error, message, grad_mode, seed):
    x, a, b, ids = random_operands([0, 1, -1, 1], [2, 3], 9, 7)
    x.requires_grad_(grad_mode)
    with pytest.raises(error, match=f"^multi_lora: {message}"):
        multi_lora(**({"x": x, "a": a, "b": b, "adapter_ids": ids} | arguments))


def test_explain_names_the_backends():
    assert "multi_lora has no CUDA kernel, Triton's serves GPUs" in dispatch.explain("multi_lora")
