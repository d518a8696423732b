"""A base layer with the noise of its rows' members in one pass over the result, in Triton.

V_A of `svd_lora_linear` is shared, so every block of columns can afford to multiply it again. Noise differs from member to
member: a shrink in every block of columns would draw d_in values per pair and rank in each of them. For the 32 pairs
of 64 members and d_in = d_out = 4096 that is 64 blocks times 131,072 normals a rank, 21 us at 0.4e12 normals/s where the
layer takes 8 us to read. (Rademacher's words are a 32nd of that; they would save a launch of 2 us.) So the shrink of
`perturbed` goes first and leaves h, and the product x W^T ends with the second factor, of which a program draws its own
columns, once for every pair that has rows in its block. The sums stay in float32 registers and are rounded once; the
result is written once and never read.

What the rows of a block take from their pairs is one product for the matrix unit: h, each row's in the place of its own
pair and zeros elsewhere, times the factors drawn for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..noise import GAUSSIAN_TILE
from .config import config, on_device
from .noise import GAUSSIAN_COLUMNS, LANES, draw_groups, in_order
from .perturbed import UNSPECIALIZED, shrunk, tiles_of
from .storage import rounded
from .svd_lora import LEAST_RANKS, SEARCH_WIDTH, columns_of, dot, leading, misaligned, owners, project, top_stride

SPLITS_AT_ONCE = tl.constexpr(4)
NO_PAIR = tl.constexpr(-(2**31))


@triton.jit
def sum_of_splits(partial, row, rank, rows, splits, RANK: tl.constexpr):
    """h for a block of rows and of ranks from its partial sums."""
    place = partial + row.to(tl.int64)[:, None] * RANK + rank[None, :]
    inside = (row < rows)[:, None] & (rank < RANK)[None, :]
    h = tl.zeros((row.shape[0], rank.shape[0]), tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        split = first + tl.arange(0, SPLITS_AT_ONCE)
        places = place[:, :, None] + split.to(tl.int64)[None, None, :] * rows * RANK
        h += tl.sum(tl.load(places, mask=inside[:, :, None] & (split < splits)[None, None, :], other=0.0), 2)
    return h


@triton.jit
def number_pairs(pair, ROWS: tl.constexpr):
    """Which of the block's pairs, in the order of their first rows, every row belongs to."""
    index = tl.arange(0, ROWS)
    first = tl.min(tl.where(pair[:, None] == pair[None, :], index[None, :], ROWS), 1)
    return tl.gather(tl.cumsum((first == index).to(tl.int32), 0) - 1, first, 0)


@triton.jit
def dot_of_both_float32(a, b, sums, IN_TF32: tl.constexpr):
    """sums + a b, both float32. IN_TF32: through the matrix unit that has the sums, each in two parts, but for the
    product of the trailing ones."""
    if IN_TF32:
        sums = tl.dot(a - leading(a), leading(b), sums, input_precision="tf32")
        sums = tl.dot(leading(a), b - leading(b), sums, input_precision="tf32")
        return tl.dot(leading(a), leading(b), sums, input_precision="tf32")
    else:
        return dot(a, b, sums)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "top_stride", "tiles_per_row", "b_row_stride", "b_column_stride"])
