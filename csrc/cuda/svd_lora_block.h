// One thread block of svd_lora: y += U_B (s_B[m] * (core (s_A[m] * (V_A x)))) for R rows.
//
// Meant for decode, where everything fits in L2 and the cost is launches and latency, so the whole op is one launch.
// A block owns R rows and one part of d_in and d_out. The parts of one row block form a cluster: each reduces its
// share of d_in, reads the others' partial sums from their shared memory, and, having the rows' h complete, updates its
// share of d_out. Without clusters (before sm_90) each block walks all of d_in instead, from L2: h needs no exchange.
// Sums run in an order fixed by the shapes, so results repeat exactly.
//
// The code is written against a Block (its thread index, barriers and shared memory), which is the hardware in
// svd_lora.cu and an emulation on the host in the tests.
#pragma once
#include <stddef.h>

#include "scalar_types.h"

namespace essa {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kRanksPerWarp = 2;
constexpr int kColumnsPerThread = 2;
constexpr int kColumnAlignment = 64;  // columns of a part start on a whole sector

template <class T>
struct SvdLora {
  T* y;
  const T* x;
  const T* v_a;       // [r_a, d_in]
  const float* core;  // [r_b, r_a]
  const T* u_b;       // [d_out, r_b], any strides
  const float* s_a;   // [members, r_a]
  const float* s_b;   // [members, r_b]
  const int64_t* offsets;
  float* h;  // [rows, r_b], written by shrink and read by expand; svd_lora keeps it in shared memory
  int64_t y_stride, x_stride, h_stride, u_b_row_stride, u_b_column_stride;
  int64_t rows;
  int members, d_in, d_out, r_a, r_b;
  bool vector_inputs;  // x and v_a rows start on 16 bytes
  bool vector_ranks;   // u_b has adjacent columns and its rows start on 16 bytes
  bool paired_columns;  // y columns move two at a time
};

inline bool aligned(uintptr_t pointer, size_t bytes) { return pointer % bytes == 0; }

template <class T>
void set_inputs(SvdLora<T>& p, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core, uintptr_t s_a,
                uintptr_t s_b, uintptr_t offsets, int64_t members, int64_t d_in, int64_t r_a, int64_t r_b) {
  p.x = reinterpret_cast<const T*>(x);
  p.x_stride = x_stride;
  p.v_a = reinterpret_cast<const T*>(v_a);
  p.core = reinterpret_cast<const float*>(core);
  p.s_a = reinterpret_cast<const float*>(s_a);
  p.s_b = reinterpret_cast<const float*>(s_b);
  p.offsets = reinterpret_cast<const int64_t*>(offsets);
  p.members = (int)members;
  p.d_in = (int)d_in;
  p.r_a = (int)r_a;
  p.r_b = (int)r_b;
  p.vector_inputs = aligned(x, 16) && aligned(v_a, 16) && x_stride * sizeof(T) % 16 == 0 && d_in * sizeof(T) % 16 == 0;
}

template <class T>
void set_outputs(SvdLora<T>& p, uintptr_t y, int64_t y_stride, uintptr_t u_b, int64_t u_b_row_stride,
                 int64_t u_b_column_stride, int64_t d_out, int64_t r_b) {
  p.y = reinterpret_cast<T*>(y);
  p.y_stride = y_stride;
  p.u_b = reinterpret_cast<const T*>(u_b);
  p.u_b_row_stride = u_b_row_stride;
  p.u_b_column_stride = u_b_column_stride;
  p.d_out = (int)d_out;
  p.r_b = (int)r_b;
  p.vector_ranks = aligned(u_b, 16) && u_b_column_stride == 1 && u_b_row_stride * sizeof(T) % 16 == 0 &&
                   r_b * sizeof(T) % 16 == 0;
  p.paired_columns = aligned(y, 2 * sizeof(T)) && y_stride % 2 == 0;
}

// Shared memory of a block, in floats: partial sums [slices, R, r_a], scaled [R, r_a], h [R, r_b], then R row owners.
struct Shared {
  int slices, scaled, h, members, total;
};

ESSA_HD Shared shared_layout(int rows_per_block, int r_a, int r_b, int warps) {
  const int groups = (r_a + kRanksPerWarp - 1) / kRanksPerWarp;
  Shared shared;
  shared.slices = warps > groups ? warps / groups : 1;
  shared.scaled = shared.slices * rows_per_block * r_a;
  shared.h = shared.scaled + rows_per_block * r_a;
  shared.members = shared.h + rows_per_block * r_b;
  shared.total = shared.members + rows_per_block;
  return shared;
}

ESSA_HD int smaller(int a, int b) { return a < b ? a : b; }

// Partial sums of V_A x over this block's part of d_in. A warp takes kRanksPerWarp rows of V_A for all R rows of x;
// warps that would be left over split d_in further, into slices.
template <int R, int V, class T, class Block>
ESSA_HD void project(const Block& block, const SvdLora<T>& p, int64_t row0, const Shared& shared) {
  const int lane = block.thread() % kWarp, warp = block.thread() / kWarp, warps = block.threads() / kWarp;
  const int groups = (p.r_a + kRanksPerWarp - 1) / kRanksPerWarp;
  const int packs = p.d_in / V, share = (packs + block.inner_parts() - 1) / block.inner_parts();
  const int begin = block.inner_part() * share, end = smaller(begin + share, packs);
  // Rows past the end repeat the last one, ranks likewise; their sums are never used.
  const Pack<T, V>* x[R];
  for (int r = 0; r < R; ++r) {
    const int64_t row = row0 + r < p.rows ? row0 + r : p.rows - 1;
    x[r] = reinterpret_cast<const Pack<T, V>*>(p.x + row * p.x_stride);
  }
  for (int unit = warp; unit < groups * shared.slices; unit += warps) {
    const int slice = unit / groups, rank0 = unit % groups * kRanksPerWarp;
    const Pack<T, V>* v_a[kRanksPerWarp];
    for (int g = 0; g < kRanksPerWarp; ++g)
      v_a[g] = reinterpret_cast<const Pack<T, V>*>(p.v_a + (int64_t)smaller(rank0 + g, p.r_a - 1) * p.d_in);
    float sum[R][kRanksPerWarp] = {};
    for (int k = begin + slice * kWarp + lane; k < end; k += shared.slices * kWarp) {
      Pack<T, V> input[R], vector[kRanksPerWarp];
      for (int r = 0; r < R; ++r) input[r] = x[r][k];
      for (int g = 0; g < kRanksPerWarp; ++g) vector[g] = v_a[g][k];
      for (int i = 0; i < V; ++i)
        for (int r = 0; r < R; ++r)
          for (int g = 0; g < kRanksPerWarp; ++g)
            sum[r][g] = noise::fma_rn(to_float(input[r].value[i]), to_float(vector[g].value[i]), sum[r][g]);
    }
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < kRanksPerWarp; ++g) {
        const float total = block.warp_sum(sum[r][g]);
        if (lane == 0 && rank0 + g < p.r_a) block.shared()[(slice * R + r) * p.r_a + rank0 + g] = total;
      }
  }
}

