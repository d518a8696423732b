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

LEAST_RANK_BLOCK = 16
MOST_RANK_BLOCK = 64  # ranks beyond it are walked in blocks
SEARCH_WIDTH = 64
LEAST_SPLIT_BLOCKS = 2  # blocks of d_in that make a split worth its partial sums
BEYOND_ANY_ROW = tl.constexpr(2**62)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
def project(x, v_a, row, rank, rows, d_in, r_a, x_stride, begin, end, INNER: tl.constexpr):
    """x V_A^T over columns begin .. end - 1 of x, for a block of rows and of ranks: float32 [rows, ranks]."""
    inner = tl.arange(0, INNER)
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    v_rows = v_a + rank.to(tl.int64)[None, :] * d_in
    sums = tl.zeros((row.shape[0], rank.shape[0]), tl.float32)
    for first in range(begin, end, INNER):
        column = first + inner
        inside = column < end
        x_block = tl.load(x_rows + column[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        v_block = tl.load(v_rows + column[:, None], mask=inside[:, None] & (rank < r_a)[None, :], other=0.0)
        sums = dot(x_block, v_block, sums)
    return sums


@triton.jit
def scale_ranks(sums, singular_values, member, rank, ranks):
    """Every row times its member's singular values."""
    values = tl.load(
        singular_values + member.to(tl.int64)[:, None] * ranks + rank[None, :],
        mask=(rank < ranks)[None, :],
        other=0.0,
    )
    return sums * values


@triton.jit
def apply_core(scaled, core, rank_a, rank_b, r_a, r_b, sums):
    """sums + scaled core^T over a block of r_a, for a block of r_b."""
    block = tl.load(
        core + rank_b.to(tl.int64)[None, :] * r_a + rank_a[:, None],
        mask=(rank_a < r_a)[:, None] & (rank_b < r_b)[None, :],
        other=0.0,
    )
    return dot(scaled, block, sums)


@triton.jit
def mix(partial, core, s_a, s_b, row, member, rank_b, rows, splits, r_a, r_b, RANK_A: tl.constexpr):
    """Partial sums [splits, rows, r_a] to h for a block of rows and of r_b: float32 [rows, ranks]."""
    h = tl.zeros((row.shape[0], rank_b.shape[0]), tl.float32)
    for first in range(0, r_a, RANK_A):
        rank_a = first + tl.arange(0, RANK_A)
        place = partial + row.to(tl.int64)[:, None] * r_a + rank_a[None, :]
        inside = (row < rows)[:, None] & (rank_a < r_a)[None, :]
        sums = tl.zeros((row.shape[0], RANK_A), tl.float32)
        for _ in range(splits):
            sums += tl.load(place, mask=inside, other=0.0)
            place += rows.to(tl.int64) * r_a
        scaled = scale_ranks(sums, s_a, member, rank_a, r_a)
        h = apply_core(scaled, core, rank_a, rank_b, r_a, r_b, h)
    return scale_ranks(h, s_b, member, rank_b, r_b)


@triton.jit
def expand(h, u_b, column, rank, d_out, r_b, u_b_row_stride, u_b_column_stride, sums):
    """sums + h U_B^T over a block of r_b, for a block of columns. h stays float32 in effect: where U_B is shorter, h
    goes through the matrix unit as a leading and a trailing part."""
    u_block = tl.load(
        u_b + column.to(tl.int64)[None, :] * u_b_row_stride + rank.to(tl.int64)[:, None] * u_b_column_stride,
        mask=(rank < r_b)[:, None] & (column < d_out)[None, :],
        other=0.0,
    )
    if u_block.dtype == tl.bfloat16:
        leading = h.to(tl.bfloat16)
        trailing = (h - leading.to(tl.float32)).to(tl.bfloat16)
        return dot(leading, u_block, dot(trailing, u_block, sums))
    elif u_block.dtype == tl.float16:
        # h may exceed float16's range, while float16 fits into tf32 exactly.
        u_block = u_block.to(tl.float32)
        leading = (h.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        sums = tl.dot(h - leading, u_block, sums, input_precision="tf32")
        return tl.dot(leading, u_block, sums, input_precision="tf32")
    else:
        return dot(h, u_block, sums)


@triton.jit
def add_to(y, delta, row, column, rows, d_out, y_stride):
    place = y + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < d_out)[None, :]
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32) + delta
    tl.store(place, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "split"])