def linear_kernel(
    y,
    x,
    weight,
    bias,
    partial,
    b,
    members,
    offsets,
    groups,
    rows,
    splits,
    top_stride,
    d_in,
    d_out,
    tiles_per_row,
    x_stride,
    b_row_stride,
    b_column_stride,
    sigma,
    scaling,
    k0,
    k1,
    site,
    generation,
    RANK: tl.constexpr,
    PERTURBED: tl.constexpr,
    RADEMACHER: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y = x W^T + bias + scaling h B^T. Noise is drawn for PAIRS and RANKS at once. Grid: row and column blocks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = project(x, weight, row, column, rows, d_in, x_stride, 0, d_in, d_out, INNER)
    if BIASED:
        sums += tl.load(bias + column, mask=column < d_out, other=0.0).to(tl.float32)[None, :]
    in_tf32: tl.constexpr = x.dtype.element_ty != tl.float32
    if PERTURBED:
        for first_rank in range(0, RANK, LEAST_RANKS):
            rank = first_rank + tl.arange(0, LEAST_RANKS)
            place = b + column.to(tl.int64)[None, :] * b_row_stride + rank[:, None] * b_column_stride
            inside = (rank < RANK)[:, None] & (column < d_out)[None, :]
            parameters = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            h = sum_of_splits(partial, row, rank, rows, splits, RANK) * scaling
            sums = dot_of_both_float32(h, parameters, sums, in_tf32)
        scaling *= sigma

    member = tl.load(members + owners(offsets, row, groups, top_stride, WIDTH))
    pair = (member >> 1).to(tl.int32)
    number = number_pairs(pair, ROWS)
    of_member = tl.where((member & 1) == 1, -scaling, scaling)[:, None]
    lane = tl.arange(0, COLUMNS // 4)
    group = tl.program_id(1) * (COLUMNS // GAUSSIAN_COLUMNS) + lane // LANES
    drawn = tl.arange(0, PAIRS * RANKS)
    for first_rank in range(0, RANK, RANKS):
        h = sum_of_splits(partial, row, first_rank + tl.arange(0, RANKS), rows, splits, RANK) * of_member
        repeated = tl.reshape(tl.broadcast_to(h[:, None, :], (ROWS, PAIRS, RANKS)), (ROWS, PAIRS * RANKS))
        for first_pair in range(0, tl.max(number) + 1, PAIRS):
            own = number[:, None] == (first_pair + drawn // RANKS)[None, :]
            z0, z1, z2, z3 = draw_groups(
                (first_rank + drawn % RANKS)[:, None],
                group[None, :],
                (lane % LANES)[None, :],
                tiles_per_row,
                k0,
                k1,
                site + 1,
                tl.max(tl.where(own, pair[:, None], NO_PAIR), 0)[:, None],
                generation,
                RADEMACHER,
            )
            noise = in_order(z0, z1, z2, z3, PAIRS * RANKS, COLUMNS)
            sums = dot_of_both_float32(tl.where(own, repeated, 0.0), noise, sums, in_tf32)

    place = y + row.to(tl.int64)[:, None] * d_out + column[None, :]
    inside = (row < rows)[:, None] & (column < d_out)[None, :]
    tl.store(place, rounded(sums, y.dtype.element_ty), mask=inside)


def perturbed_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    scaling: float,
    noise: dict[str, int | bool],
) -> None:
    """y = x W^T + bias plus what `add_perturbed` adds."""
    partial = shrunk(x, a, sigma, members, offsets, noise)
    (splits, rows, rank), (d_out, d_in), groups = partial.shape, weight.shape, members.shape[0]
    few = config(x, "perturbed_linear_decode")
    shape = few if rows <= few["max_rows"] or misaligned(x) else config(x, "perturbed_linear")
    block_rows = shape["block_rows"]
    columns = max(columns_of(shape, d_out, x.element_size()), GAUSSIAN_TILE)
    drawn = shape["elements"] // columns
    groups_of_block = triton.cdiv(min(block_rows, rows), triton.cdiv(rows, groups))
    pairs = min(triton.next_power_of_2(triton.cdiv(groups_of_block, 2)), drawn)
    ranks = min(triton.next_power_of_2(rank), drawn // pairs)
    pairs = max(pairs, LEAST_RANKS.value // ranks)
    with on_device(x):
        linear_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(d_out, columns))](
            y,
            x,
            weight,
            bias,
            partial,
            b,
            members,
            offsets,
            groups,
            rows,
            splits,
            top_stride(groups),
            d_in,
            d_out,
            tiles_of(d_out, noise),
            x.stride(0),
            *((0, 0) if b is None else b.stride()),
            sigma,
            scaling,
            **noise,
            BIASED=bias is not None,
            ROWS=block_rows,
            INNER=shape["block_inner_bytes"] // x.element_size(),
            COLUMNS=columns,
            PAIRS=pairs,
            RANKS=ranks,
            WIDTH=SEARCH_WIDTH,
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
            num_stages=shape["num_stages"],
        )
