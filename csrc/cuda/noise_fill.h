// One thread's share of a noise fill, for device and host: tests compile it with the host compiler and compare bits.
//
// A thread takes a quad, four neighbouring lanes of one tile: four Philox blocks, hence four consecutive elements for
// each word, which leave as one 16-byte store. A Gaussian quad is 16 values. A Rademacher quad would be 512, so four
// threads share it, 8 bits each, and each draws the quad's blocks again: 160 integer operations for 128 values is less
// than moving them between threads.
#pragma once
#include "../noise/noise.h"

namespace essa {
namespace cuda {

constexpr int kQuad = 4;
constexpr int kQuads = noise::kTileBlocks / kQuad;
constexpr int kBitsPerThread = 8;
constexpr int kGaussianThreadsPerTile = kQuads;
constexpr int kRademacherThreadsPerTile = kQuads * (32 / kBitsPerThread);

struct Fill {
  float* out;
  int64_t cols;
  uint32_t tiles, tiles_per_row;  // the contract bounds rows * tiles_per_row by 2^28
  bool vector_stores;             // every quad starts on 16 bytes
  bool negate;                    // the odd member of the pair
  noise::Key key;
};

inline Fill make_fill(float* out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
                      uint64_t member, int tile) {
  const int64_t tiles_per_row = noise::tiles_per_row(cols, tile);
  Fill fill;
  fill.out = out;
  fill.cols = cols;
  fill.tiles = (uint32_t)(rows * tiles_per_row);
  fill.tiles_per_row = (uint32_t)tiles_per_row;
  fill.vector_stores = cols % kQuad == 0 && (uintptr_t)out % (kQuad * sizeof(float)) == 0;
  fill.negate = (member & 1) != 0;
  fill.key = noise::Key{(uint32_t)seed, (uint32_t)(seed >> 32), site, (uint32_t)(member >> 1), generation};
  return fill;
}

struct alignas(16) Float4 {
  float value[kQuad];
};

// The four blocks of a quad, transposed: words[w][i] is word w of lane 4 * quad + i.
struct QuadWords {
  uint32_t words[4][kQuad];
};

ESSA_HD QuadWords draw_quad(const noise::Key& key, uint32_t tag, uint32_t tile, uint32_t quad) {
  QuadWords drawn;
  for (int i = 0; i < kQuad; ++i) {
    const uint32_t block = tile * noise::kTileBlocks + quad * kQuad + i;
    const noise::Words w = noise::philox(block, key.c1(tag), key.pair, key.generation, key.k0, key.k1);
    for (int word = 0; word < 4; ++word) drawn.words[word][i] = w.w[word];
  }
  return drawn;
}

ESSA_HD void store_quad(const Fill& fill, float* row, int64_t column, const Float4& values) {
  if (column >= fill.cols) return;
  if (fill.vector_stores) {
    *reinterpret_cast<Float4*>(row + column) = values;
    return;
  }
  for (int i = 0; i < kQuad; ++i)
    if (column + i < fill.cols) row[column + i] = values.value[i];
}

// Thread `index` of rows * tiles_per_row * kGaussianThreadsPerTile.
ESSA_HD void gaussian_thread(const Fill& fill, uint64_t index) {
  const uint32_t tile = (uint32_t)(index / kGaussianThreadsPerTile);
  const uint32_t quad = (uint32_t)(index % kGaussianThreadsPerTile);
  if (tile >= fill.tiles) return;
  const QuadWords drawn = draw_quad(fill.key, noise::kGaussian, tile, quad);
  Float4 z[4];
  for (int i = 0; i < kQuad; ++i) {
    noise::box_muller(drawn.words[0][i], drawn.words[1][i], z[0].value[i], z[1].value[i]);
    noise::box_muller(drawn.words[2][i], drawn.words[3][i], z[2].value[i], z[3].value[i]);
  }
  const uint32_t row_index = tile / fill.tiles_per_row;
  float* row = fill.out + (int64_t)row_index * fill.cols;
  const int64_t column = (int64_t)(tile - row_index * fill.tiles_per_row) * noise::kGaussianTile + quad * kQuad;
  for (int word = 0; word < 4; ++word) {
    if (fill.negate)
      for (int i = 0; i < kQuad; ++i) z[word].value[i] = -z[word].value[i];
    store_quad(fill, row, column + word * noise::kTileBlocks, z[word]);
  }
}

// Thread `index` of rows * tiles_per_row * kRademacherThreadsPerTile.
ESSA_HD void rademacher_thread(const Fill& fill, uint64_t index) {
  const uint32_t tile = (uint32_t)(index / kRademacherThreadsPerTile);
  const uint32_t place = (uint32_t)(index % kRademacherThreadsPerTile);
  const uint32_t quad = place % kQuads, first_bit = place / kQuads * kBitsPerThread;
  if (tile >= fill.tiles) return;
  QuadWords drawn = draw_quad(fill.key, noise::kRademacher, tile, quad);
  const uint32_t flip = fill.negate ? 0xffffffffu : 0u;
  for (int word = 0; word < 4; ++word)
    for (int i = 0; i < kQuad; ++i) drawn.words[word][i] = (drawn.words[word][i] ^ flip) << first_bit;
  const uint32_t row_index = tile / fill.tiles_per_row;
  float* row = fill.out + (int64_t)row_index * fill.cols;
  const int64_t column = (int64_t)(tile - row_index * fill.tiles_per_row) * noise::kRademacherTile +
                         first_bit * noise::kGaussianTile + quad * kQuad;
  for (int bit = 0; bit < kBitsPerThread; ++bit)
    for (int word = 0; word < 4; ++word) {
      Float4 signs;
      for (int i = 0; i < kQuad; ++i)
        signs.value[i] = noise::bits_to_float(((drawn.words[word][i] << bit) & 0x80000000u) | 0x3f800000u);
      store_quad(fill, row, column + bit * noise::kGaussianTile + word * noise::kTileBlocks, signs);
    }
}

}  // namespace cuda
}  // namespace essa