// Which member owns each of the R rows: exactly one group holds a row, empty groups hold none.
template <int R, class T, class Block>
ESSA_HD void find_members(const Block& block, const SvdLora<T>& p, int64_t row0, const Shared& shared) {
  int* owner = reinterpret_cast<int*>(block.shared() + shared.members);
  for (int m = block.thread(); m < p.members; m += block.threads()) {
    const int64_t begin = p.offsets[m], end = p.offsets[m + 1];
    for (int r = 0; r < R; ++r)
      if (begin <= row0 + r && row0 + r < end) owner[r] = m;
  }
}

// Partial sums of all parts -> h in this block's shared memory.
template <int R, class T, class Block>
ESSA_HD void finish_h(const Block& block, const SvdLora<T>& p, int64_t row0, const Shared& shared) {
  float* own = block.shared();
  // Offsets on a GPU are trusted, not checked: a row that none of them owns must not lead out of bounds.
  const unsigned* found = reinterpret_cast<const unsigned*>(own + shared.members);
  const auto owner = [&](int r) { return (int64_t)(found[r] < (unsigned)p.members ? found[r] : 0); };
  const int rows = p.rows - row0 < R ? (int)(p.rows - row0) : R;
  for (int i = block.thread(); i < rows * p.r_a; i += block.threads()) {
    float sum = 0.0f;
    for (int part = 0; part < block.inner_parts(); ++part) {
      const float* partial = block.shared_of(part);
      for (int slice = 0; slice < shared.slices; ++slice) sum += partial[slice * R * p.r_a + i];
    }
    own[shared.scaled + i] = sum * p.s_a[owner(i / p.r_a) * p.r_a + i % p.r_a];
  }
  block.sync();
  for (int i = block.thread(); i < rows * p.r_b; i += block.threads()) {
    const int r = i / p.r_b, j = i % p.r_b;
    const float* core = p.core + (int64_t)j * p.r_a;
    const float* scaled = own + shared.scaled + r * p.r_a;
    float sum = 0.0f;
    for (int a = 0; a < p.r_a; ++a) sum = noise::fma_rn(core[a], scaled[a], sum);
    own[shared.h + i] = sum * p.s_b[owner(r) * p.r_b + j];
  }
  block.sync();
}

template <int R, class T, class Block>
ESSA_HD void shrink(const Block& block, const SvdLora<T>& p, int64_t row0, const Shared& shared) {
  constexpr int kPack = 16 / sizeof(T);
  find_members<R>(block, p, row0, shared);
  if (p.vector_inputs)
    project<R, kPack>(block, p, row0, shared);
  else
    project<R, 1>(block, p, row0, shared);
  block.cluster_sync();
  finish_h<R>(block, p, row0, shared);
}

