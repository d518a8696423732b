// Gaussian and Rademacher fills. The element layout puts the 16 blocks of a tile side by side, so that each word of W
// lanes is one contiguous store.
#include "kernels.h"
#include "noise_simd.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

void gaussian_tiles(const Philox& philox, uint32_t block, int64_t tiles, vi flip, float* out) {
  WordVectors words = Philox::words(philox, block);
  for (; tiles > 0; --tiles, out += noise::kGaussianTile) {
#pragma GCC unroll 4
    for (int lane = 0; lane < noise::kTileBlocks; lane += W) {
      vf z[4];
      block += W;
      words = normals_and_next(words, flip, z, philox, block);
      for (int word = 0; word < 4; ++word) store(out + word * 16 + lane, z[word]);
    }
  }
}

// one: +1 or -1 in every lane; a set bit flips it
void rademacher_tile(const Philox& philox, uint32_t first_block, vi one, float* out) {
  constexpr int kVectors = noise::kTileBlocks / W;
  vi words[4][kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const WordVectors x = Philox::words(philox, first_block + v * W);
    for (int word = 0; word < 4; ++word) words[word][v] = x.w[word];
  }
  const vi sign = seti(0x80000000u);
  for (int bit = 0; bit < 32; ++bit, out += 64) {
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

// Calls fill(block, tiles, destination) for the tiles [first, last), as many of a row at a time as there are; a row's
// ragged last tile goes through a buffer.
template <int Tile, class Fill>
ESSA_INLINE void for_each_run(const NoiseArgs& args, int64_t first, int64_t last, Fill fill) {
  alignas(64) float buffer[Tile];
  const int64_t per_row = noise::tiles_per_row(args.cols, Tile), whole = args.cols / Tile;
  while (first < last) {
    const int64_t row = first / per_row, column = first % per_row;
    const int64_t end = last - first < per_row - column ? column + last - first : per_row;
    const uint32_t block = (uint32_t)(first * noise::kTileBlocks);
    float* out = args.out + row * args.cols + column * Tile;
    const int64_t tiles = (end < whole ? end : whole) - column;
    if (tiles > 0) fill(block, tiles, out);
    if (end > whole) {
      fill((uint32_t)((row * per_row + whole) * noise::kTileBlocks), 1, buffer);
      __builtin_memcpy(args.out + row * args.cols + whole * Tile, buffer, (args.cols - whole * Tile) * sizeof(float));
    }
    first += end - column;
  }
}

}  // namespace

void gaussian(const NoiseArgs& args, int64_t first, int64_t last) {
  const Philox philox(args.key, noise::kGaussian);
  const vi flip = seti(args.negate ? 0x80000000u : 0u);
  for_each_run<noise::kGaussianTile>(args, first, last, [&](uint32_t block, int64_t tiles, float* out) {
    gaussian_tiles(philox, block, tiles, flip, out);
  });
}

void rademacher(const NoiseArgs& args, int64_t first, int64_t last) {
  const Philox philox(args.key, noise::kRademacher);
  const vi one = seti(args.negate ? 0xbf800000u : 0x3f800000u);
  for_each_run<noise::kRademacherTile>(args, first, last, [&](uint32_t block, int64_t tiles, float* out) {
    for (int64_t i = 0; i < tiles; ++i)
      rademacher_tile(philox, block + (uint32_t)i * noise::kTileBlocks, one, out + i * noise::kRademacherTile);
  });
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