def project_kernel(
    partial,
    x,
    v_a,
    rows,
    d_in,
    r_a,
    split,
    x_stride,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    RANK_A: tl.constexpr,
):
    """partial[i] = x V_A^T over columns i * split .. of x. Grid: row blocks, splits, blocks of r_a."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(2) * RANK_A + tl.arange(0, RANK_A)
    begin = tl.program_id(1) * split
    sums = project(x, v_a, row, rank, rows, d_in, r_a, x_stride, begin, tl.minimum(begin + split, d_in), INNER)
    place = partial + (tl.program_id(1) * rows.to(tl.int64) + row)[:, None] * r_a + rank[None, :]
    tl.store(place, sums, mask=(row < rows)[:, None] & (rank < r_a)[None, :])


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
    r_a,
    r_b,
    h_stride,
    ROWS: tl.constexpr,
    RANK_A: tl.constexpr,
    RANK_B: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """h from partial sums. Grid: row blocks, blocks of r_b."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANK_B + tl.arange(0, RANK_B)
    member = owners(offsets, row, members, top_stride, WIDTH)
    block = mix(partial, core, s_a, s_b, row, member, rank, rows, splits, r_a, r_b, RANK_A)
    place = h + row.to(tl.int64)[:, None] * h_stride + rank[None, :]
    tl.store(place, block, mask=(row < rows)[:, None] & (rank < r_b)[None, :])


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    y,
    h,
    u_b,
    rows,
    d_out,
    r_b,
    y_stride,
    h_stride,
    u_b_row_stride,
    u_b_column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_B: tl.constexpr,
):
    """y += h U_B^T. Grid: row blocks, column blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    delta = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, r_b, RANK_B):
        rank = first + tl.arange(0, RANK_B)
        h_block = tl.load(
            h + row.to(tl.int64)[:, None] * h_stride + rank[None, :],
            mask=(row < rows)[:, None] & (rank < r_b)[None, :],
            other=0.0,
        )
        delta = expand(h_block, u_b, column, rank, d_out, r_b, u_b_row_stride, u_b_column_stride, delta)
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
    r_a,
    r_b,
    y_stride,
    u_b_row_stride,
    u_b_column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_A: tl.constexpr,
    RANK_B: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y += U_B h from partial sums, every column block making h anew. Grid: row blocks, column blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK_B)
    member = owners(offsets, row, members, top_stride, WIDTH)
    h = mix(partial, core, s_a, s_b, row, member, rank, rows, splits, r_a, r_b, RANK_A)
    delta = tl.zeros((ROWS, COLUMNS), tl.float32)
    delta = expand(h, u_b, column, rank, d_out, r_b, u_b_row_stride, u_b_column_stride, delta)
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
    r_a,
    r_b,
    y_stride,
    x_stride,
    u_b_row_stride,
    u_b_column_stride,
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
    sums = project(x, v_a, row, rank_a, rows, d_in, r_a, x_stride, 0, d_in, INNER)
    scaled = scale_ranks(sums, s_a, member, rank_a, r_a)
    h = tl.zeros((ROWS, RANK_B), tl.float32)
    h = apply_core(scaled, core, rank_a, rank_b, r_a, r_b, h)
    h = scale_ranks(h, s_b, member, rank_b, r_b)
    for first in range(0, d_out, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        delta = tl.zeros((ROWS, COLUMNS), tl.float32)
        delta = expand(h, u_b, column, rank_b, d_out, r_b, u_b_row_stride, u_b_column_stride, delta)
        add_to(y, delta, row, column, rows, d_out, y_stride)


def svd_lora_(
    y: Tensor, x: Tensor, v_a: Tensor, core: Tensor, u_b: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor
) -> None:
    """y += u_b (s_b[m] * (core (s_a[m] * (v_a x)))), row by row, where m is the member that owns the row."""
    rows, (d_out, r_b), r_a = x.shape[0], u_b.shape, v_a.shape[0]
    if max(r_a, r_b) > MOST_RANK_BLOCK:
        h = x.new_empty(rows, r_b, dtype=torch.float32)
        svd_lora_shrink(h, x, v_a, core, s_a, s_b, offsets)
        svd_lora_expand_(y, h, u_b)
    elif rows >= config(x, "fused")["min_rows"]:
        _fused(y, x, v_a, core, u_b, s_a, s_b, offsets)
    else:
        partial = _project(x, v_a)
        shape = config(x, "expand")
        grid = (triton.cdiv(rows, shape["block_rows"]), triton.cdiv(d_out, shape["block_columns"]))
        with on_device(x):
            mix_expand_kernel[grid](
                y,
                partial,
                core,
                u_b,
                s_a,
                s_b,
                offsets,
                rows,
                s_a.shape[0],
                _top_stride(s_a.shape[0]),
                partial.shape[0],
                d_out,
                r_a,
                r_b,
                y.stride(0),
                *u_b.stride(),
                ROWS=shape["block_rows"],
                COLUMNS=shape["block_columns"],
                RANK_A=_rank_block(r_a),
                RANK_B=_rank_block(r_b),
                WIDTH=SEARCH_WIDTH,
                num_warps=shape["num_warps"],
            )


def svd_lora_shrink(h: Tensor, x: Tensor, v_a: Tensor, core: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor) -> None:
    """h = s_b[m] * (core (s_a[m] * (v_a x))), row by row, where m is the member that owns the row."""
    partial = _project(x, v_a)
    rows, r_b, r_a = *h.shape, v_a.shape[0]
    shape = config(x, "mix")
    grid = (triton.cdiv(rows, shape["block_rows"]), triton.cdiv(r_b, _rank_block(r_b)))
    with on_device(x):
        mix_kernel[grid](
            h,
            partial,
            core,
            s_a,
            s_b,
            offsets,
            rows,
            s_a.shape[0],
            _top_stride(s_a.shape[0]),
            partial.shape[0],
            r_a,
            r_b,
            h.stride(0),
            ROWS=shape["block_rows"],
            RANK_A=_rank_block(r_a),
            RANK_B=_rank_block(r_b),
            WIDTH=SEARCH_WIDTH,
            num_warps=shape["num_warps"],
        )


def svd_lora_expand_(y: Tensor, h: Tensor, u_b: Tensor) -> None:
    """y += u_b h, row by row."""
    rows, (d_out, r_b) = y.shape[0], u_b.shape
    shape = config(y, "expand")
    grid = (triton.cdiv(rows, shape["block_rows"]), triton.cdiv(d_out, shape["block_columns"]))
    with on_device(y):
        expand_kernel[grid](
            y,
            h,
            u_b,
            rows,
            d_out,
            r_b,
            y.stride(0),
            h.stride(0),
            *u_b.stride(),
            ROWS=shape["block_rows"],
            COLUMNS=shape["block_columns"],
            RANK_B=_rank_block(r_b),
            num_warps=shape["num_warps"],
        )


def _project(x: Tensor, v_a: Tensor) -> Tensor:
    """x v_a^T as float32 [splits, rows, r_a], to be summed over splits: few row blocks share d_in among programs."""
    (rows, d_in), r_a = x.shape, v_a.shape[0]
    shape = config(x, "project")
    row_blocks, rank_blocks = triton.cdiv(rows, shape["block_rows"]), triton.cdiv(r_a, _rank_block(r_a))
    inner_blocks = triton.cdiv(d_in, shape["block_inner"])
    splits = min(shape["programs"] // (row_blocks * rank_blocks), inner_blocks // LEAST_SPLIT_BLOCKS)
    split = triton.cdiv(inner_blocks, max(splits, 1)) * shape["block_inner"]
    partial = x.new_empty(triton.cdiv(d_in, split), rows, r_a, dtype=torch.float32)
    with on_device(x):
        project_kernel[(row_blocks, partial.shape[0], rank_blocks)](
            partial,
            x,
            v_a,
            rows,
            d_in,
            r_a,
            split,
            x.stride(0),
            ROWS=shape["block_rows"],
            INNER=shape["block_inner"],
            RANK_A=_rank_block(r_a),
            num_warps=shape["num_warps"],
            num_stages=shape["num_stages"],
        )
    return partial


def _fused(
    y: Tensor, x: Tensor, v_a: Tensor, core: Tensor, u_b: Tensor, s_a: Tensor, s_b: Tensor, offsets: Tensor
) -> None:
    (rows, d_in), (d_out, r_b), r_a = x.shape, u_b.shape, v_a.shape[0]
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
            s_a.shape[0],
            _top_stride(s_a.shape[0]),
            d_in,
            d_out,
            r_a,
            r_b,
            y.stride(0),
            x.stride(0),
            *u_b.stride(),
            ROWS=shape["block_rows"],
            INNER=shape["block_inner"],
            COLUMNS=shape["block_columns"],
            RANK_A=_rank_block(r_a),
            RANK_B=_rank_block(r_b),
            WIDTH=SEARCH_WIDTH,
            num_warps=shape["num_warps"],
            num_stages=shape["num_stages"],
        )


def _rank_block(rank: int) -> int:
    return min(max(triton.next_power_of_2(rank), LEAST_RANK_BLOCK), MOST_RANK_BLOCK)


def _top_stride(members: int) -> int:
    """The first step of `owners`."""
    stride = 1
    while stride * SEARCH_WIDTH < members:
        stride *= SEARCH_WIDTH
    return stride
