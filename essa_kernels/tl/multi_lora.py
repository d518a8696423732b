"""Stored adapters in one batch in Triton, accumulated in float32.

Rows are taken in the order of their adapters, a block at a time; a program goes through the adapters that occur in its
block, which is one of them for most blocks if an adapter has many rows, and multiplies the block with each one's factor,
keeping the rows that are its own. Every sum has a fixed order, so results repeat exactly.

One kernel projects rows onto ranks - x onto a, or the gradient of y onto b - with their dimension split over programs;
one expands ranks into rows, summing the splits in order; one makes the gradients of the factors. Nothing is read back
from the device. Factors that come as a sequence stay where they are: a table on the device says where.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import config, on_device, outlives_graphs, sent_before_capture
from .storage import ELEMENTS, rounded
from .svd_lora import LEAST_RANKS, LEAST_SPLIT_BLOCKS, dot, dot_of_float32, rank_block

MOST_ALIGNMENT = 16  # bytes, that a GPU loads at once


@triton.jit
def owned_rows(order, owners, position, rows, adapters):
    """The rows at positions in the order and the adapter of each: ``adapters`` if it has none."""
    row = tl.load(order + position, mask=position < rows, other=0)
    owner = tl.load(owners + position, mask=position < rows, other=-1)
    return row, tl.where((owner >= 0) & (owner < adapters), owner, adapters).to(tl.int32)


@triton.jit
def least_above(owner, k, adapters):
    """The least adapter of the rows after k, or the number of adapters."""
    return tl.min(tl.where(owner > k, owner, adapters), axis=0)


@triton.jit
def ranks_of(starts, k, MULTIPLE: tl.constexpr):
    """Where an adapter's ranks begin among all, and how many it has."""
    start = tl.load(starts + k)
    ranks = tl.load(starts + k + 1) - start
    return tl.multiple_of(start, MULTIPLE), tl.multiple_of(ranks, MULTIPLE)


