"""The noise contract: which bits a key stands for, on every backend, for ever.

A noise value is a pure function of a `NoiseKey`, a member and the position of the element in its matrix. It does not
depend on the backend, the instruction set, the number of threads, the launch geometry, or on how a matrix is split.
`csrc/noise/noise.h` states the same contract as code; `essa_kernels/reference/noise.py` states it in torch.

**Generator.** Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One
call turns a 128-bit counter and a 64-bit key into one *block* of four 32-bit words.

- key: the 64-bit seed, low word first;
- counter word 0: the block index inside the matrix;
- counter word 1: the site (30 bits) with the distribution in the top two bits: 0 Gaussian, 1 Rademacher;
- counter word 2: the antithetic pair, ``member >> 1``;
- counter word 3: the generation.

The fields are packed side by side and never added, so two different keys never share a stream.

**Antithetic pairs.** Members 2k and 2k + 1 share a pair: the noise of 2k + 1 is the noise of 2k with the sign flipped.

**Layout.** The matrix is the unsharded logical one, ``[rows, cols]``: leading dimensions are flattened into rows and a
vector is one row. Every row starts on a tile of its own, so row r begins at tile ``r * ceil(cols / tile)`` and a row's
noise depends on its index and on cols only. A tile takes 16 consecutive blocks, starting at block ``tile * 16``.

- Gaussian, tiles of 64: element e of a tile is word ``e // 16`` of block ``e % 16``. Words (0, 1) and (2, 3) of a block
  are the pairs of the Box-Muller transform.
- Rademacher, tiles of 2048: element ``e = bit * 64 + word * 16 + lane`` is one bit of word ``word`` of block ``lane``.
  Bit 0 is the most significant; a set bit is -1, a clear one +1.

**Normals.** Box-Muller in float32, from integer operations and correctly rounded add, mul, fma and sqrt alone, with
fixed polynomials for the logarithm, sine and cosine. No product feeds a bare add, so no compiler can change a bit by
contracting it. The largest magnitude is ``sqrt(64 * ln 2)``, about 6.66.

**Limits.** Counter word 0 bounds a matrix to 2**32 blocks: ``rows * ceil(cols / tile) * 16 <= 2**32``.

A change to any of this is a new `NOISE_VERSION`.
"""

from __future__ import annotations

import dataclasses
from operator import index

NOISE_VERSION = 1

SEED_END = 2**64
GENERATION_END = 2**32
SITE_END = 2**30
MEMBER_END = 2**33

STRATEGY_SITE = SITE_END - 1
"""The site from which search strategies draw."""
SAMPLING_SITE = SITE_END - 2
"""The site from which rollouts draw their token sampling."""

GAUSSIAN_TILE = 64
RADEMACHER_TILE = 2048
BLOCKS_PER_TILE = 16


def check_integer(name: str, value: int, end: int) -> int:
    """Return ``value`` as an int, or raise unless it is an integer in ``0 <= value < end``."""
    try:
        value = index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not 0 <= value < end:
        raise ValueError(f"{name} must be in 0 .. 2**{end.bit_length() - 1} - 1, got {value}")
    return value


@dataclasses.dataclass(frozen=True)
class NoiseKey:
    """What selects a noise matrix, apart from the member.

    Args:
        seed: the run's seed, 0 .. 2**64 - 1.
        generation: the round of the search, 0 .. 2**32 - 1.
        site: which noise matrix of the model, 0 .. 2**30 - 1. Adapted layer i owns sites 2i and 2i + 1. The last 1024
            sites are reserved for uses that are not a layer, such as `STRATEGY_SITE`.

    Raises:
        TypeError, ValueError: a field is not an integer or is out of range.
    """

    seed: int
    generation: int = 0
    site: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_integer("seed", self.seed, SEED_END))
        object.__setattr__(self, "generation", check_integer("generation", self.generation, GENERATION_END))
        object.__setattr__(self, "site", check_integer("site", self.site, SITE_END))

    def at(self, *, generation: int | None = None, site: int | None = None) -> NoiseKey:
        """A copy of this key at another generation, another site, or both."""
        return NoiseKey(
            self.seed,
            self.generation if generation is None else generation,
            self.site if site is None else site,
        )
