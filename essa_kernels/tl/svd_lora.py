"""ESSA's population forward in Triton, accumulated in float32.

V_A, core and U_B are shared and only the singular values differ between members, so a block of rows may span members:
each row looks its member up in ``offsets`` and gathers its own values between two ordinary matrix products.

Few rows (decode): one launch projects x onto V_A with d_in split over programs, a second sums the partial products in
order, applies core and the singular values, and expands. Many rows: one launch does all of it, row block by row block.
Every sum has a fixed order, so results repeat exactly. Ranks are padded to 16, the least a matrix unit takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import config, on_device
from .storage import INTERPRETED, rounded

LEAST_RANKS = tl.constexpr(16)  # the shortest inner dimension of a matrix product
ALIGNED = 16  # elements: what Triton asks for to load several at once
SEARCH_WIDTH = 64
LEAST_SPLIT_BLOCKS = 2  # blocks of d_in that make a split worth its partial sums
BEYOND_ANY_ROW = tl.constexpr(2**62)


@triton.jit
def dot(a, b, sums):
    """sums + a b, exact products summed in float32."""
    if INTERPRETED:  # which would multiply the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def owners(offsets, row, members, top_stride, WIDTH: tl.constexpr):
    """The member that owns each row: a search that narrows WIDTH-fold at every step, one load each.

    ``top_stride`` is the power of WIDTH with top_stride * WIDTH > members. Rows past the last give some valid member.
    """
    member = tl.zeros_like(row)
    stride = top_stride
    while stride > 0:
        boundary = member[:, None] + (tl.arange(0, WIDTH)[None, :] + 1) * stride
        start = tl.load(offsets + boundary, mask=boundary < members, other=BEYOND_ANY_ROW)
        member += tl.sum((start <= row[:, None]).to(tl.int32), axis=1) * stride
        stride = stride // WIDTH
    return member


@triton.jit
def project(x, v_a, row, rank, rows, d_in, x_stride, begin, end, ranks, INNER: tl.constexpr):
    """x V_A^T over whole blocks of columns of x, begin .. end - 1, for a block of rows and of the ranks: float32."""
    inner = tl.arange(0, INNER)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    v_rows = v_a + rank.to(tl.int64)[None, :] * d_in
    sums = tl.zeros((row.shape[0], rank.shape[0]), tl.float32)
    for first in range(begin, end, INNER):
        column = first + inner
        inside = column < d_in
        x_block = tl.load(x_rows + column[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        v_block = tl.load(v_rows + column[:, None], mask=inside[:, None] & (rank < ranks)[None, :], other=0.0)
        sums = dot(x_block, v_block, sums)
    return sums


@triton.jit
def scale_ranks(sums, singular_values, member, rank, RANKS: tl.constexpr):
    """Every row times its member's singular values."""
    values = tl.load(
        singular_values + member.to(tl.int64)[:, None] * RANKS + rank[None, :],
        mask=(rank < RANKS)[None, :],
        other=0.0,
    )
    return sums * values


@triton.jit
def apply_core(scaled, core, rank_a, rank_b, sums, R_A: tl.constexpr, R_B: tl.constexpr):
    """sums + scaled core^T over a block of r_a, for a block of r_b."""
    block = tl.load(
        core + rank_b[None, :] * R_A + rank_a[:, None],
        mask=(rank_a < R_A)[:, None] & (rank_b < R_B)[None, :],
        other=0.0,
    )
    return dot(scaled, block, sums)


