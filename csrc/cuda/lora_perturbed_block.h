// One thread block of lora_perturbed: y += scaling (B + s eps_B) ((A + s eps_A) x) for the rows of an antithetic pair.
//
// Meant for decode, where the cost is launches, latency and the noise itself, so the whole op is one launch and the pair's
// noise is drawn once for the rows of both members. The blocks of a pair form a cluster as in svd_lora_block.h: each
// reduces its share of d_in, reads the others' partial sums, and updates its share of d_out. A thread's unit is a lane of
// a noise tile: one Philox block, four columns 16 apart. Sums run in an order fixed by the shapes, so results repeat.
#pragma once
#include "../noise/noise.h"
#include "svd_lora_block.h"

namespace essa {
namespace cuda {

constexpr int kGroup = 64;  // columns whose lanes lie side by side, in either distribution's layout

template <class T, class P>
struct LoraPerturbed {
  T* y;
  const T* x;
  const P* a;  // [rank, d_in]
  const P* b;  // [d_out, rank], any strides
  const int64_t *members, *offsets;
  int64_t y_stride, x_stride, b_row_stride, b_column_stride;
  int groups, d_in, d_out, rank;
  float sigma, scaling;
  bool rademacher;
  noise::Key key;  // its site is A's
};

// The rows of a pair: those of its leading group, then those of the other member's.
struct PairOfRows {
  uint32_t pair;
  int64_t own_first, own, other_first, count;
  bool own_odd;

