"""decode_attention against float64, on every backend this machine has."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from essa_kernels import decode_attention

from .oracle import DTYPES, assert_no_worse_than_torch, assert_threads_change_nothing, run_tests

# rows, heads, kv_heads, length, d, d_v
CASES = {
    "one of everything": (1, 1, 1, 1, 1, 1),
    "grouped": (5, 14, 2, 517, 64, 64),
    "a head each": (3, 6, 6, 70, 40, 40),
    "one for all": (2, 71, 1, 129, 64, 64),
    "values of another size": (2, 8, 4, 300, 96, 64),
    "odd sizes": (7, 9, 3, 257, 33, 129),
    "wide heads": (1, 4, 1, 33, 256, 256),
}


class Operands(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    def to(self, dtype: torch.dtype) -> Operands:
        return Operands(*(tensor.to(dtype) for tensor in self[:3]), self.mask)


def random_operands(rows, heads, kv_heads, length, d, d_v, dtype=torch.float32, device="cpu", seen=0.8) -> Operands:
    """Every row sees some of the positions, at least the last."""
    mask = torch.rand(rows, length, device=device) < seen
    mask[:, -1] = True
    return Operands(
        torch.randn(rows, heads, d).to(device, dtype),
        torch.randn(rows, kv_heads, length, d).to(device, dtype),
        torch.randn(rows, kv_heads, length, d_v).to(device, dtype),
        mask,
    )


def with_torch(operands: Operands, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """torch's own, in ``dtype``: float64 for the truth."""
    query, key, value, mask = operands.to(dtype)
    rows, heads, _ = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], -1)
    seen = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen, scale=scale).reshape(rows, heads, -1)


def truth_of(operands: Operands, scale: float | None = None) -> Tensor:
    """From the equation, in float64."""
    query, key, value, mask = operands.to(torch.float64)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("rhd,rhtd->rht", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("rht,rhtd->rhd", scores.softmax(-1), value)


def assert_right(got: Tensor, operands: Operands, scale: float | None = None) -> None:
    truth, unsigned = (truth_of(o, scale) for o in (operands, operands._replace(value=operands.value.abs())))
    torchs = with_torch(operands, got.dtype, scale)
    # A score's rounding, which grows with the score, is a relative error of its weight.
    query, key, *_ = operands.to(torch.float64)
    score = query.norm(dim=-1).max() * key.norm(dim=-1).max() * (key.shape[-1] ** -0.5 if scale is None else abs(scale))
    assert_no_worse_than_torch(got, torchs, truth, terms=float(unsigned.max() * (1 + score)))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest):
    return CASES[request.param]


# Values


def test_values(backend, dtype, case, seed):
    name, device = backend
    operands = random_operands(*case, dtype, device)
    assert_right(decode_attention(*operands, backend=name), operands)


def test_values_where_all_is_seen(backend, dtype, seed):
    name, device = backend
    operands = random_operands(*CASES["grouped"], dtype, device)._replace(mask=None)
    assert_right(decode_attention(*operands, backend=name), operands)


@pytest.mark.parametrize("scale", [0.0, 3.0, -1.0])
def test_scale(backend, dtype, scale, seed):
    name, device = backend
    operands = random_operands(3, 4, 2, 300, 32, 32, dtype, device)
    assert_right(decode_attention(*operands, scale=scale, backend=name), operands, scale)


def test_a_score_that_outweighs_all(backend, dtype, seed):
    """Exponents far beyond float32's range, rising and falling from block to block."""
    name, device = backend
    operands = random_operands(4, 4, 2, 700, 32, 32, dtype, device)
    operands.key[0] *= torch.linspace(1, 100, 700, device=device).to(dtype)[:, None]
    operands.key[1] *= torch.linspace(100, 1, 700, device=device).to(dtype)[:, None]
    assert_right(decode_attention(*operands, backend=name), operands)


@given(
    rows=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 9),
    length=st.integers(1, 600),
    d=st.integers(1, 140),
    d_v=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    data_seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(rows, kv_heads, group, length, d, d_v, dtype, data_seed):
    torch.manual_seed(data_seed)
    operands = random_operands(rows, kv_heads * group, kv_heads, length, d, d_v, dtype)
    assert_right(decode_attention(*operands), operands)


