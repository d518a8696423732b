"""Full-rank noise on parameters in Triton: a member's perturbation, and the update of all members.

The tensors of one dtype are one launch: a table on the device says where each one lies, and a program takes some noise
tiles of one tensor. An update keeps the sums of its tiles in registers while it draws one pair after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..noise import GAUSSIAN_TILE, RADEMACHER_TILE
from .config import config, on_device, outlives_graphs
from .noise import (
    GAUSSIAN_COLUMNS,
    GAUSSIAN_TAG,
    LANES,
    RADEMACHER_COLUMNS,
    RADEMACHER_TAG,
    as_tensor,
    gaussian_blocks,
    key_words,
    rademacher_words,
    with_sign,
)
from .storage import rounded

SEARCH_WIDTH = tl.constexpr(256)
KEY_ARGUMENTS = ["k0", "k1", "site", "generation"]


@triton.jit
def _load(start, element, left):
    return tl.load(start + element, mask=element < left, other=0.0).to(tl.float32)


@triton.jit
def _store(start, element, left, value):
    tl.store(start + element, rounded(value, start.dtype.element_ty), mask=element < left)


@triton.jit
def _signed(value, words, bit):
    """The value with the signs of a bit of the words: to add it is to fma the value with a sign."""
    negative = (words[:, None, :] << bit.to(tl.uint32)).to(tl.int32, bitcast=True) & -0x80000000
    return with_sign(value, negative)


@triton.jit
def _tiles(table, tensors, TILE: tl.constexpr, TILES: tl.constexpr, ELEMENT: tl.constexpr):
    """A program's share of the tensors in the table, whose rows are `end`, `address`, `cols`, `tiles` and `index`.

    Returns the tiles' indices in their noise matrix, where each one starts, how many of its elements exist, and the
    tensor's position in the list.
    """
    program = tl.program_id(0)
    place = 0
    for first in range(0, tensors, SEARCH_WIDTH):
        entry = first + tl.arange(0, SEARCH_WIDTH)
        end = tl.load(table + entry, mask=entry < tensors, other=2**62)
        place += tl.sum((end <= program).to(tl.int32))
    address = tl.load(table + tensors + place)
    cols = tl.load(table + 2 * tensors + place)
    tiles = tl.load(table + 3 * tensors + place)
    index = tl.load(table + 4 * tensors + place)
    begin = tl.load(table + place - 1, mask=place > 0, other=0)
    tile = ((program - begin) * TILES + tl.arange(0, TILES)).to(tl.int32)
    tiles_per_row = ((cols + TILE - 1) // TILE).to(tl.int32)
    row = tile // tiles_per_row
    column = (tile - row * tiles_per_row).to(tl.int64) * TILE
    left = tl.where(tile < tiles, tl.minimum(cols - column, TILE), 0).to(tl.int32)
    start = address.to(tl.pointer_type(ELEMENT)) + (row.to(tl.int64) * cols + column)
    return tile, start, left, index.to(tl.int32)


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "tensors", "pair"])
def perturb_gaussian_kernel(
    table, tensors, k0, k1, site, pair, generation, sigma, ELEMENT: tl.constexpr, TILES: tl.constexpr
):
    tile, start, left, index = _tiles(table, tensors, GAUSSIAN_COLUMNS, TILES, ELEMENT)
    start, left = start[:, None], left[:, None]
    lane = tl.arange(0, LANES)[None, :]
    block = (tile[:, None] * LANES + lane).to(tl.uint32)
    z0, z1, z2, z3 = gaussian_blocks(block, k0, k1, site + 2 * index, pair, generation, 0)
    _store(start, lane, left, tl.fma(sigma, z0, _load(start, lane, left)))
    _store(start, lane + LANES, left, tl.fma(sigma, z1, _load(start, lane + LANES, left)))
    _store(start, lane + 2 * LANES, left, tl.fma(sigma, z2, _load(start, lane + 2 * LANES, left)))
    _store(start, lane + 3 * LANES, left, tl.fma(sigma, z3, _load(start, lane + 3 * LANES, left)))


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "tensors", "pairs"])
def update_gaussian_kernel(
    table, tensors, k0, k1, site, weights, pairs, generation, ELEMENT: tl.constexpr, TILES: tl.constexpr
):
    tile, start, left, index = _tiles(table, tensors, GAUSSIAN_COLUMNS, TILES, ELEMENT)
    start, left = start[:, None], left[:, None]
    lane = tl.arange(0, LANES)[None, :]
    block = (tile[:, None] * LANES + lane).to(tl.uint32)
    total0 = tl.zeros((TILES, LANES), tl.float32)
    total1 = tl.zeros((TILES, LANES), tl.float32)
    total2 = tl.zeros((TILES, LANES), tl.float32)
    total3 = tl.zeros((TILES, LANES), tl.float32)
    for pair in range(pairs):
        weight = tl.load(weights + pair)
        if weight != 0.0:
            z0, z1, z2, z3 = gaussian_blocks(block, k0, k1, site + 2 * index, as_tensor(pair), generation, 0)
            total0 = tl.fma(weight, z0, total0)
            total1 = tl.fma(weight, z1, total1)
            total2 = tl.fma(weight, z2, total2)
            total3 = tl.fma(weight, z3, total3)
    _store(start, lane, left, _load(start, lane, left) + total0)
    _store(start, lane + LANES, left, _load(start, lane + LANES, left) + total1)
    _store(start, lane + 2 * LANES, left, _load(start, lane + 2 * LANES, left) + total2)
    _store(start, lane + 3 * LANES, left, _load(start, lane + 3 * LANES, left) + total3)


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "tensors", "pair"])
def perturb_rademacher_kernel(
    table, tensors, k0, k1, site, pair, generation, sigma, ELEMENT: tl.constexpr, TILES: tl.constexpr
):
    tile, start, left, index = _tiles(table, tensors, RADEMACHER_COLUMNS, TILES, ELEMENT)
    start, left = start[:, None, None], left[:, None, None]
    bit = tl.arange(0, 32)[None, :, None]
    element = bit * (4 * LANES) + tl.arange(0, 4 * LANES)[None, None, :]
    words = rademacher_words(tile[:, None], k0, k1, site + 2 * index, pair, generation)
    _store(
        start, element, left, _load(start, element, left) + _signed(tl.full((1, 1, 1), sigma, tl.float32), words, bit)
    )


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "tensors", "pairs"])
def update_rademacher_kernel(
    table, tensors, k0, k1, site, weights, pairs, generation, ELEMENT: tl.constexpr, TILES: tl.constexpr
):
    tile, start, left, index = _tiles(table, tensors, RADEMACHER_COLUMNS, TILES, ELEMENT)
    start, left = start[:, None, None], left[:, None, None]
    bit = tl.arange(0, 32)[None, :, None]
    element = bit * (4 * LANES) + tl.arange(0, 4 * LANES)[None, None, :]
    total = tl.zeros((TILES, 32, 4 * LANES), tl.float32)
    for pair in range(pairs):
        weight = tl.load(weights + pair)
        if weight != 0.0:
            words = rademacher_words(tile[:, None], k0, k1, site + 2 * index, as_tensor(pair), generation)
            total += _signed(weight, words, bit)
    _store(start, element, left, _load(start, element, left) + total)


KERNELS = {
    "gaussian": (GAUSSIAN_TAG, GAUSSIAN_TILE, perturb_gaussian_kernel, update_gaussian_kernel),
    "rademacher": (RADEMACHER_TAG, RADEMACHER_TILE, perturb_rademacher_kernel, update_rademacher_kernel),
}
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def perturb_(
    tensors: Sequence[Tensor], seed: int, generation: int, site: int, member: int, sigma: float, distribution: str
) -> None:
    """tensor i += sigma eps, with the member's eps of site + 2 i."""
    tag, tile, kernel, _ = KERNELS[distribution]
    key = key_words(tag, seed, generation, site, member)
    if key.pop("sign"):
        sigma = -sigma
    for element, table, programs, options in _launches(tensors, f"perturb_{distribution}", tile):
        with on_device(table):
            kernel[(programs,)](
                table, table.shape[1], **key, sigma=sigma, ELEMENT=element, enable_fp_fusion=False, **options
            )