// y += U_B h for this block's columns, two columns per thread. h lies in shared memory, [R, r_b].
template <int R, int V, class T, class Block>
ESSA_HD void expand_columns(const Block& block, const SvdLora<T>& p, int64_t row0, const float* h) {
  const int share = (p.d_out + block.outer_parts() - 1) / block.outer_parts();
  const int width = (share + kColumnAlignment - 1) / kColumnAlignment * kColumnAlignment;
  const int64_t first = (int64_t)block.outer_part() * width;
  const int begin = first < p.d_out ? (int)first : p.d_out, end = smaller(begin + width, p.d_out);
  for (int column = begin + block.thread() * kColumnsPerThread; column < end;
       column += block.threads() * kColumnsPerThread) {
    const bool pair = column + 1 < end;
    Pack<T, 2> y[R];
    for (int r = 0; r < R; ++r) {
      if (row0 + r >= p.rows) continue;
      T* out = p.y + (row0 + r) * p.y_stride + column;
      if (p.paired_columns && pair) {
        y[r] = *reinterpret_cast<const Pack<T, 2>*>(out);
      } else {
        y[r].value[0] = out[0];
        y[r].value[1] = pair ? out[1] : out[0];
      }
    }
    const T* left = p.u_b + column * p.u_b_row_stride;
    const T* right = pair ? left + p.u_b_row_stride : left;
    float delta[R][kColumnsPerThread] = {};
    for (int j = 0; j < p.r_b; j += V) {
      const int64_t at = V == 1 ? j * p.u_b_column_stride : j;
      const Pack<T, V> u0 = *reinterpret_cast<const Pack<T, V>*>(left + at);
      const Pack<T, V> u1 = *reinterpret_cast<const Pack<T, V>*>(right + at);
      for (int i = 0; i < V; ++i)
        for (int r = 0; r < R; ++r) {
          delta[r][0] = noise::fma_rn(h[r * p.r_b + j + i], to_float(u0.value[i]), delta[r][0]);
          delta[r][1] = noise::fma_rn(h[r * p.r_b + j + i], to_float(u1.value[i]), delta[r][1]);
        }
    }
    for (int r = 0; r < R; ++r) {
      if (row0 + r >= p.rows) continue;
      T* out = p.y + (row0 + r) * p.y_stride + column;
      Pack<T, 2> sum;
      for (int c = 0; c < kColumnsPerThread; ++c) from_float(to_float(y[r].value[c]) + delta[r][c], sum.value[c]);
      if (p.paired_columns && pair) {
        *reinterpret_cast<Pack<T, 2>*>(out) = sum;
      } else {
        out[0] = sum.value[0];
        if (pair) out[1] = sum.value[1];
      }
    }
  }
}

template <int R, class T, class Block>
ESSA_HD void expand(const Block& block, const SvdLora<T>& p, int64_t row0, const float* h) {
  constexpr int kPack = 16 / sizeof(T);
  if (p.vector_ranks)
    expand_columns<R, kPack>(block, p, row0, h);
  else
    expand_columns<R, 1>(block, p, row0, h);
}

template <int R, class T, class Block>
ESSA_HD void svd_lora_block(const Block& block, const SvdLora<T>& p) {
  const int64_t row0 = block.row_block() * R;
  const Shared shared = shared_layout(R, p.r_a, p.r_b, block.threads() / kWarp);
  shrink<R>(block, p, row0, shared);
  block.cluster_arrive();  // after this, no thread of this block reads another block's shared memory
  expand<R>(block, p, row0, block.shared() + shared.h);
  block.cluster_wait();  // a block may not leave while others still read its partial sums
}

template <int R, class T, class Block>
ESSA_HD void svd_lora_shrink_block(const Block& block, const SvdLora<T>& p) {
  const int64_t row0 = block.row_block() * R;
  const Shared shared = shared_layout(R, p.r_a, p.r_b, block.threads() / kWarp);
  shrink<R>(block, p, row0, shared);
  block.cluster_arrive();
  if (block.inner_part() == 0)
    for (int i = block.thread(); i < R * p.r_b; i += block.threads())
      if (row0 + i / p.r_b < p.rows)
        p.h[(row0 + i / p.r_b) * p.h_stride + i % p.r_b] = block.shared()[shared.h + i];
  block.cluster_wait();
}

template <int R, class T, class Block>
ESSA_HD void svd_lora_expand_block(const Block& block, const SvdLora<T>& p) {
  const int64_t row0 = block.row_block() * R;
  float* h = block.shared();
  for (int i = block.thread(); i < R * p.r_b; i += block.threads()) {
    const int64_t row = row0 + i / p.r_b;
    h[i] = row < p.rows ? p.h[row * p.h_stride + i % p.r_b] : 0.0f;
  }
  block.sync();
  expand<R>(block, p, row0, h);
}

}  // namespace cuda
}  // namespace essa