# Meaning


def test_what_is_not_seen_does_not_count(backend, dtype, seed):
    """Neither within a block of positions nor where whole blocks are not seen."""
    name, device = backend
    operands = random_operands(3, 4, 2, 1000, 32, 32, dtype, device)
    operands.mask[0, :600] = False
    operands.mask[1, 300:999] = False
    expected = decode_attention(*operands, backend=name)
    unseen = ~operands.mask[:, None, :, None]
    key, value = (tensor.masked_fill(unseen, 1000.0) for tensor in operands[1:3])
    assert torch.equal(decode_attention(operands.query, key, value, operands.mask, backend=name), expected)
    for row in range(3):
        own = operands.mask[row]
        alone = decode_attention(
            operands.query[row, None],
            operands.key[row, None, :, own],
            operands.value[row, None, :, own],
            backend=name,
        )
        assert_close(alone[0], expected[row])


def test_a_row_that_sees_nothing(backend, dtype, seed):
    name, device = backend
    operands = random_operands(3, 4, 2, 70, 32, 32, dtype, device)
    operands.mask[1] = False
    got = decode_attention(*operands, backend=name)
    assert got[1].eq(0).all()
    assert got[0].ne(0).all()


def test_a_row_does_not_depend_on_the_others(backend, dtype, seed):
    name, device = backend
    operands = random_operands(5, 6, 2, 300, 48, 48, dtype, device)
    expected = decode_attention(*operands, backend=name)
    for row in range(5):
        alone = Operands(*(tensor[row, None] for tensor in operands))
        assert torch.equal(decode_attention(*alone, backend=name), expected[row, None])
    all_seen, unmasked = operands._replace(mask=operands.mask | True), operands._replace(mask=None)
    assert torch.equal(decode_attention(*all_seen, backend=name), decode_attention(*unmasked, backend=name))


def test_what_is_not_finite_is_not_hidden(backend, seed):
    name, device = backend
    operands = random_operands(2, 2, 1, 70, 32, 32, device=device)
    operands.value[0, 0, -1, 3] = torch.nan
    operands.key[1, 0, -1, 5] = torch.nan
    got = decode_attention(*operands, backend=name)
    assert got[0, :, 3].isnan().all()
    assert got[1].isnan().all()
    query = torch.ones_like(operands.query)
    of_infinite_keys = decode_attention(query, torch.full_like(operands.key, -torch.inf), operands.key, backend=name)
    assert of_infinite_keys.isnan().all()


# Layout


def test_part_of_a_cache(backend, dtype, seed):
    """Any strides: a cache that has room for more positions, heads beside positions, a wider query and mask."""
    name, device = backend
    operands = random_operands(3, 4, 2, 70, 40, 24, dtype, device)
    expected = decode_attention(*operands, backend=name)

    def framed(tensor: Tensor, *room: int) -> Tensor:
        fill = torch.nan if tensor.is_floating_point() else True
        sizes = [size + more for size, more in zip(tensor.shape, room, strict=True)]
        frame = torch.full(sizes, fill, dtype=tensor.dtype, device=device)
        part = frame[tuple(slice(size) for size in tensor.shape)]
        part.copy_(tensor)
        return part

    query, key, value, mask = operands
    strided = framed(query, 1, 1, 3), framed(key, 2, 0, 50, 8), framed(value, 0, 1, 50, 1), framed(mask, 0, 9)
    assert torch.equal(decode_attention(*strided, backend=name), expected)
    positions_first = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (key, value))
    assert torch.equal(decode_attention(query, *positions_first, mask, backend=name), expected)


@pytest.mark.parametrize(("rows", "length"), [(0, 5), (0, 0), (3, 0)])
def test_nothing_to_attend(backend, rows, length):
    name, device = backend
    query, cache = torch.ones(rows, 4, 8, device=device), torch.ones(rows, 2, length, 8, device=device)
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    for got in (decode_attention(query, cache, cache, m, backend=name) for m in (None, mask)):
        assert got.shape == (rows, 4, 8)
        assert got.eq(0).all()


def test_threads_change_nothing(dtype, seed, native):
    operands = random_operands(13, 6, 3, 300, 40, 40, dtype)
    assert_threads_change_nothing(partial(decode_attention, *operands, backend="cpu"))