def es_update_(
    tensors: Sequence[Tensor], seed: int, generation: int, site: int, pair_weights: Tensor, distribution: str
) -> None:
    """tensor i += sum over pairs of pair_weights[pair] eps, with eps drawn from site + 2 i."""
    tag, tile, _, kernel = KERNELS[distribution]
    key = key_words(tag, seed, generation, site, 0)
    del key["sign"], key["pair"]
    of_all = {"weights": pair_weights, "pairs": pair_weights.shape[0], "enable_fp_fusion": False}
    for element, table, programs, options in _launches(tensors, f"es_update_{distribution}", tile):
        with on_device(table):
            kernel[(programs,)](table, table.shape[1], **key, **of_all, ELEMENT=element, **options)


def _launches(
    tensors: Sequence[Tensor], name: str, tile: int
) -> Iterator[tuple[tl.dtype, Tensor, int, dict[str, int]]]:
    """Per dtype: the table of its tensors, the number of programs, and the kernel's parameters."""
    parameters = config(tensors[0], name)
    tiles_each = parameters["tiles"]
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        entries = tuple(
            (tensor.data_ptr(), *tensor.shape, i)
            for i, tensor in enumerate(tensors)
            if tensor.dtype is dtype and tensor.numel()
        )
        if entries:
            table, programs = _table(entries, tile, tiles_each, tensors[0].device)
            options = {"TILES": tiles_each, "num_warps": parameters["num_warps"]}
            yield ELEMENTS[dtype], outlives_graphs(table), programs, options


# The copy to the device waits for it, and may not happen while a CUDA graph is captured; a model's parameters stay where
# they are, so that only the first call of many pays.
@functools.lru_cache(maxsize=64)
def _table(
    entries: tuple[tuple[int, int, int, int], ...], tile: int, tiles_each: int, device: torch.device
) -> tuple[Tensor, int]:
    """The table that `_tiles` reads, int64 [5, tensors], and how many programs it takes."""
    columns, end = [], 0
    for address, rows, cols, index in entries:
        tiles = rows * triton.cdiv(cols, tile)
        end += triton.cdiv(tiles, tiles_each)
        columns.append((end, address, cols, tiles, index))
    return torch.tensor(columns, dtype=torch.int64).T.contiguous().to(device), end
