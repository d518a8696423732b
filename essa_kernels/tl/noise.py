"""The noise contract in Triton, bit for bit: fills, and the device functions from which other kernels draw noise.

Only integer operations and correctly rounded fp32 fma, mul, sub, sqrt and int-to-float conversion appear, and no
product feeds a bare add, so no compiler can change a bit. `csrc/noise/noise.h` is the same in C++.

Seed, site, pair and generation travel as signed 32-bit integers, whatever their value, so that none compiles anew.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..noise import BLOCKS_PER_TILE, GAUSSIAN_TILE, RADEMACHER_TILE
from .config import config, on_device

GAUSSIAN_TAG, RADEMACHER_TAG = 0, 1
SIGN_BIT = 1 << 31

LANES = tl.constexpr(BLOCKS_PER_TILE)
GAUSSIAN_COLUMNS = tl.constexpr(GAUSSIAN_TILE)
RADEMACHER_COLUMNS = tl.constexpr(RADEMACHER_TILE)

SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
MINUS_2_LN_2 = tl.constexpr(float.fromhex("-0x1.62e430p+0"))
# ln(1+f) = f - f^2/2 + f^3 P(f), stored as -2 P; sin(pi/2 t) = t S(t^2); cos(pi/2 t) = 1 + t^2 C(t^2).
LN0 = tl.constexpr(float.fromhex("-0x1.5556d8p-1"))
LN1 = tl.constexpr(float.fromhex("0x1.000382p-1"))
LN2 = tl.constexpr(float.fromhex("-0x1.98d7f2p-2"))
LN3 = tl.constexpr(float.fromhex("0x1.53824ap-2"))
LN4 = tl.constexpr(float.fromhex("-0x1.317456p-2"))
LN5 = tl.constexpr(float.fromhex("0x1.2432b8p-2"))
LN6 = tl.constexpr(float.fromhex("-0x1.645eaep-3"))
SIN0 = tl.constexpr(float.fromhex("0x1.921fb6p+0"))
SIN1 = tl.constexpr(float.fromhex("-0x1.4abbbap-1"))
SIN2 = tl.constexpr(float.fromhex("0x1.465e92p-4"))
SIN3 = tl.constexpr(float.fromhex("-0x1.2d9302p-8"))
COS0 = tl.constexpr(float.fromhex("-0x1.3bd3ccp+0"))
COS1 = tl.constexpr(float.fromhex("0x1.03c1dep-2"))
COS2 = tl.constexpr(float.fromhex("-0x1.55c5e0p-6"))
COS3 = tl.constexpr(float.fromhex("0x1.d9d57ep-11"))

KEY_ARGUMENTS = ["k0", "k1", "site", "pair", "generation", "sign"]


def key_words(tag: int, seed: int, generation: int, site: int, member: int) -> dict[str, int]:
    """A key as a kernel takes it. ``sign`` flips the noise of the pair's odd member."""
    words = {
        "k0": seed & 0xFFFFFFFF,
        "k1": seed >> 32,
        "site": site | tag << 30,
        "pair": member >> 1,
        "generation": generation,
        "sign": (member & 1) << 31,
    }
    return {name: word - 2**32 if word >= SIGN_BIT else word for name, word in words.items()}


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: the four words of every counter. ``c0`` is a uint32 tensor, the rest int32 scalars."""
    c1 = c1.to(tl.uint32, bitcast=True)
    c2 = c2.to(tl.uint32, bitcast=True)
    c3 = c3.to(tl.uint32, bitcast=True)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53  # one wide multiplication, where umulhi and * would be two
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(x0, x1):
    """Two uint32 words to two normals, the first belonging to x0's element."""
    u = tl.fma((x0 >> 1).to(tl.int32, bitcast=True).to(tl.float32), 2.0**-31, 2.0**-32)  # in [2^-32, 1]
    shifted = u.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    exponent = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, LN6, LN5)
    p = tl.fma(p, f, LN4)
    p = tl.fma(p, f, LN3)
    p = tl.fma(p, f, LN2)
    p = tl.fma(p, f, LN1)
    p = tl.fma(p, f, LN0)
    minus2_ln = tl.fma(f * f, tl.fma(f, p, 1.0), f * -2.0)
    radius = tl.sqrt_rn(tl.fma(exponent, MINUS_2_LN_2, minus2_ln))

    # An odd 30-bit integer in units of 2^-30 quarter turns, so |t| < 1/2; the two low bits of x1 pick the octants.
    t = ((x1.to(tl.int32, bitcast=True) >> 2) | 1).to(tl.float32) * 2.0**-30
    tt = t * t
    sin = tl.fma(tt, SIN3, SIN2)
    sin = tl.fma(sin, tt, SIN1)
    sin = tl.fma(sin, tt, SIN0) * t
    cos = tl.fma(tt, COS3, COS2)
    cos = tl.fma(cos, tt, COS1)
    cos = tl.fma(cos, tt, COS0)
    cos = tl.fma(cos, tt, 1.0)
    signed = (radius.to(tl.uint32, bitcast=True) ^ (x1 << 31)).to(tl.float32, bitcast=True)
    swap = (x1 & 2) != 0
    return signed * tl.where(swap, sin, cos), signed * tl.where(swap, cos, sin)


