"""Attention of one token a row in Triton.

A program serves one key-value head of a row and the query heads that share it, padded to what a matrix unit takes, so
that keys and values are read once; of many heads, once for every block of them. It walks the positions with an online
softmax; the sum over them has a fixed order, so results repeat exactly. Rows are not split over programs: a population
has enough of them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .config import config, on_device
from .storage import rounded
from .svd_lora import LEAST_RANKS, dot, dot_of_float32

UNSEEN = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["length"])
def decode_attention_kernel(
    out,
    query,
    key,
    value,
    mask,
    query_row,
    query_head,
    key_row,
    key_head,
    key_position,
    value_row,
    value_head,
    value_position,
    mask_row,
    scale,
    length,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMNS_V: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """HEADS query heads share a key-value head; scale: of scores as powers of 2. Grid: rows, key-value heads, head blocks."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    head = tl.program_id(2) * GROUP + tl.arange(0, GROUP)
    column = tl.arange(0, COLUMNS)
    column_v = tl.arange(0, COLUMNS_V)
    first_head = kv_head * HEADS
    place = query + row * query_row + (first_head + head)[:, None].to(tl.int64) * query_head + column[None, :]
    queries = tl.load(place, mask=(head < HEADS)[:, None] & (column < D)[None, :], other=0.0)
    key += row * key_row + kv_head.to(tl.int64) * key_head
    value += row * value_row + kv_head.to(tl.int64) * value_head
    greatest = tl.full((GROUP,), UNSEEN, tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    sums = tl.zeros((GROUP, COLUMNS_V), tl.float32)
    for first in range(0, length, POSITIONS):
        position = first + tl.arange(0, POSITIONS)
        inside = position < length
        lines = position.to(tl.int64)
        key_place = key + lines[None, :] * key_position + column[:, None]
        keys = tl.load(key_place, mask=inside[None, :] & (column < D)[:, None], other=0.0)
        seen = inside
        if MASKED:
            seen = seen & (tl.load(mask + row * mask_row + position, mask=inside, other=0) != 0)
        scores = dot(queries, keys, tl.zeros((GROUP, POSITIONS), tl.float32)) * scale
        scores = tl.where(seen[None, :], scores, UNSEEN)
        now = tl.maximum(greatest, tl.max(scores, axis=1))
        weights = tl.where(seen[None, :], tl.exp2(scores - now[:, None]), 0.0)
        shrink = tl.where(now > greatest, tl.exp2(greatest - now), 1.0)
        total = total * shrink + tl.sum(weights, axis=1)
        value_place = value + lines[:, None] * value_position + column_v[None, :]
        values = tl.load(value_place, mask=inside[:, None] & (column_v < D_V)[None, :], other=0.0)
        sums = dot_of_float32(weights, values, sums * shrink[:, None])
        greatest = now
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    heads = tl.num_programs(1) * HEADS
    place = out + (row * heads + first_head + head[:, None]) * D_V + column_v[None, :]
    inside = (head < HEADS)[:, None] & (column_v < D_V)[None, :]
    tl.store(place, rounded(result, out.dtype.element_ty), mask=inside)


def decode_attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
    """out = softmax(scale q k^T) v over the positions that are seen."""
    (rows, heads, d), (_, kv_heads, length, d_v) = query.shape, value.shape
    shape = config(query, "decode_attention")
    columns, columns_v = (max(triton.next_power_of_2(size), LEAST_RANKS.value) for size in (d, d_v))
    most_heads = shape["block_heads_bytes"] // query.element_size()
    group = max(min(triton.next_power_of_2(heads // kv_heads), most_heads), LEAST_RANKS.value)
    positions = shape["block_bytes"] // (max(columns, columns_v) * query.element_size())
    with on_device(query):
        decode_attention_kernel[(rows, kv_heads, triton.cdiv(heads // kv_heads, group))](
            out,
            query,
            key,
            value,
            mask,
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            0 if mask is None else mask.stride(0),
            scale * math.log2(math.e),
            length,
            HEADS=heads // kv_heads,
            D=d,
            D_V=d_v,
            MASKED=mask is not None,
            GROUP=group,
            COLUMNS=columns,
            COLUMNS_V=columns_v,
            POSITIONS=min(max(positions, LEAST_RANKS.value), shape["max_positions"]),
            num_warps=shape["num_warps"],
            num_stages=shape["num_stages"],
            enable_fp_fusion=True,
        )
