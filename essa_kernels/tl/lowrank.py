"""EGGROLL's low-rank noise in Triton: the forward, and the update as one blocked product over factors drawn on the way.

A program of the update keeps the sums of a square of w in registers while it draws the factors' parts for it, pair by
pair and rank by rank. The order and the roundings are the contract, so no matrix unit may do it.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..noise import GAUSSIAN_TILE, RADEMACHER_TILE
from .config import config, on_device
from .noise import GAUSSIAN_COLUMNS, GAUSSIAN_TAG, LANES, RADEMACHER_TAG, as_tensor, draw_groups, in_order, key_words
from .perturbed import add_perturbed, noise_of
from .perturbed_linear import perturbed_linear
from .storage import rounded


@triton.jit
def factors(rank, first_f, first_e, f_tiles, e_tiles, k0, k1, site, pair, generation, RADEMACHER, SIDE: tl.constexpr):
    """F^T[rank] from group ``first_f`` of columns, and E^T[rank] from ``first_e``: two vectors, drawn as one."""
    HALF: tl.constexpr = SIDE // 4
    index = tl.arange(0, 2 * HALF)
    of_e = index // HALF
    lane = index % LANES
    group = tl.where(of_e == 1, first_e, first_f) + (index % HALF) // LANES
    tiles_per_row = tl.where(of_e == 1, e_tiles, f_tiles)
    z0, z1, z2, z3 = draw_groups(rank, group, lane, tiles_per_row, k0, k1, site + of_e, pair, generation, RADEMACHER)
    return tl.split(tl.permute(in_order(z0, z1, z2, z3, 2, SIDE), (1, 0)))


@triton.jit(do_not_specialize=["k0", "k1", "site", "generation", "pairs", "f_tiles", "e_tiles"])
def update_kernel(
    w,
    pair_weights,
    pairs,
    d_out,
    d_in,
    f_tiles,
    e_tiles,
    k0,
    k1,
    site,
    generation,
    RANK: tl.constexpr,
    RADEMACHER: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Grid: squares of w, those of one row of squares in succession."""
    across = tl.cdiv(d_in, SIDE)
    row_block = tl.program_id(0) // across
    column_block = tl.program_id(0) - row_block * across
    first_e = row_block * (SIDE // GAUSSIAN_COLUMNS)
    first_f = column_block * (SIDE // GAUSSIAN_COLUMNS)
    sums = tl.zeros((SIDE, SIDE), tl.float32)
    for pair in range(pairs):
        weight = tl.load(pair_weights + pair)
        if weight != 0.0:
            for rank in range(RANK):
                f, e = factors(
                    rank,
                    first_f,
                    first_e,
                    f_tiles,
                    e_tiles,
                    k0,
                    k1,
                    site,
                    as_tensor(pair),
                    generation,
                    RADEMACHER,
                    SIDE,
                )
                sums = tl.fma((weight * e)[:, None], f[None, :], sums)
    row, column = tl.arange(0, SIDE), tl.arange(0, SIDE)
    start = w + row_block.to(tl.int64) * SIDE * d_in + column_block * SIDE
    place = start + (row[:, None] * d_in + column[None, :])
    inside = (row < d_out - row_block * SIDE)[:, None] & (column < d_in - column_block * SIDE)[None, :]
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32) + sums
    tl.store(place, rounded(value, w.dtype.element_ty), mask=inside)


def lowrank_perturbed_(
    y: Tensor,
    x: Tensor,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """y += sigma / sqrt(rank) E (F^T x), row by row, with the factors of the pair of the member that owns the row."""
    noise = noise_of(seed, generation, site, rank, distribution, perturbed=False)
    add_perturbed(y, x, None, None, 0.0, members, offsets, sigma / rank**0.5, noise)


def lowrank_perturbed_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    generation: int,
    site: int,
    sigma: float,
    members: Tensor,
    offsets: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """y = x weight^T + bias + sigma / sqrt(rank) E (F^T x), row by row."""
    noise = noise_of(seed, generation, site, rank, distribution, perturbed=False)
    perturbed_linear(y, x, weight, bias, None, None, 0.0, members, offsets, sigma / rank**0.5, noise)


def lowrank_update_(
    tensors: Sequence[Tensor],
    seed: int,
    generation: int,
    site: int,
    pair_weights: Tensor,
    rank: int,
    distribution: str,
) -> None:
    """tensor i += sum over pairs of pair_weights[pair] E F^T, E and F drawn from site + 2 i."""
    rademacher = distribution == "rademacher"
    tile = RADEMACHER_TILE if rademacher else GAUSSIAN_TILE
    shape = config(tensors[0], "lowrank_update")
    side = shape["side"]
    for i, w in enumerate(tensors):
        d_out, d_in = w.shape
        key = key_words(RADEMACHER_TAG if rademacher else GAUSSIAN_TAG, seed, generation, site + 2 * i, 0)
        del key["pair"], key["sign"]
        with on_device(w):
            update_kernel[(triton.cdiv(d_out, side) * triton.cdiv(d_in, side),)](
                w,
                pair_weights,
                pair_weights.shape[0],
                d_out,
                d_in,
                triton.cdiv(d_in, tile),
                triton.cdiv(d_out, tile),
                **key,
                RANK=rank,
                RADEMACHER=rademacher,
                SIDE=side,
                num_warps=shape["num_warps"],
                enable_fp_fusion=False,
            )