@triton.jit
def as_tensor(number):
    """The number of a loop's step as a 32-bit tensor, which in Triton's interpreter it is not."""
    return tl.zeros((), tl.int32) + number


@triton.jit
def gaussian_blocks(block, k0, k1, site, pair, generation, sign):
    """Four normals per block (uint32), those of words 0 to 3, with the member's sign."""
    w0, w1, w2, w3 = philox(block, site, pair, generation, k0, k1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return with_sign(z0, sign), with_sign(z1, sign), with_sign(z2, sign), with_sign(z3, sign)


@triton.jit
def with_sign(value, sign):
    """The value, or minus the value where ``sign`` has its top bit set."""
    return (value.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def rademacher_words(tile, k0, k1, site, pair, generation):
    """[..., 64] words (uint32) of the tiles ``tile`` [..., 1]: element bit * 64 + column is a bit of word ``column``."""
    column = tl.arange(0, 4 * LANES)
    block = (tile * LANES + column % LANES).to(tl.uint32)
    w0, w1, w2, w3 = philox(block, site, pair, generation, k0, k1)
    word = column // LANES
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def signs_of(words, bit, sign):
    """+1 or -1: bit ``bit`` of each word, counted from the most significant, with the member's sign."""
    negative = (words << bit.to(tl.uint32)).to(tl.int32, bitcast=True) & -0x80000000
    return ((negative ^ sign) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def draw_groups(row, group, lane, tiles_per_row, k0, k1, site, pair, generation, RADEMACHER: tl.constexpr):
    """Elements group * 64 + word * 16 + lane of a row, for words 0 to 3, with the sign of the even member.

    The layout is that of Gaussian tiles. A group of a Rademacher tile is one bit of its words.
    """
    if RADEMACHER:
        tile = row * tiles_per_row + group // 32
        w0, w1, w2, w3 = philox((tile * LANES + lane).to(tl.uint32), site, pair, generation, k0, k1)
        bit = group % 32
        return signs_of(w0, bit, 0), signs_of(w1, bit, 0), signs_of(w2, bit, 0), signs_of(w3, bit, 0)
    else:
        block = ((row * tiles_per_row + group) * LANES + lane).to(tl.uint32)
        return gaussian_blocks(block, k0, k1, site, pair, generation, 0)


@triton.jit
def in_order(z0, z1, z2, z3, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What `draw_groups` drew for successive lanes of successive groups, as rows of columns in their order."""
    words = tl.join(tl.join(z0, z1), tl.join(z2, z3))
    words = tl.reshape(words, (ROWS, COLUMNS // GAUSSIAN_COLUMNS, LANES, 2, 2))  # ..., low and high bit of the word
    return tl.reshape(tl.permute(words, (0, 1, 4, 3, 2)), (ROWS, COLUMNS))


@triton.jit
def _span(out, tile, tiles, tiles_per_row, cols, TILE: tl.constexpr):
    """Where each tile starts in ``out`` and how many of its elements exist."""
    row = tile // tiles_per_row
    column = (tile - row * tiles_per_row).to(tl.int64) * TILE
    left = tl.where(tile < tiles, tl.minimum(cols - column, TILE), 0).to(tl.int32)
    return out + (row.to(tl.int64) * cols + column), left


# Were cols known to be a multiple of 16, Triton would take 16-byte stores and reshuffle every normal through shared
# memory for them. Half a warp's 4-byte stores already fill whole sectors.
@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "tiles", "cols"])
def gaussian_kernel(out, tiles, tiles_per_row, cols, k0, k1, site, pair, generation, sign, TILES: tl.constexpr):
    """One program fills TILES consecutive tiles, of whichever rows they belong to."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    lane = tl.arange(0, LANES)[None, :]
    block = (tile[:, None] * LANES + lane).to(tl.uint32)
    z0, z1, z2, z3 = gaussian_blocks(block, k0, k1, site, pair, generation, sign)
    start, left = _span(out, tile, tiles, tiles_per_row, cols, GAUSSIAN_COLUMNS)
    start, left = start[:, None], left[:, None]
    tl.store(start + lane, z0, mask=lane < left)
    tl.store(start + (lane + LANES), z1, mask=lane + LANES < left)
    tl.store(start + (lane + 2 * LANES), z2, mask=lane + 2 * LANES < left)
    tl.store(start + (lane + 3 * LANES), z3, mask=lane + 3 * LANES < left)


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "tiles"])
def rademacher_kernel(out, tiles, tiles_per_row, cols, k0, k1, site, pair, generation, sign, TILES: tl.constexpr):
    """One program fills TILES consecutive tiles, of whichever rows they belong to."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    words = rademacher_words(tile[:, None], k0, k1, site, pair, generation)
    start, left = _span(out, tile, tiles, tiles_per_row, cols, RADEMACHER_COLUMNS)
    bit = tl.arange(0, 32)[None, :, None]
    element = bit * (4 * LANES) + tl.arange(0, 4 * LANES)[None, None, :]
    signs = signs_of(words[:, None, :], bit, sign)
    tl.store(start[:, None, None] + element, signs, mask=element < left[:, None, None])


def gaussian(out: Tensor, seed: int, generation: int, site: int, member: int) -> None:
    """Fill ``out`` (float32 [rows, cols], contiguous) with the member's standard normals."""
    key = key_words(GAUSSIAN_TAG, seed, generation, site, member)
    _fill(gaussian_kernel, out, GAUSSIAN_TILE, key, **config(out, "gaussian"))


def rademacher(out: Tensor, seed: int, generation: int, site: int, member: int) -> None:
    """Fill ``out`` (float32 [rows, cols], contiguous) with the member's signs, +1 or -1."""
    key = key_words(RADEMACHER_TAG, seed, generation, site, member)
    _fill(rademacher_kernel, out, RADEMACHER_TILE, key, **config(out, "rademacher"))


def _fill(kernel, out: Tensor, tile: int, key: dict[str, int], *, tiles: int, num_warps: int) -> None:
    rows, cols = out.shape
    tiles_per_row = triton.cdiv(cols, tile)
    grid = (triton.cdiv(rows * tiles_per_row, tiles),)
    with on_device(out):
        kernel[grid](
            out,
            rows * tiles_per_row,
            tiles_per_row,
            cols,
            **key,
            TILES=tiles,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
