"""Full-rank noise on parameters in Triton: a member's perturbation, and the update of all members.

The tensors of one dtype are one launch: a table on the device says where each one lies, and a program takes some noise
tiles of one tensor. A tensor alone needs no table. An update keeps the sums of its tiles in registers while it draws one
pair after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..noise import GAUSSIAN_TILE, RADEMACHER_TILE
from .config import config, on_device, outlives_graphs, sent_before_capture
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
from .storage import ELEMENTS, rounded

SEARCH_WIDTH = tl.constexpr(256)
PLACE_ARGUMENTS = ["tensors", "cols", "tiles"]
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
def _in_table(table, tensors, program):
    """Of the tensor that a program belongs to: where it begins, its columns and tiles, its position in the list, and its
    first program. The table's rows are `end`, `address`, `cols`, `tiles` and `index`."""
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
    return address, cols, tiles, index.to(tl.int32), begin


@triton.jit
def _tiles(where, tensors, cols, tiles, TILE: tl.constexpr, TILES: tl.constexpr, ELEMENT: tl.constexpr):
    """A program's share of a tensor, or of the tensors in a table: what `where` points to says which.

    Returns the tiles' indices in their noise matrix, where each one starts, how many of its elements exist, and the
    tensor's position in the list.
    """
    program = tl.program_id(0)
    if where.dtype.element_ty == tl.int64:
        address, cols, tiles, index, begin = _in_table(where, tensors, program)
        tensor = address.to(tl.pointer_type(ELEMENT))
        program -= begin
    else:
        tensor, index = where, 0
        cols, tiles = cols.to(tl.int64), tiles.to(tl.int64)
    tile = (program * TILES + tl.arange(0, TILES)).to(tl.int32)
    tiles_per_row = ((cols + TILE - 1) // TILE).to(tl.int32)
    row = tile // tiles_per_row
    column = (tile - row * tiles_per_row).to(tl.int64) * TILE
    left = tl.where(tile < tiles, tl.minimum(cols - column, TILE), 0).to(tl.int32)
    return tile, tensor + (row.to(tl.int64) * cols + column), left, index


@triton.jit(do_not_specialize=[*PLACE_ARGUMENTS, *KEY_ARGUMENTS, "pair"])
def perturb_gaussian_kernel(
    where, tensors, cols, tiles, k0, k1, site, pair, generation, sigma, ELEMENT: tl.constexpr, TILES: tl.constexpr
):
    tile, start, left, index = _tiles(where, tensors, cols, tiles, GAUSSIAN_COLUMNS, TILES, ELEMENT)
    start, left = start[:, None], left[:, None]
    lane = tl.arange(0, LANES)[None, :]
    block = (tile[:, None] * LANES + lane).to(tl.uint32)
    z0, z1, z2, z3 = gaussian_blocks(block, k0, k1, site + 2 * index, pair, generation, 0)
    _store(start, lane, left, tl.fma(sigma, z0, _load(start, lane, left)))
    _store(start, lane + LANES, left, tl.fma(sigma, z1, _load(start, lane + LANES, left)))
    _store(start, lane + 2 * LANES, left, tl.fma(sigma, z2, _load(start, lane + 2 * LANES, left)))
    _store(start, lane + 3 * LANES, left, tl.fma(sigma, z3, _load(start, lane + 3 * LANES, left)))


@triton.jit(do_not_specialize=[*PLACE_ARGUMENTS, *KEY_ARGUMENTS, "pairs"])
def update_gaussian_kernel(
    where, tensors, cols, tiles, k0, k1, site, weights, pairs, generation, ELEMENT: tl.constexpr, TILES: tl.constexpr
):
    tile, start, left, index = _tiles(where, tensors, cols, tiles, GAUSSIAN_COLUMNS, TILES, ELEMENT)
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


@triton.jit(do_not_specialize=[*PLACE_ARGUMENTS, *KEY_ARGUMENTS, "pair"])
def perturb_rademacher_kernel(
    where, tensors, cols, tiles, k0, k1, site, pair, generation, sigma, ELEMENT: tl.constexpr, TILES: tl.constexpr
):
    tile, start, left, index = _tiles(where, tensors, cols, tiles, RADEMACHER_COLUMNS, TILES, ELEMENT)
    start, left = start[:, None, None], left[:, None, None]
    bit = tl.arange(0, 32)[None, :, None]
    element = bit * (4 * LANES) + tl.arange(0, 4 * LANES)[None, None, :]
    words = rademacher_words(tile[:, None], k0, k1, site + 2 * index, pair, generation)
    _store(
        start, element, left, _load(start, element, left) + _signed(tl.full((1, 1, 1), sigma, tl.float32), words, bit)
    )


@triton.jit(do_not_specialize=[*PLACE_ARGUMENTS, *KEY_ARGUMENTS, "pairs"])
def update_rademacher_kernel(
    where, tensors, cols, tiles, k0, k1, site, weights, pairs, generation, ELEMENT: tl.constexpr, TILES: tl.constexpr
):
    tile, start, left, index = _tiles(where, tensors, cols, tiles, RADEMACHER_COLUMNS, TILES, ELEMENT)
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


def perturb_(
    tensors: Sequence[Tensor], seed: int, generation: int, site: int, member: int, sigma: float, distribution: str
) -> None:
    """tensor i += sigma eps, with the member's eps of site + 2 i."""
    tag, tile, kernel, _ = KERNELS[distribution]
    for programs, index, arguments in _launches(tensors, f"perturb_{distribution}", tile):
        key = key_words(tag, seed, generation, site + 2 * index, member)
        signed_sigma = -sigma if key.pop("sign") else sigma
        with on_device(tensors[0]):
            kernel[(programs,)](**arguments, **key, sigma=signed_sigma, enable_fp_fusion=False)


def es_update_(
    tensors: Sequence[Tensor], seed: int, generation: int, site: int, pair_weights: Tensor, distribution: str
) -> None:
    """tensor i += sum over pairs of pair_weights[pair] eps, with eps drawn from site + 2 i."""
    tag, tile, _, kernel = KERNELS[distribution]
    of_all = {"weights": pair_weights, "pairs": pair_weights.shape[0], "enable_fp_fusion": False}
    for programs, index, arguments in _launches(tensors, f"es_update_{distribution}", tile):
        key = key_words(tag, seed, generation, site + 2 * index, 0)
        del key["sign"], key["pair"]
        with on_device(tensors[0]):
            kernel[(programs,)](**arguments, **key, **of_all)


def _launches(tensors: Sequence[Tensor], name: str, tile: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Per dtype: the number of programs, the position that they count from, and the kernel's arguments but for the key."""
    parameters = config(tensors[0], name)
    tiles_each = parameters["tiles"]
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        own = [(i, tensor) for i, tensor in enumerate(tensors) if tensor.dtype is dtype and tensor.numel()]
        if not own:
            continue
        if len(own) == 1:
            index, tensor = own[0]
            tiles = _tiles_of(tensor.shape[0], tensor.shape[1], tile)
            programs = triton.cdiv(tiles, tiles_each)
            place = {"where": tensor, "tensors": 1, "cols": tensor.shape[1], "tiles": tiles}
        else:
            entries = tuple((tensor.data_ptr(), *tensor.shape, i) for i, tensor in own)
            table, programs = _table(entries, tile, tiles_each, tensors[0].device)
            index, place = 0, {"where": outlives_graphs(table), "tensors": len(own), "cols": 0, "tiles": 0}
        options = {"ELEMENT": ELEMENTS[dtype], "TILES": tiles_each, "num_warps": parameters["num_warps"]}
        yield programs, index, place | options


def _tiles_of(rows: int, cols: int, tile: int) -> int:
    return rows * triton.cdiv(cols, tile)


@functools.lru_cache(maxsize=4096)
def _table(
    entries: tuple[tuple[int, int, int, int], ...], tile: int, tiles_each: int, device: torch.device
) -> tuple[Tensor, int]:
    """The table that `_in_table` reads, int64 [5, tensors], and how many programs it takes. Kept: a model's parameters stay
    where they are."""
    columns, end = [], 0
    for address, rows, cols, index in entries:
        tiles = _tiles_of(rows, cols, tile)
        end += triton.cdiv(tiles, tiles_each)
        columns.append((end, address, cols, tiles, index))
    return sent_before_capture(torch.tensor(columns, dtype=torch.int64).T.contiguous(), device), end
