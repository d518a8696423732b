// Whole tiles of noise written to memory. The element layout puts the 16 blocks of a tile side by side, so that each
// word of W lanes is one contiguous store.
#pragma once
#include "noise_simd.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {

// Calls take(destination, W normals) throughout consecutive tiles that begin at `out`.
template <class Take>
ESSA_INLINE void each_normals(const Philox& philox, uint32_t block, int64_t tiles, vi flip, float* out, Take take) {
  WordVectors words = Philox::words(philox, block);
  for (; tiles > 0; --tiles, out += noise::kGaussianTile) {
#pragma GCC unroll 4
    for (int lane = 0; lane < noise::kTileBlocks; lane += W) {
      vf z[4];
      block += W;
      words = normals_and_next(words, flip, z, philox, block);
      for (int word = 0; word < 4; ++word) take(out + word * 16 + lane, z[word]);
    }
  }
}

static inline void gaussian_tiles(const Philox& philox, uint32_t block, int64_t tiles, vi flip, float* out) {
  each_normals(philox, block, tiles, flip, out, [](float* p, vf z) { store(p, z); });
}

// The bits [first, last) of a tile, 64 elements each.
// one: +1 or -1 in every lane; a set bit flips it
ESSA_INLINE void rademacher_bits(const Philox& philox, uint32_t first_block, int first, int last, vi one, float* out) {
  constexpr int kVectors = noise::kTileBlocks / W;
  vi words[4][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const WordVectors x = Philox::words(philox, first_block + v * W);
    for (int word = 0; word < 4; ++word) words[word][v] = x.w[word];
  }
  for (int bit = 0; bit < first; ++bit)
    for (int word = 0; word < 4; ++word)
      for (int v = 0; v < kVectors; ++v) words[word][v] = addi(words[word][v], words[word][v]);
  const vi sign = seti(0x80000000u);
  for (int bit = first; bit < last; ++bit, out += 64) {
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        vi& w = words[word][v];
        store(out + word * 16 + v * W, as_float(xori(andi(w, sign), one)));
        w = addi(w, w);
      }
    }
  }
}

// One noise matrix of one pair, drawn a piece of a row at a time with the sign of the even member.
struct NoiseMatrix {
  Philox philox;
  bool rademacher;
  int64_t tiles_per_row;

  NoiseMatrix(noise::Key key, uint32_t site, uint32_t pair, bool rademacher, int64_t cols)
      : philox(at(key, site, pair), rademacher ? noise::kRademacher : noise::kGaussian),
        rademacher(rademacher),
        tiles_per_row(noise::tiles_per_row(cols, rademacher ? noise::kRademacherTile : noise::kGaussianTile)) {}

  // Elements [column, column + columns) of a row, rounded up to whole groups of 64; column is a multiple of 64.
  void draw(int64_t row, int64_t column, int64_t columns, float* out) const {
    if (!rademacher) {
      const int64_t tile = row * tiles_per_row + column / noise::kGaussianTile;
      const int64_t tiles = noise::tiles_per_row(columns, noise::kGaussianTile);
      gaussian_tiles(philox, (uint32_t)(tile * noise::kTileBlocks), tiles, seti(0), out);
      return;
    }
    for (const int64_t end = column + columns; column < end;) {
      const int64_t in_row = column / noise::kRademacherTile, next = (in_row + 1) * noise::kRademacherTile;
      const int64_t stop = next < end ? next : end, start = in_row * noise::kRademacherTile;
      const uint32_t block = (uint32_t)((row * tiles_per_row + in_row) * noise::kTileBlocks);
      rademacher_bits(philox, block, (int)((column - start) / 64), (int)((stop - start + 63) / 64), seti(0x3f800000u),
                      out);
      out += stop - column;
      column = stop;
    }
  }

 private:
  static noise::Key at(noise::Key key, uint32_t site, uint32_t pair) {
    key.site = site;
    key.pair = pair;
    return key;
  }
};

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