def test_every_instruction_set(isa_environment):
    """The tests of values, in a process that is held to one instruction set."""
    run_tests("any_sizes or (cpu-cpu and (values or outweighs))", isa_environment, __file__)


# Registration


def test_opcheck(seed):
    operands = random_operands(2, 4, 2, 9, 8, 7)
    for mask, scale in ((operands.mask, None), (None, 0.5)):
        torch.library.opcheck(torch.ops.essa.decode_attention.default, (*operands[:3], mask, scale, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, seed):
    def layer(operands: Operands) -> Tensor:
        return decode_attention(torch.tanh(operands.query), *operands[1:]) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (9, 33):
        operands = random_operands(2, 4, 2, length, 8, 7)
        assert_close(compiled(operands), layer(operands))


def test_meta_tensors_have_the_shape():
    operands = random_operands(2, 4, 2, 9, 8, 7, torch.bfloat16, "meta")
    assert decode_attention(*operands).shape == (2, 4, 7)
    assert decode_attention(*operands).dtype is torch.bfloat16


# Bad input: 3 rows, 4 heads, 2 of keys and values, 9 positions, d 8, d_v 7


BAD = [
    ("query", torch.zeros(3, 4, 8).double(), "query must have dtype float32, bfloat16 or float16, got torch.float64"),
    ("query", torch.zeros(3, 4, 1, 8), r"query must have shape \[rows, heads, d\], got \[3, 4, 1, 8\]"),
    ("query", torch.zeros(3, 5, 8), r"a whole multiple of key's 2 heads, got \[3, 5, 8\]"),
    ("query", torch.zeros(3, 0, 8), r"a whole multiple of key's 2 heads, got \[3, 0, 8\]"),
    ("query", torch.zeros(3, 8, 4).mT, r"query's last dimension must be adjacent, got strides \[32, 1, 4\]"),
    ("key", torch.zeros(3, 2, 8), r"key must have shape \[rows, kv_heads, length, d\], got \[3, 2, 8\]"),
    ("key", torch.zeros(3, 2, 9, 6), r"key must have shape \[.*, d\] = \[3, 2, 9, 8\], got \[3, 2, 9, 6\]"),
    ("key", torch.zeros(3, 2, 9, 8).half(), "key must have dtype torch.float32, got torch.float16"),
    ("key", torch.zeros(3, 2, 9, 8, device="meta"), "key must be on cpu, got meta"),
    ("key", torch.zeros(3, 2, 8, 9).mT, "key's last dimension must be adjacent"),
    ("value", torch.zeros(3, 2, 8, 7), r"value must have shape \[.*, d_v\] = \[3, 2, 9, 7\], got \[3, 2, 8, 7\]"),
    ("value", torch.zeros(3, 2, 9), r"value must have shape \[.*, d_v\]"),
    ("value", torch.zeros(3, 2, 9, 0), r"value must have d_v >= 1, got \[3, 2, 9, 0\]"),
    ("mask", torch.zeros(3, 9), "mask must have dtype torch.bool, got torch.float32"),
    ("mask", torch.zeros(3, 8, dtype=torch.bool), r"mask must have shape \[rows, length\] = \[3, 9\], got \[3, 8\]"),
    ("scale", float("inf"), "scale must be finite in float32, got inf"),
    ("backend", "numpy", "backend must be one of .*, got 'numpy'"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_input(name, value, message):
    arguments = random_operands(3, 4, 2, 9, 8, 7)._asdict() | {name: value}
    with pytest.raises(ValueError, match=rf"decode_attention: .*{message}"):
        decode_attention(**arguments)


def test_no_backward():
    operands = random_operands(3, 4, 2, 9, 8, 7)
    operands.key.requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"decode_attention: key requires grad, but decode_attention has no backward"
    ):
        decode_attention(*operands)
    with torch.no_grad():
        decode_attention(*operands)


def test_no_cuda_kernel():
    with pytest.raises(RuntimeError, match="decode_attention has no CUDA kernel, Triton's serves GPUs"):
        decode_attention(*random_operands(3, 4, 2, 9, 8, 7), backend="cuda")
