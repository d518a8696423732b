// Gaussian and Rademacher fills.
#include "kernels.h"
#include "noise_tiles.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

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
      rademacher_bits(philox, block + (uint32_t)i * noise::kTileBlocks, 0, 32, one, out + i * noise::kRademacherTile);
  });
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
