"""The noise contract in torch, bit for bit. `essa_kernels.noise` says in prose what is computed here.

32-bit words live in int64 tensors. A float32 fma is emulated exactly: the product of two float32 is exact in float64,
TwoSum gives the rounding error of the sum, and rounding that sum to odd makes the last rounding, to float32, the only
one that counts (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
to odd", IEEE Transactions on Computers 57(4), 2008).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..noise import BLOCKS_PER_TILE, GAUSSIAN_TILE, RADEMACHER_TILE

MASK32 = 0xFFFFFFFF
GAUSSIAN_TAG, RADEMACHER_TAG = 0, 1
TILES_AT_ONCE = 4096  # keeps the temporaries within the cache and their memory bounded

SQRT_HALF_BITS = 0x3F3504F3
MINUS_2_LN_2 = float.fromhex("-0x1.62e430p+0")
# ln(1+f) = f - f^2/2 + f^3 P(f), stored as -2 P; sin(pi/2 t) = t S(t^2); cos(pi/2 t) = 1 + t^2 C(t^2).
LN = [
    *map(float.fromhex, ("-0x1.5556d8p-1", "0x1.000382p-1", "-0x1.98d7f2p-2", "0x1.53824ap-2")),
    *map(float.fromhex, ("-0x1.317456p-2", "0x1.2432b8p-2", "-0x1.645eaep-3")),
]
SIN = [*map(float.fromhex, ("0x1.921fb6p+0", "-0x1.4abbbap-1", "0x1.465e92p-4", "-0x1.2d9302p-8"))]
COS = [*map(float.fromhex, ("-0x1.3bd3ccp+0", "0x1.03c1dep-2", "-0x1.55c5e0p-6", "0x1.d9d57ep-11"))]


def philox(block: Tensor, word1: int, word2: int, word3: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the counters (block, word1, word2, word3): four words, int64 holding 0 .. 2**32 - 1."""
    c0, c1, c2, c3 = block, *(torch.full_like(block, word) for word in (word1, word2, word3))
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2**64, which keeps both halves
        c0, c1, c2, c3 = (p1 >> 32 & MASK32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32 & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a * b + c`` of float32 operands, rounded once."""
    product = a.double() * (b.double() if isinstance(b, Tensor) else b)
    c = c.double() if isinstance(c, Tensor) else c
    total = product + c
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)
    bits = total.view(torch.int64)
    to_odd = (error != 0) & total.isfinite() & (bits & 1 == 0)
    away_from_zero = (error > 0) == (total > 0)
    step = torch.where(away_from_zero, 1, -1) * to_odd
    return (bits + step).view(torch.float64).float()


def polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """Horner's scheme, lowest coefficient first, one float32 fma a step."""
    value: Tensor = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = fma(value, x, coefficient)
    return value


def box_muller(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Two words (int64 holding 0 .. 2**32 - 1) to two float32 normals, the first belonging to x0's element."""
    u = fma((x0 >> 1).float(), 2.0**-31, 2.0**-32)  # in [2**-32, 1]
    shifted = u.view(torch.int32) - SQRT_HALF_BITS
    exponent = (shifted >> 23).float()
    f = ((shifted & 0x007FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0
    minus_2_ln = fma(f * f, fma(f, polynomial(f, LN), 1.0), f * -2.0)
    # torch's float32 sqrt is not correctly rounded everywhere. Through float64 it is, even if that is an ulp off: the
    # root of a float32 stays 2**-50 away from every point where the rounding to float32 changes.
    radius = torch.sqrt(fma(exponent, MINUS_2_LN_2, minus_2_ln).double()).float()

    signed = x1 - ((x1 >> 31) << 32)
    t = (signed >> 2 | 1).float() * 2.0**-30  # quarter turns, |t| < 1/2
    tt = t * t
    sin = polynomial(tt, SIN) * t
    cos = fma(polynomial(tt, COS), tt, 1.0)
    radius = torch.where(x1 & 1 == 1, -radius, radius)
    swap = x1 & 2 == 2
    return radius * torch.where(swap, sin, cos), radius * torch.where(swap, cos, sin)


def gaussian(out: Tensor, seed: int, generation: int, site: int, member: int) -> None:
    """Fill ``out`` (float32 [rows, cols]) with the member's standard normals."""

    def tiles(blocks: Tensor) -> Tensor:
        w0, w1, w2, w3 = philox(blocks, site | GAUSSIAN_TAG << 30, member >> 1, generation, seed)
        normals = (*box_muller(w0, w1), *box_muller(w2, w3))
        return torch.stack(normals, dim=-2)  # [rows, tiles, word, block]

    _fill(out, GAUSSIAN_TILE, tiles, member)


def rademacher(out: Tensor, seed: int, generation: int, site: int, member: int) -> None:
    """Fill ``out`` (float32 [rows, cols]) with the member's signs, +1 or -1."""
    shifts = torch.arange(31, -1, -1, device=out.device)[:, None, None]

    def tiles(blocks: Tensor) -> Tensor:
        words = philox(blocks, site | RADEMACHER_TAG << 30, member >> 1, generation, seed)
        stacked = torch.stack(words, dim=-2)  # [rows, tiles, word, block]
        bits = stacked.unsqueeze(-3) >> shifts & 1  # [rows, tiles, bit, word, block]
        return 1.0 - 2.0 * bits

    _fill(out, RADEMACHER_TILE, tiles, member)


def _fill(out: Tensor, tile: int, tiles: Callable[[Tensor], Tensor], member: int) -> None:
    """Write ``tiles(block indices [rows, tiles, 16])`` to the rows of ``out``, a bounded piece at a time."""
    rows, cols = out.shape
    tiles_per_row = -(-cols // tile)
    at_once = TILES_AT_ONCE * GAUSSIAN_TILE // tile
    wide = max(1, min(tiles_per_row, at_once))
    tall = max(1, at_once // wide)
    sign = -1.0 if member & 1 else 1.0
    for row in range(0, rows, tall):
        for first in range(0, tiles_per_row, wide):
            part = out[row : row + tall, first * tile : (first + wide) * tile]
            row_tiles = torch.arange(row, row + part.shape[0], device=out.device)[:, None, None] * tiles_per_row
            tile_index = torch.arange(first, min(first + wide, tiles_per_row), device=out.device)[:, None]
            block = torch.arange(BLOCKS_PER_TILE, device=out.device)
            values = tiles((row_tiles + tile_index) * BLOCKS_PER_TILE + block)
            part.copy_(values.flatten(1)[:, : part.shape[1]] * sign)