@triton.jit
def base_of(factors, k, ELEMENT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """What adapter k's ranks are counted from: the tensor that holds them all, or what a table says."""
    if factors.dtype.element_ty == tl.int64:
        return tl.multiple_of(tl.load(factors + k).to(tl.pointer_type(ELEMENT)), ALIGNMENT)
    else:
        return factors


@triton.jit
def places_of(base, start, ranks, rank, column, d, WIDE: tl.constexpr):
    """Where a block of an adapter's factor lies: WIDE: as [ranks, d], else as [d, ranks]. rank and column broadcast."""
    if WIDE:
        return base + (start + rank) * d + column
    else:
        return base + start * d + column.to(tl.int64) * ranks + rank


@triton.jit(do_not_specialize=["rows", "adapters"])
def project_rows_kernel(
    partial,
    x,
    factors,
    starts,
    order,
    owners,
    rows,
    adapters,
    d,
    split,
    x_stride,
    most_ranks,
    MULTIPLE: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    RANKS: tl.constexpr,
):
    """partial[i] = the rows' columns i * split .. times their adapters' factors. Grid: row blocks, splits, rank blocks."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    row, owner = owned_rows(order, owners, position, rows, adapters)
    x_rows = x + row[:, None] * x_stride
    begin = tl.program_id(1) * split
    end = tl.minimum(begin + split, d)
    result = tl.zeros((ROWS, RANKS), tl.float32)
    k = least_above(owner, -1, adapters)
    while k < adapters:
        start, ranks = ranks_of(starts, k, MULTIPLE)
        base = base_of(factors, k, ELEMENT, ALIGNMENT)
        mine = (owner == k)[:, None]
        sums = tl.zeros((ROWS, RANKS), tl.float32)
        for first in range(begin, end, INNER):
            column = first + tl.arange(0, INNER)
            x_block = tl.load(x_rows + column[None, :], mask=mine & (column < d)[None, :], other=0.0)
            place = places_of(base, start, ranks, rank[None, :], column[:, None], d, WIDE)
            block = tl.load(place, mask=(column < d)[:, None] & (rank < ranks)[None, :], other=0.0)
            sums = dot(x_block.to(block.dtype), block, sums)
        result = tl.where(mine, sums, result)
        k = least_above(owner, k, adapters)
    place = partial + (tl.program_id(1) * rows.to(tl.int64) + position)[:, None] * most_ranks + rank[None, :]
    tl.store(place, result, mask=(position < rows)[:, None] & (rank < most_ranks)[None, :])


@triton.jit
def scaled_ranks(partial, scale, position, inside, rank, rows, splits, most_ranks):
    """Partial sums [splits, rows, most_ranks] at some positions and ranks, summed and times every row's scale."""
    place = partial + position.to(tl.int64)[:, None] * most_ranks + rank[None, :]
    mask = inside[:, None] & (rank < most_ranks)[None, :]
    sums = tl.zeros((position.shape[0], rank.shape[0]), tl.float32)
    for _ in range(splits):
        sums += tl.load(place, mask=mask, other=0.0)
        place += rows.to(tl.int64) * most_ranks
    return sums * scale


@triton.jit(do_not_specialize=["rows", "adapters", "splits"])
def expand_rows_kernel(
    y,
    partial,
    factors,
    starts,
    scalings,
    order,
    owners,
    rows,
    adapters,
    splits,
    d,
    y_stride,
    most_ranks,
    MULTIPLE: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """y += scaling partial factor^T, with every row's own factor. Grid: row blocks, column blocks."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row, owner = owned_rows(order, owners, position, rows, adapters)
    scale = tl.load(scalings + owner, mask=owner < adapters, other=0.0)[:, None]
    delta = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, BLOCKS * RANKS, RANKS):
        rank = first + tl.arange(0, RANKS)
        h = scaled_ranks(partial, scale, position, position < rows, rank, rows, splits, most_ranks)
        k = least_above(owner, -1, adapters)
        while k < adapters:
            start, ranks = ranks_of(starts, k, MULTIPLE)
            base = base_of(factors, k, ELEMENT, ALIGNMENT)
            place = places_of(base, start, ranks, rank[:, None], column[None, :], d, WIDE)
            block = tl.load(place, mask=(rank < ranks)[:, None] & (column < d)[None, :], other=0.0)
            delta = tl.where((owner == k)[:, None], dot_of_float32(h, block, delta), delta)
            k = least_above(owner, k, adapters)
    place = y + row[:, None] * y_stride + column[None, :]
    inside = (owner < adapters)[:, None] & (column < d)[None, :]
    result = tl.load(place, mask=inside, other=0.0).to(tl.float32) + delta
    tl.store(place, rounded(result, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def gradient_kernel(
    gradient,
    x,
    partial,
    starts,
    scalings,
    order,
    bounds,
    rows,
    splits,
    d,
    x_stride,
    most_ranks,
    MULTIPLE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """The factors' gradient: scaling x^T partial over every adapter's rows. Grid: column blocks, adapters, rank blocks."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(1)
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    start, ranks = ranks_of(starts, k, MULTIPLE)
    scale = tl.load(scalings + k)
    end = tl.load(bounds + k + 1)
    sums = tl.zeros((RANKS, COLUMNS), tl.float32)
    for first in range(tl.load(bounds + k), end, ROWS):
        position = first + tl.arange(0, ROWS)
        inside = position < end
        row = tl.load(order + position, mask=inside, other=0)
        h = scaled_ranks(partial, scale, position, inside, rank, rows, splits, most_ranks)
        x_mask = inside[:, None] & (column < d)[None, :]
        block = tl.load(x + row[:, None] * x_stride + column[None, :], mask=x_mask, other=0.0)
        sums = dot_of_float32(tl.trans(h), block, sums, gradient.dtype.element_ty == tl.float32)
    place = places_of(gradient, start, ranks, rank[:, None], column[None, :], d, WIDE)
    tl.store(place, rounded(sums, gradient.dtype.element_ty), mask=(rank < ranks)[:, None] & (column < d)[None, :])


class Batch(NamedTuple):
    """Rows in the order of their adapters, and where these lie."""

    order: Tensor  # [rows]: numbers of rows
    owners: Tensor  # [rows]: their adapters, ascending
    starts: Tensor  # [adapters + 1]: where an adapter's ranks begin among all
    most_ranks: int
    multiple: int  # of which all ranks are
    scalings: Tensor  # [adapters]

    @property
    def adapters(self) -> int:
        return self.starts.shape[0] - 1


def _batch(x: Tensor, a: Sequence[Tensor], ids: Tensor, scalings: Tensor | None, scaling: float) -> Batch:
    each = ids[:, None].expand(-1, x.shape[0] // ids.shape[0])  # repeat_interleave would wait for the device
    owners, order = each.reshape(-1).sort(stable=True)
    ranks = (a[0].shape[1],) * a[0].shape[0] if a[0].dim() == 3 else tuple(tensor.shape[0] for tensor in a)
    starts, multiple = _starts(ranks, x.device), math.gcd(LEAST_RANKS.value, *ranks)
    if scalings is None:
        scalings = x.new_full((len(ranks),), scaling, dtype=torch.float32)
    elif scaling != 1:
        scalings = scalings * scaling
    return Batch(order, owners, outlives_graphs(starts), max(ranks), multiple, scalings)


@functools.lru_cache(maxsize=1024)
def _starts(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, so that a graph that is captured after a first call finds it on the device."""
    return sent_before_capture(torch.tensor([0, *ranks]).cumsum(0), device)


class Factors(NamedTuple):
    """All adapters' a, or b."""

    place: Tensor  # the tensor that holds them all, or a table of what their ranks are counted from, int64 [adapters]
    like: Tensor  # of their dtype and device
    alignment: int  # of the addresses, in bytes


def _factors(tensors: Sequence[Tensor]) -> Factors:
    if len(tensors) == 1:
        return Factors(tensors[0], tensors[0], 1)
    addresses, sizes = tuple(tensor.data_ptr() for tensor in tensors), tuple(tensor.nbytes for tensor in tensors)
    table, alignment = _table(addresses, sizes, tensors[0].device)
    return Factors(outlives_graphs(table), tensors[0], alignment)


# A kernel that adds the ranks before its adapter's in every case keeps fewer addresses in registers.
@functools.lru_cache(maxsize=2**16)
def _table(addresses: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Addresses less the bytes of the adapters before, and their alignment. Kept: a model's adapters, two lists a layer,
    stay where they are."""
    before = itertools.accumulate(sizes, initial=0)
    bases = [address - size for address, size in zip(addresses, before, strict=False)]
    return sent_before_capture(torch.tensor(bases), device), math.gcd(MOST_ALIGNMENT, *bases)


def multi_lora_(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    scalings: Tensor | None,
    scaling: float,
) -> None:
    """y += scaling B (A x) with the adapter of every row; each id is that of rows / ids consecutive rows."""
    batch = _batch(x, a, ids, scalings, scaling)
    _expand(y, _project(x, _factors(a), batch, wide=True), _factors(b), batch, wide=False)


def multi_lora_backward(
    d_x: Tensor | None,
    d_a: Sequence[Tensor] | None,
    d_b: Sequence[Tensor] | None,
    d_y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    scalings: Tensor | None,
    scaling: float,
) -> None:
    """The gradients that are not None, from d_y; d_x is added to."""
    batch = _batch(x, a, ids, scalings, scaling)
    of_a = _factors(a)
    if d_b is not None:
        _gradient(d_b, d_y, _project(x, of_a, batch, wide=True), batch, wide=False)
    if d_x is None and d_a is None:
        return
    g = _project(d_y, _factors(b), batch, wide=False)
    if d_x is not None:
        _expand(d_x, g, of_a, batch, wide=True)
    if d_a is not None:
        _gradient(d_a, x, g, batch, wide=True)


def _project(x: Tensor, factors: Factors, batch: Batch, *, wide: bool) -> Tensor:
    """The rows times their adapters' factors, in the order: float32 [splits, rows, most_ranks], to be summed over splits."""
    rows, d = x.shape
    shape = config(x, "project")
    ranks = rank_block(factors.like, "project", batch.most_ranks)
    inner = shape["block_inner_bytes"] // factors.like.element_size()
    blocks = triton.cdiv(rows, shape["block_rows"]), triton.cdiv(batch.most_ranks, ranks), triton.cdiv(d, inner)
    splits = min(shape["programs"] // (blocks[0] * blocks[1]), blocks[2] // LEAST_SPLIT_BLOCKS)
    split = triton.cdiv(blocks[2], max(splits, 1)) * inner
    partial = x.new_empty(triton.cdiv(d, split), rows, batch.most_ranks, dtype=torch.float32)
    with on_device(x):
        project_rows_kernel[(blocks[0], partial.shape[0], blocks[1])](
            partial,
            x,
            factors.place,
            batch.starts,
            batch.order,
            batch.owners,
            rows,
            batch.adapters,
            d,
            split,
            x.stride(0),
            batch.most_ranks,
            MULTIPLE=batch.multiple,
            ELEMENT=ELEMENTS[factors.like.dtype],
            ALIGNMENT=math.gcd(factors.alignment, batch.multiple * factors.like.element_size()),
            WIDE=wide,
            ROWS=shape["block_rows"],
            INNER=inner,
            RANKS=ranks,
            num_warps=shape["num_warps"],
            num_stages=shape["num_stages"],
            enable_fp_fusion=True,
        )
    return partial


def _expand(y: Tensor, partial: Tensor, factors: Factors, batch: Batch, *, wide: bool) -> None:
    """y += scaling partial factor^T, row by row with its own adapter's."""
    rows, d = y.shape
    shape = config(y, "expand")
    columns = shape["block_columns_bytes"] // factors.like.element_size()
    ranks = rank_block(factors.like, "expand", batch.most_ranks)
    with on_device(y):
        expand_rows_kernel[(triton.cdiv(rows, shape["block_rows"]), triton.cdiv(d, columns))](
            y,
            partial,
            factors.place,
            batch.starts,
            batch.scalings,
            batch.order,
            batch.owners,
            rows,
            batch.adapters,
            partial.shape[0],
            d,
            y.stride(0),
            batch.most_ranks,
            MULTIPLE=batch.multiple,
            ELEMENT=ELEMENTS[factors.like.dtype],
            ALIGNMENT=math.gcd(factors.alignment, batch.multiple * factors.like.element_size()),
            WIDE=wide,
            ROWS=shape["block_rows"],
            COLUMNS=columns,
            BLOCKS=triton.cdiv(batch.most_ranks, ranks),
            RANKS=ranks,
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
        )


def _gradient(gradients: Sequence[Tensor], x: Tensor, partial: Tensor, batch: Batch, *, wide: bool) -> None:
    """The gradients of all adapters' factors, scaling x^T partial over the rows of each."""
    rows, d = x.shape
    shape = config(x, "expand")
    columns = shape["block_columns_bytes"] // x.element_size()
    ranks = rank_block(x, "expand", batch.most_ranks)
    joined = gradients[0] if len(gradients) == 1 else gradients[0].new_empty(sum(g.numel() for g in gradients))
    numbers = torch.arange(batch.adapters + 1, device=x.device)
    bounds = torch.searchsorted(batch.owners, numbers)
    with on_device(x):
        gradient_kernel[(triton.cdiv(d, columns), batch.adapters, triton.cdiv(batch.most_ranks, ranks))](
            joined,
            x,
            partial,
            batch.starts,
            batch.scalings,
            batch.order,
            bounds,
            rows,
            partial.shape[0],
            d,
            x.stride(0),
            batch.most_ranks,
            MULTIPLE=batch.multiple,
            WIDE=wide,
            ROWS=shape["block_rows"],
            COLUMNS=columns,
            RANKS=ranks,
            num_warps=shape["num_warps"],
            enable_fp_fusion=True,
        )
    if len(gradients) > 1:
        own = joined.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(list(gradients), [g.view_as(d) for g, d in zip(own, gradients, strict=True)])
