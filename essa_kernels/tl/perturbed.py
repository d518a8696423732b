"""Rows of members times matrices that are made where they are used: what the forward ops with noise share, in Triton.

A program takes the rows of an antithetic pair, a few at a time, and draws the noise for all of them at once; the program
of an odd member whose even one is there has nothing to do. Two launches: the first leaves partial sums of h
[splits, rows, rank], the second adds them in order and multiplies them with the second factor. Products run outside
the matrix units: with few rows to a pair, drawing costs more than multiplying, and a padded rank would be drawn too.
Every sum has a fixed order, so results repeat exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..noise import GAUSSIAN_TILE, RADEMACHER_TILE
from .config import config, on_device
from .noise import GAUSSIAN_COLUMNS, GAUSSIAN_TAG, LANES, RADEMACHER_TAG, draw_groups, key_words
from .storage import rounded

SEARCH_WIDTH = 128
# Were strides known to be multiples of 16, Triton would load several elements a thread, and reshuffle the noise for it.
UNSPECIALIZED = ["groups", "rows", "splits", "k0", "k1", "site", "generation"]


@triton.jit
def rows_of_pair(members, offsets, groups, WIDTH: tl.constexpr):
    """The rows of a program's pair: its own group's, then those of the group of the other member.

    Returns the member, the first row and number of its own rows, the first of the other's, and how many there are in
    all: none where the other, even one leads.
    """
    index = tl.program_id(0)
    member = tl.load(members + index)
    partner = tl.full((), -1, tl.int32)
    for first in range(0, groups, WIDTH):
        candidate = first + tl.arange(0, WIDTH)
        other = tl.load(members + candidate, mask=candidate < groups, other=-1)
        partner = tl.maximum(partner, tl.max(tl.where(other == (member ^ 1), candidate, -1)))
    own_first = tl.load(offsets + index)
    own = tl.load(offsets + index + 1) - own_first
    found = partner >= 0
    other_first = tl.load(offsets + partner, mask=found, other=0)
    others = tl.load(offsets + partner + 1, mask=found, other=0) - other_first
    leads = ((member & 1) == 0) | (partner < 0)
    return member, own_first, own.to(tl.int32), other_first, tl.where(leads, own + others, 0).to(tl.int32)


@triton.jit
def rows_from(first, member, own_first, own, other_first, count, ROWS: tl.constexpr):
    """Some of the pair's rows: which, whether there are so many, and whether they are the odd member's."""
    place = first + tl.arange(0, ROWS)
    row = tl.where(place < own, own_first + place, other_first + (place - own))
    odd = (place >= own) | ((member & 1) == 1)
    return row, place < count, odd


@triton.jit
def matrix(noise, parameters, column, columns, scale, PERTURBED: tl.constexpr):
    """Some columns of a row of the factor: the noise, or for rows of a block the parameters plus ``scale`` times it."""
    if PERTURBED:
        values = tl.load(parameters, mask=column < columns, other=0.0).to(tl.float32)
        return values[None, :] + scale[:, None] * noise[None, :]
    else:
        return noise[None, :]


@triton.jit
def shrink(sums, x_rows, a, column, d_in, inside, noise, scale, PERTURBED: tl.constexpr):
    x = tl.load(x_rows + column[None, :], mask=inside[:, None] & (column < d_in)[None, :], other=0.0).to(tl.float32)
    return sums + x * matrix(noise, a + column, column, d_in, scale, PERTURBED)


@triton.jit
def expand(y_rows, delta, column, d_out, inside):
    here = inside[:, None] & (column < d_out)[None, :]
    value = tl.load(y_rows + column[None, :], mask=here, other=0.0).to(tl.float32) + delta
    tl.store(y_rows + column[None, :], rounded(value, y_rows.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "d_in", "x_stride", "tiles_per_row", "split"])
def shrink_kernel(
    partial,
    x,
    a,
    members,
    offsets,
    groups,
    rows,
    d_in,
    split,
    tiles_per_row,
    x_stride,
    sigma,
    k0,
    k1,
    site,
    generation,
    RANK: tl.constexpr,
    PERTURBED: tl.constexpr,
    RADEMACHER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """partial[i] = x A^T over groups i * split .. of 64 columns of x. Grid: groups of rows, ranks, splits."""
    rank = tl.program_id(1)
    begin = tl.program_id(2) * split
    end = tl.minimum(begin + split, tl.cdiv(d_in, GAUSSIAN_COLUMNS))
    member, own_first, own, other_first, count = rows_of_pair(members, offsets, groups, WIDTH)
    pair = (member >> 1).to(tl.int32)
    lane = tl.arange(0, WIDE) % LANES
    a_row = a + rank.to(tl.int64) * d_in
    for first in range(0, count, ROWS):
        row, inside, odd = rows_from(first, member, own_first, own, other_first, count, ROWS)
        scale = tl.where(odd, -sigma, sigma)
        x_rows = x + row[:, None] * x_stride
        sums = tl.zeros((ROWS, WIDE), tl.float32)
        for first_group in range(begin, end, WIDE // LANES):
            group = first_group + tl.arange(0, WIDE) // LANES
            column = group * GAUSSIAN_COLUMNS + lane
            z0, z1, z2, z3 = draw_groups(rank, group, lane, tiles_per_row, k0, k1, site, pair, generation, RADEMACHER)
            sums = shrink(sums, x_rows, a_row, column, d_in, inside, z0, scale, PERTURBED)
            sums = shrink(sums, x_rows, a_row, column + LANES, d_in, inside, z1, scale, PERTURBED)
            sums = shrink(sums, x_rows, a_row, column + 2 * LANES, d_in, inside, z2, scale, PERTURBED)
            sums = shrink(sums, x_rows, a_row, column + 3 * LANES, d_in, inside, z3, scale, PERTURBED)
        place = partial + (tl.program_id(2) * rows.to(tl.int64) + row) * RANK + rank
        tl.store(place, tl.sum(sums, 1), mask=inside)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "d_out", "y_stride", "b_row_stride", "b_column_stride", "tiles_per_row"])
def expand_kernel(
    y,
    partial,
    b,
    members,
    offsets,
    groups,
    rows,
    splits,
    d_out,
    tiles_per_row,
    y_stride,
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
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y += scaling h B^T. Grid: groups of rows, blocks of columns."""
    member, own_first, own, other_first, count = rows_of_pair(members, offsets, groups, WIDTH)
    pair = (member >> 1).to(tl.int32)
    lane = tl.arange(0, WIDE) % LANES
    group = tl.program_id(1) * (WIDE // LANES) + tl.arange(0, WIDE) // LANES
    column = group * GAUSSIAN_COLUMNS + lane
    b_rows = b + column.to(tl.int64) * b_row_stride
    for first in range(0, count, ROWS):
        row, inside, odd = rows_from(first, member, own_first, own, other_first, count, ROWS)
        scale = tl.where(odd, -sigma, sigma)
        delta0 = tl.zeros((ROWS, WIDE), tl.float32)
        delta1 = tl.zeros((ROWS, WIDE), tl.float32)
        delta2 = tl.zeros((ROWS, WIDE), tl.float32)
        delta3 = tl.zeros((ROWS, WIDE), tl.float32)
        for rank in range(RANK):
            h = tl.zeros((ROWS,), tl.float32)
            for i in range(splits):
                h += tl.load(partial + (i * rows.to(tl.int64) + row) * RANK + rank, mask=inside, other=0.0)
            h = (h * scaling if PERTURBED else h * tl.where(odd, -scaling, scaling))[:, None]
            z0, z1, z2, z3 = draw_groups(
                rank, group, lane, tiles_per_row, k0, k1, site + 1, pair, generation, RADEMACHER
            )
            b_rank = b_rows + rank * b_column_stride
            delta0 += h * matrix(z0, b_rank, column, d_out, scale, PERTURBED)
            delta1 += h * matrix(z1, b_rank + LANES * b_row_stride, column + LANES, d_out, scale, PERTURBED)
            delta2 += h * matrix(z2, b_rank + 2 * LANES * b_row_stride, column + 2 * LANES, d_out, scale, PERTURBED)
            delta3 += h * matrix(z3, b_rank + 3 * LANES * b_row_stride, column + 3 * LANES, d_out, scale, PERTURBED)
        y_rows = y + row[:, None] * y_stride
        expand(y_rows, delta0, column, d_out, inside)
        expand(y_rows, delta1, column + LANES, d_out, inside)
        expand(y_rows, delta2, column + 2 * LANES, d_out, inside)
        expand(y_rows, delta3, column + 3 * LANES, d_out, inside)


def noise_of(
    seed: int, generation: int, site: int, rank: int, distribution: str, *, perturbed: bool
) -> dict[str, int | bool]:
    """What every kernel is told of the noise. ``perturbed``: it is added to parameters, else it is the factor."""
    key = key_words(RADEMACHER_TAG if distribution == "rademacher" else GAUSSIAN_TAG, seed, generation, site, 0)
    del key["pair"], key["sign"]
    return {**key, "RANK": rank, "PERTURBED": perturbed, "RADEMACHER": distribution == "rademacher"}


def tiles_of(columns: int, noise: dict[str, int | bool]) -> int:
    """How many tiles of noise a row of so many columns has."""
    return triton.cdiv(columns, RADEMACHER_TILE if noise["RADEMACHER"] else GAUSSIAN_TILE)


def block_of(x: Tensor, groups: int) -> dict[str, int | bool]:
    """The blocks of this file's kernels and how they are launched."""
    shape = config(x, "perturbed")
    block_rows = min(max(2, triton.next_power_of_2(2 * triton.cdiv(x.shape[0], groups))), shape["block_rows"])
    return {
        "ROWS": block_rows,
        "WIDE": min(shape["lanes"], shape["elements"] // block_rows),
        "WIDTH": SEARCH_WIDTH,
        "num_warps": shape["num_warps"],
        "enable_fp_fusion": True,
    }


def shrunk(
    x: Tensor, a: Tensor | None, sigma: float, members: Tensor, offsets: Tensor, noise: dict[str, int | bool]
) -> Tensor:
    """x (A + sigma eps_A)^T, or without a x eps_A^T with the sign of the even member: float32 [splits, rows, rank], to
    be summed over splits."""
    (rows, d_in), groups, rank, block = x.shape, members.shape[0], noise["RANK"], block_of(x, members.shape[0])
    groups_at_once, inner_groups = block["WIDE"] // LANES.value, triton.cdiv(d_in, GAUSSIAN_TILE)
    splits = max(1, min(config(x, "perturbed")["programs"] // (groups * rank), inner_groups // groups_at_once))
    split = triton.cdiv(triton.cdiv(inner_groups, splits), groups_at_once) * groups_at_once
    partial = x.new_empty(triton.cdiv(inner_groups, split), rows, rank, dtype=torch.float32)
    with on_device(x):
        shrink_kernel[(groups, rank, partial.shape[0])](
            partial,
            x,
            x if a is None else a,
            members,
            offsets,
            groups,
            rows,
            d_in,
            split,
            tiles_of(d_in, noise),
            x.stride(0),
            sigma,
            **noise,
            **block,
        )
    return partial


def add_perturbed(
    y: Tensor,
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    scaling: float,
    noise: dict[str, int | bool],
) -> None:
    """y += scaling (B + sigma eps_B) ((A + sigma eps_A) x); without a and b, y += +-scaling eps_B (eps_A x)."""
    partial = shrunk(x, a, sigma, members, offsets, noise)
    (splits, rows, _), d_out, groups, block = partial.shape, y.shape[1], members.shape[0], block_of(x, members.shape[0])
    with on_device(x):
        expand_kernel[(groups, triton.cdiv(d_out, block["WIDE"] // LANES.value * GAUSSIAN_TILE))](
            y,
            partial,
            y if b is None else b,
            members,
            offsets,
            groups,
            rows,
            splits,
            d_out,
            tiles_of(d_out, noise),
            y.stride(0),
            *((0, 0) if b is None else b.stride()),
            sigma,
            scaling,
            **noise,
            **block,
        )
