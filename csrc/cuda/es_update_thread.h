// One thread's share of perturb_ and es_update_, for device and host: tests compile it with the host compiler and compare
// bits.
//
// A thread takes one block of a noise tile, and of a Rademacher block half of the bits: 4 and 64 elements, whose sums
// stay in registers while the pairs go by. The 16 lanes of a tile are neighbouring threads, so that each word's elements
// are read and written as whole sectors. A Rademacher block is drawn twice, which is less than to share it.
#pragma once
#include "scalar_types.h"

namespace essa {
namespace cuda {

// As many tensors as fit with the rest into the 4 KiB of a launch's arguments.
constexpr int kTensorsPerLaunch = 100;

struct NoisyTensor {
  void* data;
  int64_t cols;
  uint32_t tiles_per_row, tiles_end;  // the tiles of this tensor and of those before it in the launch
  uint32_t site;
  int dtype;  // as in essa_cuda.h
};

struct EsUpdate {
  NoisyTensor tensors[kTensorsPerLaunch];
  int count;
  noise::Key key;  // the tensor has its own site; perturb_: the pair
  float sigma;     // perturb_
  const float* pair_weights;  // es_update_
  uint32_t pairs;
};

constexpr int kGaussianUpdateThreads = noise::kTileBlocks;  // per tile
constexpr int kUpdateBits = 16;
constexpr int kRademacherUpdateThreads = noise::kTileBlocks * (32 / kUpdateBits);

// Where a thread's elements lie: those with `element < left` exist.
struct Place {
  const NoisyTensor* tensor;
  int64_t start;   // of the tile
  int left;        // elements that the tile has in its row
  uint32_t block;  // of its lane 0
};

ESSA_HD Place locate(const EsUpdate& p, uint32_t tile, int tile_size) {
  int low = 0;
  for (int high = p.count - 1; low < high;) {
    const int middle = (low + high) / 2;
    p.tensors[middle].tiles_end <= tile ? low = middle + 1 : high = middle;
  }
  const NoisyTensor& tensor = p.tensors[low];
  if (low > 0) tile -= p.tensors[low - 1].tiles_end;
  const uint32_t row = tile / tensor.tiles_per_row;
  const int64_t column = (int64_t)(tile - row * tensor.tiles_per_row) * tile_size, left = tensor.cols - column;
  return Place{&tensor, (int64_t)row * tensor.cols + column, (int)(left < tile_size ? left : tile_size),
               tile * noise::kTileBlocks};
}

template <class T>
ESSA_HD void add_to(void* data, int64_t at, float scale, float value) {
  T& element = static_cast<T*>(data)[at];
  from_float(noise::fma_rn(scale, value, to_float(element)), element);
}

// element += scale * value, rounded once, where the element exists.
ESSA_HD void add_to(const Place& place, int element, float scale, float value) {
  if (element >= place.left) return;
  const int64_t at = place.start + element;
  if (place.tensor->dtype == 0) add_to<float>(place.tensor->data, at, scale, value);
  if (place.tensor->dtype == 1) add_to<BFloat16>(place.tensor->data, at, scale, value);
  if (place.tensor->dtype == 2) add_to<Float16>(place.tensor->data, at, scale, value);
}

ESSA_HD noise::Words draw_block(const EsUpdate& p, const Place& place, int lane, uint32_t tag, uint32_t pair) {
  const noise::Key& key = p.key;
  return noise::philox(place.block + lane, place.tensor->site | (tag << 30), pair, key.generation, key.k0, key.k1);
}

// z[word] belongs to element word * 16 + lane of a tile.
ESSA_HD void draw_normals(const EsUpdate& p, const Place& place, int lane, uint32_t pair, float z[4]) {
  const noise::Words words = draw_block(p, place, lane, noise::kGaussian, pair);
  noise::box_muller(words.w[0], words.w[1], z[0], z[1]);
  noise::box_muller(words.w[2], words.w[3], z[2], z[3]);
}

// Thread `index` of tiles * kGaussianUpdateThreads.
ESSA_HD void perturb_gaussian_thread(const EsUpdate& p, uint64_t index) {
  const uint32_t tile = (uint32_t)(index / kGaussianUpdateThreads);
  const int lane = (int)(index % kGaussianUpdateThreads);
  if (tile >= p.tensors[p.count - 1].tiles_end) return;
  const Place place = locate(p, tile, noise::kGaussianTile);
  float z[4];
  draw_normals(p, place, lane, p.key.pair, z);
  for (int word = 0; word < 4; ++word) add_to(place, word * noise::kTileBlocks + lane, p.sigma, z[word]);
}

ESSA_HD void update_gaussian_thread(const EsUpdate& p, uint64_t index) {
  const uint32_t tile = (uint32_t)(index / kGaussianUpdateThreads);
  const int lane = (int)(index % kGaussianUpdateThreads);
  if (tile >= p.tensors[p.count - 1].tiles_end) return;
  const Place place = locate(p, tile, noise::kGaussianTile);
  float totals[4] = {};
  for (uint32_t pair = 0; pair < p.pairs; ++pair) {
    const float weight = p.pair_weights[pair];
    if (weight == 0.0f) continue;
    float z[4];
    draw_normals(p, place, lane, pair, z);
    for (int word = 0; word < 4; ++word) totals[word] = noise::fma_rn(weight, z[word], totals[word]);
  }
  for (int word = 0; word < 4; ++word) add_to(place, word * noise::kTileBlocks + lane, 1.0f, totals[word]);
}

// The value with the sign of bit `bit` of a word, counted from the most significant.
ESSA_HD float with_sign(float value, uint32_t word, int bit) {
  return noise::bits_to_float(noise::float_to_bits(value) ^ ((word << bit) & 0x80000000u));
}

// Calls take(element in the tile, word, bit after first_bit) for the elements of a Rademacher thread.
template <class Take>
ESSA_HD void each_sign(int lane, int first_bit, Take take) {
#pragma unroll
  for (int bit = 0; bit < kUpdateBits; ++bit)
#pragma unroll
    for (int word = 0; word < 4; ++word)
      take((first_bit + bit) * noise::kGaussianTile + word * noise::kTileBlocks + lane, word, bit);
}

// Thread `index` of tiles * kRademacherUpdateThreads.
ESSA_HD void perturb_rademacher_thread(const EsUpdate& p, uint64_t index) {
  const uint32_t tile = (uint32_t)(index / kRademacherUpdateThreads);
  const int share = (int)(index % kRademacherUpdateThreads), lane = share % noise::kTileBlocks;
  const int first_bit = share / noise::kTileBlocks * kUpdateBits;
  if (tile >= p.tensors[p.count - 1].tiles_end) return;
  const Place place = locate(p, tile, noise::kRademacherTile);
  if (first_bit * noise::kGaussianTile >= place.left) return;
  const noise::Words words = draw_block(p, place, lane, noise::kRademacher, p.key.pair);
  each_sign(lane, first_bit, [&](int element, int word, int bit) {
    add_to(place, element, p.sigma, with_sign(1.0f, words.w[word] << first_bit, bit));
  });
}

ESSA_HD void update_rademacher_thread(const EsUpdate& p, uint64_t index) {
  const uint32_t tile = (uint32_t)(index / kRademacherUpdateThreads);
  const int share = (int)(index % kRademacherUpdateThreads), lane = share % noise::kTileBlocks;
  const int first_bit = share / noise::kTileBlocks * kUpdateBits;
  if (tile >= p.tensors[p.count - 1].tiles_end) return;
  const Place place = locate(p, tile, noise::kRademacherTile);
  if (first_bit * noise::kGaussianTile >= place.left) return;
  float totals[kUpdateBits][4] = {};
  for (uint32_t pair = 0; pair < p.pairs; ++pair) {
    const float weight = p.pair_weights[pair];
    if (weight == 0.0f) continue;
    noise::Words words = draw_block(p, place, lane, noise::kRademacher, pair);
    for (int word = 0; word < 4; ++word) words.w[word] <<= first_bit;
    // What an fma with the sign gives; the compiler sees no product here to fuse.
    each_sign(lane, first_bit,
              [&](int, int word, int bit) { totals[bit][word] += with_sign(weight, words.w[word], bit); });
  }
  each_sign(lane, first_bit,
            [&](int element, int word, int bit) { add_to(place, element, 1.0f, totals[bit][word]); });
}

}  // namespace cuda
}  // namespace essa