  ESSA_HD int64_t row(int64_t place) const { return place < own ? own_first + place : other_first + (place - own); }
  ESSA_HD bool odd(int64_t place) const { return own_odd || place >= own; }
};

// What group `index` leads: its pair's rows, or none where it is the odd member of a pair whose even one is there too.
// `partner` is in shared memory.
template <class Block>
ESSA_HD PairOfRows find_pair(const Block& block, const int64_t* members, const int64_t* offsets, int groups, int index,
                             int* partner) {
  const int64_t member = members[index];
  if (block.thread() == 0) *partner = -1;
  block.sync();
  for (int g = block.thread(); g < groups; g += block.threads())
    if (members[g] == (member ^ 1)) *partner = g;
  block.sync();
  const int other = *partner;
  PairOfRows rows;
  rows.pair = (uint32_t)(member >> 1);
  rows.own_odd = (member & 1) != 0;
  rows.own_first = offsets[index];
  rows.own = offsets[index + 1] - rows.own_first;
  rows.other_first = other < 0 ? 0 : offsets[other];
  rows.count = rows.own + (other < 0 ? 0 : offsets[other + 1] - rows.other_first);
  if (rows.own_odd && other >= 0) rows.count = 0;
  return rows;
}

// Elements group * 64 + word * 16 + lane of a row of the noise, with the even member's sign.
ESSA_HD void draw_lane(const noise::Key& key, bool rademacher, int64_t row, int group, int lane, int tiles_per_row,
                       float z[4]) {
  const int tile = rademacher ? group / 32 : group;
  const uint32_t block = (uint32_t)((row * tiles_per_row + tile) * noise::kTileBlocks + lane);
  const noise::Words words = noise::philox(block, key.c1(rademacher ? noise::kRademacher : noise::kGaussian), key.pair,
                                           key.generation, key.k0, key.k1);
  if (rademacher) {
    for (int w = 0; w < 4; ++w)
      z[w] = noise::bits_to_float(((words.w[w] << group % 32) & 0x80000000u) | 0x3f800000u);
  } else {
    noise::box_muller(words.w[0], words.w[1], z[0], z[1]);
    noise::box_muller(words.w[2], words.w[3], z[2], z[3]);
  }
}

ESSA_HD int tiles_of(int64_t columns, bool rademacher) {
  return (int)noise::tiles_per_row(columns, rademacher ? noise::kRademacherTile : noise::kGaussianTile);
}

// Partial sums of the perturbed A times R rows of x, over this block's part of d_in: [slices, R, rank] in shared memory.
template <int R, class T, class P, class Block>
ESSA_HD void project_perturbed(const Block& block, const LoraPerturbed<T, P>& p, const PairOfRows& rows, int64_t place,
                               int slices) {
  const int lane = block.thread() % kWarp, warp = block.thread() / kWarp, warps = block.threads() / kWarp;
  const int units = (p.d_in + kGroup - 1) / kGroup * noise::kTileBlocks;
  const int share = (units + block.inner_parts() - 1) / block.inner_parts();
  const int begin = block.inner_part() * share, end = smaller(begin + share, units);
  const int tiles = tiles_of(p.d_in, p.rademacher);
  noise::Key key = p.key;
  key.pair = rows.pair;
  const T* x[R];
  float scale[R];
  for (int r = 0; r < R; ++r) {
    // Places past the end repeat the last row; their sums are never used.
    const int64_t at = place + r < rows.count ? place + r : rows.count - 1;
    x[r] = p.x + rows.row(at) * p.x_stride;
    scale[r] = rows.odd(at) ? -p.sigma : p.sigma;
  }
  for (int job = warp; job < p.rank * slices; job += warps) {
    const int rank = job % p.rank, slice = job / p.rank;
    const P* a = p.a + (int64_t)rank * p.d_in;
    float sum[R] = {};
    for (int unit = begin + slice * kWarp + lane; unit < end; unit += slices * kWarp) {
      const int group = unit / noise::kTileBlocks, column = group * kGroup + unit % noise::kTileBlocks;
      float z[4];
      draw_lane(key, p.rademacher, rank, group, unit % noise::kTileBlocks, tiles, z);
      for (int w = 0; w < 4; ++w) {
        const int c = column + w * noise::kTileBlocks;
        if (c >= p.d_in) break;
        const float parameter = to_float(a[c]);
        for (int r = 0; r < R; ++r)
          sum[r] = noise::fma_rn(to_float(x[r][c]), noise::fma_rn(scale[r], z[w], parameter), sum[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const float total = block.warp_sum(sum[r]);
      if (lane == 0) block.shared()[(slice * R + r) * p.rank + rank] = total;
    }
  }
}

// y += the perturbed B times h for this block's columns; h [R, rank] in shared memory.
template <int R, class T, class P, class Block>
ESSA_HD void expand_perturbed(const Block& block, const LoraPerturbed<T, P>& p, const PairOfRows& rows, int64_t place,
                              const float* h) {
  const int units = (p.d_out + kGroup - 1) / kGroup * noise::kTileBlocks;
  const int share = (units + block.outer_parts() - 1) / block.outer_parts();
  const int begin = block.outer_part() * share, end = smaller(begin + share, units);
  const int tiles = tiles_of(p.d_out, p.rademacher);
  noise::Key key = p.key;
  key.pair = rows.pair;
  ++key.site;
  float scale[R];
  for (int r = 0; r < R; ++r) scale[r] = rows.odd(place + r) ? -p.sigma : p.sigma;
  for (int unit = begin + block.thread(); unit < end; unit += block.threads()) {
    const int group = unit / noise::kTileBlocks, column = group * kGroup + unit % noise::kTileBlocks;
    float delta[R][4] = {};
    for (int rank = 0; rank < p.rank; ++rank) {
      float z[4];
      draw_lane(key, p.rademacher, rank, group, unit % noise::kTileBlocks, tiles, z);
      for (int w = 0; w < 4; ++w) {
        const int64_t c = smaller(column + w * noise::kTileBlocks, p.d_out - 1);
        const float parameter = to_float(p.b[c * p.b_row_stride + rank * p.b_column_stride]);
        for (int r = 0; r < R; ++r)
          delta[r][w] = noise::fma_rn(h[r * p.rank + rank], noise::fma_rn(scale[r], z[w], parameter), delta[r][w]);
      }
    }
    for (int r = 0; r < R; ++r) {
      if (place + r >= rows.count) continue;
      T* y = p.y + rows.row(place + r) * p.y_stride;
      for (int w = 0; w < 4; ++w) {
        const int c = column + w * noise::kTileBlocks;
        if (c < p.d_out) from_float(to_float(y[c]) + delta[r][w], y[c]);
      }
    }
  }
}

// Shared memory of a block, in floats: partial sums [slices, R, rank], h [R, rank], then the partner.
struct PerturbedShared {
  int slices, h, partner, total;
};

ESSA_HD PerturbedShared perturbed_layout(int rows_at_once, int rank, int warps) {
  PerturbedShared shared;
  shared.slices = warps > rank ? warps / rank : 1;
  shared.h = shared.slices * rows_at_once * rank;
  shared.partner = shared.h + rows_at_once * rank;
  shared.total = shared.partner + 1;
  return shared;
}

template <int R, class T, class P, class Block>
ESSA_HD void lora_perturbed_block(const Block& block, const LoraPerturbed<T, P>& p) {
  const PerturbedShared shared = perturbed_layout(R, p.rank, block.threads() / kWarp);
  float* own = block.shared();
  const PairOfRows rows = find_pair(block, p.members, p.offsets, p.groups, (int)block.row_block(),
                                    reinterpret_cast<int*>(own + shared.partner));
  for (int64_t place = 0; place < rows.count; place += R) {
    project_perturbed<R>(block, p, rows, place, shared.slices);
    block.cluster_sync();
    for (int i = block.thread(); i < R * p.rank; i += block.threads()) {
      float sum = 0.0f;
      for (int part = 0; part < block.inner_parts(); ++part)
        for (int slice = 0; slice < shared.slices; ++slice) sum += block.shared_of(part)[slice * R * p.rank + i];
      own[shared.h + i] = p.scaling * sum;
    }
    block.sync();
    expand_perturbed<R>(block, p, rows, place, own + shared.h);
    block.cluster_sync();  // the partial sums are read no more: the next rows may have their place, or the block leave
  }
}

}  // namespace cuda
}  // namespace essa