@triton.jit
def mix(partial, core, s_a, s_b, row, member, rank_b, rows, splits, R_A: tl.constexpr, R_B: tl.constexpr):
    """Partial sums [splits, rows, r_a] to h for a block of rows and of r_b: float32 [rows, ranks]."""
    h = tl.zeros((row.shape[0], rank_b.shape[0]), tl.float32)
    for first in range(0, R_A, LEAST_RANKS):
        rank_a = first + tl.arange(0, LEAST_RANKS)
        place = partial + row.to(tl.int64)[:, None] * R_A + rank_a[None, :]
        inside = (row < rows)[:, None] & (rank_a < R_A)[None, :]
        sums = tl.zeros((row.shape[0], LEAST_RANKS), tl.float32)
        for _ in range(splits):
            sums += tl.load(place, mask=inside, other=0.0)
            place += rows.to(tl.int64) * R_A
        scaled = scale_ranks(sums, s_a, member, rank_a, R_A)
        h = apply_core(scaled, core, rank_a, rank_b, h, R_A, R_B)
    return scale_ranks(h, s_b, member, rank_b, R_B)


@triton.jit
def leading(a):
    """The part of float32 values that tf32 holds exactly."""
    return (a.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot_of_float32(a, b, sums, FOR_FLOAT32: tl.constexpr = False):
    """sums + a b. Where b is shorter than float32, a goes through the matrix unit as a leading and a trailing part: 16 of
    its bits are as good as float32 where b's dtype is the result's too, 22 where the result is float32."""
    if b.dtype == tl.bfloat16 and not FOR_FLOAT32:
        first = rounded(a, tl.bfloat16)
        second = rounded(a - first.to(tl.float32), tl.bfloat16)
        return dot(first, b, dot(second, b, sums))
    elif b.dtype != tl.float32:
        # a may exceed float16's range, while bfloat16 and float16 fit into tf32 exactly.
        b = b.to(tl.float32)
        sums = tl.dot(a - leading(a), b, sums, input_precision="tf32")
        return tl.dot(leading(a), b, sums, input_precision="tf32")
    else:
        return dot(a, b, sums)


@triton.jit
def expand(h, u_b, column, rank, d_out, sums, R_B: tl.constexpr, TRANSPOSED: tl.constexpr):
    """sums + h U_B^T over a block of r_b, for a block of columns. TRANSPOSED: U_B lies in memory as [r_b, d_out]."""
    if TRANSPOSED:
        place = u_b + rank.to(tl.int64)[:, None] * d_out + column[None, :]
    else:
        place = u_b + column.to(tl.int64)[None, :] * R_B + rank[:, None]
    u_block = tl.load(place, mask=(rank < R_B)[:, None] & (column < d_out)[None, :], other=0.0)
    return dot_of_float32(h, u_block, sums)


@triton.jit
def add_to(y, delta, row, column, rows, d_out, y_stride):
    place = y + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < d_out)[None, :]
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32) + delta
    tl.store(place, rounded(sums, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def project_kernel(
    partial,
    x,
    v_a,
    rows,
    d_in,
    split,
    x_stride,
    R_A: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    RANK_A: tl.constexpr,
):
    """partial[i] = x V_A^T over columns i * split .. of x. Grid: row blocks, splits, blocks of r_a."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(2) * RANK_A + tl.arange(0, RANK_A)
    begin = tl.program_id(1) * split
    sums = project(x, v_a, row, rank, rows, d_in, x_stride, begin, tl.minimum(begin + split, d_in), R_A, INNER)
    place = partial + (tl.program_id(1) * rows.to(tl.int64) + row)[:, None] * R_A + rank[None, :]
    tl.store(place, sums, mask=(row < rows)[:, None] & (rank < R_A)[None, :])


@triton.jit(do_not_specialize=["rows", "members", "top_stride", "splits"])
def mix_kernel(
    h,
    partial,
    core,
    s_a,
    s_b,
    offsets,
    rows,
    members,
    top_stride,
    splits,
    h_stride,
    R_A: tl.constexpr,
    R_B: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_B: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """h from partial sums. Grid: row blocks, blocks of r_b."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANK_B + tl.arange(0, RANK_B)
    member = owners(offsets, row, members, top_stride, WIDTH)
    block = mix(partial, core, s_a, s_b, row, member, rank, rows, splits, R_A, R_B)
    place = h + row.to(tl.int64)[:, None] * h_stride + rank[None, :]
    tl.store(place, block, mask=(row < rows)[:, None] & (rank < R_B)[None, :])


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    y,
    h,
    u_b,
    rows,
    d_out,
    y_stride,
    h_stride,
    R_B: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_B: tl.constexpr,
):
    """y += h U_B^T. Grid: row blocks, column blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    delta = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, R_B, RANK_B):
        rank = first + tl.arange(0, RANK_B)
        h_block = tl.load(
            h + row.to(tl.int64)[:, None] * h_stride + rank[None, :],
            mask=(row < rows)[:, None] & (rank < R_B)[None, :],
            other=0.0,
        )
        delta = expand(h_block, u_b, column, rank, d_out, delta, R_B, TRANSPOSED)
    add_to(y, delta, row, column, rows, d_out, y_stride)


@triton.jit(do_not_specialize=["rows", "members", "top_stride", "splits"])
def mix_expand_kernel(
    y,
    partial,
    core,
    u_b,
    s_a,
    s_b,
    offsets,
    rows,
    members,
    top_stride,
    splits,
    d_out,
    y_stride,
    R_A: tl.constexpr,
    R_B: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_B: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y += U_B h from partial sums, every column block making h anew. Grid: row blocks, column blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK_B)
    member = owners(offsets, row, members, top_stride, WIDTH)
    h = mix(partial, core, s_a, s_b, row, member, rank, rows, splits, R_A, R_B)
    delta = tl.zeros((ROWS, COLUMNS), tl.float32)
    delta = expand(h, u_b, column, rank, d_out, delta, R_B, TRANSPOSED)
    add_to(y, delta, row, column, rows, d_out, y_stride)


@triton.jit(do_not_specialize=["rows", "members", "top_stride"])
def fused_kernel(
    y,
    x,
    v_a,
    core,
    u_b,
    s_a,
    s_b,
    offsets,
    rows,
    members,
    top_stride,
    d_in,
    d_out,
    y_stride,
    x_stride,
    R_A: tl.constexpr,
    R_B: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_A: tl.constexpr,
    RANK_B: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The whole op for a block of rows. Grid: row blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank_a = tl.arange(0, RANK_A)
    rank_b = tl.arange(0, RANK_B)
    member = owners(offsets, row, members, top_stride, WIDTH)
    sums = project(x, v_a, row, rank_a, rows, d_in, x_stride, 0, d_in, R_A, INNER)
    scaled = scale_ranks(sums, s_a, member, rank_a, R_A)
    h = tl.zeros((ROWS, RANK_B), tl.float32)
    h = apply_core(scaled, core, rank_a, rank_b, h, R_A, R_B)
    h = scale_ranks(h, s_b, member, rank_b, R_B)
    for first in range(0, d_out, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        delta = tl.zeros((ROWS, COLUMNS), tl.float32)
        delta = expand(h, u_b, column, rank_b, d_out, delta, R_B, TRANSPOSED)
        add_to(y, delta, row, column, rows, d_out, y_stride)


@triton.jit(do_not_specialize=["rows", "members", "top_stride"])
def linear_kernel(
    y,
    x,
    weight,
    bias,
    h,
    v_a,
    core,
    u_b,
    s_a,
    s_b,
    offsets,
    rows,
    members,
    top_stride,
    d_in,
    d_out,
    x_stride,
    h_stride,
    R_A: tl.constexpr,
    R_B: tl.constexpr,
    SHRINKS: tl.constexpr,
    BIASED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_A: tl.constexpr,
    RANK_B: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y = x W^T + bias + h U_B^T. SHRINKS: h is made beside x W^T, else given. Grid: row blocks, column blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank_a = tl.arange(0, RANK_A)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    w_rows = weight + column.to(tl.int64)[None, :] * d_in
    if SHRINKS:
        v_rows = v_a + rank_a.to(tl.int64)[None, :] * d_in
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    shrunk = tl.zeros((ROWS, RANK_A), tl.float32)
    for first in range(0, d_in, INNER):
        inner = first + tl.arange(0, INNER)
        inside = inner < d_in
        x_block = tl.load(x_rows + inner[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        w_block = tl.load(w_rows + inner[:, None], mask=inside[:, None] & (column < d_out)[None, :], other=0.0)
        sums = dot(x_block, w_block, sums)
        if SHRINKS:
            v_block = tl.load(v_rows + inner[:, None], mask=inside[:, None] & (rank_a < R_A)[None, :], other=0.0)
            shrunk = dot(x_block, v_block, shrunk)
    if BIASED:
        sums += tl.load(bias + column, mask=column < d_out, other=0.0).to(tl.float32)[None, :]
    if SHRINKS:
        rank_b = tl.arange(0, RANK_B)
        member = owners(offsets, row, members, top_stride, WIDTH)
        scaled = scale_ranks(shrunk, s_a, member, rank_a, R_A)
        mixed = tl.zeros((ROWS, RANK_B), tl.float32)
        mixed = apply_core(scaled, core, rank_a, rank_b, mixed, R_A, R_B)
        mixed = scale_ranks(mixed, s_b, member, rank_b, R_B)
        sums = expand(mixed, u_b, column, rank_b, d_out, sums, R_B, TRANSPOSED)
    else:
        for first in range(0, R_B, RANK_B):
            rank = first + tl.arange(0, RANK_B)
            h_block = tl.load(
                h + row.to(tl.int64)[:, None] * h_stride + rank[None, :],
                mask=(row < rows)[:, None] & (rank < R_B)[None, :],
                other=0.0,
            )
            sums = expand(h_block, u_b, column, rank, d_out, sums, R_B, TRANSPOSED)
    place = y + row.to(tl.int64)[:, None] * d_out + column[None, :]
    tl.store(place, rounded(sums, y.dtype.element_ty), mask=(row < rows)[:, None] & (column < d_out)[None, :])


def svd_lora_(
    y: Tensor, x: Tensor, v_a: Tensor, core: Tensor, u_b: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor
) -> None:
    """y += u_b (s_b[m] * (core (s_a[m] * (v_a x)))), row by row, where m is the member that owns the row."""
    rows, (r_b, r_a) = x.shape[0], core.shape
    fused = config(x, "fused")
    if rows >= fused["min_rows"] and max(r_a, r_b) <= fused["max_ranks_bytes"] // x.element_size():
        _fused(y, x, v_a, core, u_b, s_a, s_b, offsets)
    elif rows <= config(x, "mix_expand")["max_rows"] and r_b <= rank_block(x, "expand", r_b):
        _mix_expand(y, _project(x, v_a), core, u_b, s_a, s_b, offsets)
    else:
        h = x.new_empty(rows, r_b, dtype=torch.float32)
        svd_lora_shrink(h, x, v_a, core, s_a, s_b, offsets)
        svd_lora_expand_(y, h, u_b)


def svd_lora_shrink(h: Tensor, x: Tensor, v_a: Tensor, core: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor) -> None:
    """h = s_b[m] * (core (s_a[m] * (v_a x))), row by row, where m is the member that owns the row."""
    partial = _project(x, v_a)
    (splits, rows, r_a), r_b, members = partial.shape, h.shape[1], s_a.shape[0]
    shape = config(x, "mix")
    ranks = rank_block(h, "mix", r_b)
    with on_device(x):
        mix_kernel[(triton.cdiv(rows, shape["block_rows"]), triton.cdiv(r_b, ranks))](
            h,
            partial,
            core,
            s_a,
            s_b,
            offsets,
            rows,
            members,
            top_stride(members),
            splits,
            h.stride(0),
            R_A=r_a,
            R_B=r_b,
            ROWS=shape["block_rows"],
            RANK_B=ranks,
            WIDTH=SEARCH_WIDTH,
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
        )


def svd_lora_expand_(y: Tensor, h: Tensor, u_b: Tensor) -> None:
    """y += u_b h, row by row."""
    rows, (d_out, r_b) = y.shape[0], u_b.shape
    shape = config(y, "expand")
    columns = shape["block_columns_bytes"] // y.element_size()
    grid = (triton.cdiv(rows, shape["block_rows"]), triton.cdiv(d_out, columns))
    with on_device(y):
        expand_kernel[grid](
            y,
            h,
            u_b,
            rows,
            d_out,
            y.stride(0),
            h.stride(0),
            R_B=r_b,
            TRANSPOSED=not u_b.is_contiguous(),
            ROWS=shape["block_rows"],
            COLUMNS=columns,
            RANK_B=rank_block(y, "expand", r_b),
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
        )


def svd_lora_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v_a: Tensor,
    core: Tensor,
    u_b: Tensor,
    s_a: Tensor,
    s_b: Tensor,
    offsets: Tensor,
) -> None:
    """y = x weight^T + bias + u_b (s_b[m] * (core (s_a[m] * (v_a x)))), row by row."""
    rows, (r_b, r_a), few = x.shape[0], core.shape, config(x, "linear_decode")
    if rows <= few["max_rows"] and max(r_a, r_b) <= few["max_ranks_bytes"] // x.element_size():
        _linear(y, x, weight, bias, None, (v_a, core, s_a, s_b, offsets), u_b)
    else:
        h = x.new_empty(rows, r_b, dtype=torch.float32)
        svd_lora_shrink(h, x, v_a, core, s_a, s_b, offsets)
        svd_lora_expand_linear(y, x, weight, bias, h, u_b)


def svd_lora_expand_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, u_b: Tensor) -> None:
    """y = x weight^T + bias + u_b h, row by row."""
    _linear(y, x, weight, bias, h, None, u_b)


def _linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    shrink: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None,
    u_b: Tensor,
) -> None:
    """The base layer with h, or with what makes it: v_a, core, s_a, s_b, offsets."""
    (rows, d_in), (d_out, r_b) = x.shape, u_b.shape
    v_a, core, s_a, s_b, offsets = shrink or (None,) * 5
    members, r_a = (0, 1) if s_a is None else s_a.shape
    few = config(x, "linear_decode")
    shape = few if rows <= few["max_rows"] else config(x, "linear")
    if misaligned(x):
        shape = config(x, "linear_misaligned")
    columns = columns_of(shape, d_out, x.element_size())
    with on_device(x):
        linear_kernel[(triton.cdiv(rows, shape["block_rows"]), triton.cdiv(d_out, columns))](
            y,
            x,
            weight,
            bias,
            h,
            v_a,
            core,
            u_b,
            s_a,
            s_b,
            offsets,
            rows,
            members,
            top_stride(members),
            d_in,
            d_out,
            x.stride(0),
            0 if h is None else h.stride(0),
            R_A=r_a,
            R_B=r_b,
            SHRINKS=h is None,
            BIASED=bias is not None,
            TRANSPOSED=not u_b.is_contiguous(),
            ROWS=shape["block_rows"],
            INNER=shape["block_inner_bytes"] // x.element_size(),
            COLUMNS=columns,
            RANK_A=_padded(r_a),
            RANK_B=_padded(r_b) if h is None else rank_block(x, "expand", r_b),
            WIDTH=SEARCH_WIDTH,
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
            num_stages=shape["num_stages"],
        )


def columns_of(shape: dict[str, int], d_out: int, element_size: int) -> int:
    """How wide a program's tile of the result is. Every tile reads all of x, so the widest that leaves enough programs."""
    columns, least = (shape[name] // element_size for name in ("block_columns_bytes", "least_columns_bytes"))
    while columns > least and triton.cdiv(d_out, columns) < shape["least_programs"]:
        columns //= 2
    return columns


def misaligned(x: Tensor) -> bool:
    """Whether a row's elements cannot be loaded several at once: each takes an address, too many for large blocks."""
    return x.shape[1] % ALIGNED != 0 or x.stride(0) % ALIGNED != 0


def _project(x: Tensor, v_a: Tensor) -> Tensor:
    """x v_a^T as float32 [splits, rows, r_a], to be summed over splits: few row blocks share d_in among programs."""
    (rows, d_in), r_a = x.shape, v_a.shape[0]
    shape = config(x, "project")
    ranks, inner = rank_block(x, "project", r_a), shape["block_inner_bytes"] // x.element_size()
    row_blocks, rank_blocks, inner_blocks = (
        triton.cdiv(rows, shape["block_rows"]),
        triton.cdiv(r_a, ranks),
        triton.cdiv(d_in, inner),
    )
    splits = min(shape["programs"] // (row_blocks * rank_blocks), inner_blocks // LEAST_SPLIT_BLOCKS)
    split = triton.cdiv(inner_blocks, max(splits, 1)) * inner
    partial = x.new_empty(triton.cdiv(d_in, split), rows, r_a, dtype=torch.float32)
    with on_device(x):
        project_kernel[(row_blocks, partial.shape[0], rank_blocks)](
            partial,
            x,
            v_a,
            rows,
            d_in,
            split,
            x.stride(0),
            R_A=r_a,
            ROWS=shape["block_rows"],
            INNER=inner,
            RANK_A=ranks,
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
            num_stages=shape["num_stages"],
        )
    return partial


def _mix_expand(
    y: Tensor, partial: Tensor, core: Tensor, u_b: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor
) -> None:
    (splits, rows, r_a), (d_out, r_b), members = partial.shape, u_b.shape, s_a.shape[0]
    shape = config(y, "mix_expand")
    columns = shape["block_columns_bytes"] // y.element_size()
    grid = (triton.cdiv(rows, shape["block_rows"]), triton.cdiv(d_out, columns))
    with on_device(y):
        mix_expand_kernel[grid](
            y,
            partial,
            core,
            u_b,
            s_a,
            s_b,
            offsets,
            rows,
            members,
            top_stride(members),
            splits,
            d_out,
            y.stride(0),
            R_A=r_a,
            R_B=r_b,
            TRANSPOSED=not u_b.is_contiguous(),
            ROWS=shape["block_rows"],
            COLUMNS=columns,
            RANK_B=rank_block(y, "expand", r_b),
            WIDTH=SEARCH_WIDTH,
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
        )


def _fused(
    y: Tensor, x: Tensor, v_a: Tensor, core: Tensor, u_b: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor
) -> None:
    (rows, d_in), (d_out, r_b), (members, r_a) = x.shape, u_b.shape, s_a.shape
    shape = config(x, "fused")
    with on_device(x):
        fused_kernel[(triton.cdiv(rows, shape["block_rows"]),)](
            y,
            x,
            v_a,
            core,
            u_b,
            s_a,
            s_b,
            offsets,
            rows,
            members,
            top_stride(members),
            d_in,
            d_out,
            y.stride(0),
            x.stride(0),
            R_A=r_a,
            R_B=r_b,
            TRANSPOSED=not u_b.is_contiguous(),
            ROWS=shape["block_rows"],
            INNER=shape["block_inner_bytes"] // x.element_size(),
            COLUMNS=shape["block_columns_bytes"] // x.element_size(),
            RANK_A=_padded(r_a),
            RANK_B=_padded(r_b),
            WIDTH=SEARCH_WIDTH,
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
            num_stages=shape["num_stages"],
        )


def _padded(rank: int) -> int:
    return max(triton.next_power_of_2(rank), LEAST_RANKS.value)


def rank_block(tensor: Tensor, kernel: str, rank: int) -> int:
    """How many ranks a program of ``kernel`` holds at once: float32 products, which run outside the matrix unit, hold
    their whole inner dimension in registers."""
    most = config(tensor, kernel)["ranks_bytes"] // tensor.element_size()
    return min(_padded(rank), max(most, LEAST_RANKS.value))


def top_stride(members: int) -> int:
    """The first step of `owners`."""
    stride = 1
    while stride * SEARCH_WIDTH < members:
        stride *= SEARCH_WIDTH
    return stride
