// The products of members' rows with small matrices that are made where they are used: shrink takes rows of x to h
// [rows, rank], expand adds h to rows of y. The matrices are fp32 and rank-major, [rank, columns].
#pragma once
#include <type_traits>

#include "kernels.h"
#include "noise_tiles.h"
#include "storage.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {

// --- shrink: h[i, k] += sum_d x[i, d] m[k, d] ----------------------------------------------------------------------

// m holds zeros or finite values up to a multiple of W.
template <class T, int M, int K>
ESSA_INLINE void shrink_tile(const typename T::Element* x, int64_t x_stride, const float* m, int64_t m_stride,
                             int64_t d, float* h, int64_t h_stride) {
  typedef typename T::Element Element;
  vf sums[M][K];
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) sums[i][k] = zero();

  const auto step = [&](const Element* xs, int64_t xs_stride, const float* ms) {
    vf values[M];
    for (int i = 0; i < M; ++i) values[i] = T::get(xs + i * xs_stride);
    for (int k = 0; k < K; ++k) {
      const vf factor = load(ms + k * m_stride);
      for (int i = 0; i < M; ++i) sums[i][k] = muladd(values[i], factor, sums[i][k]);
    }
  };
  int64_t at = 0;
  for (; at + W <= d; at += W) {
    for (int i = 0; i < M; ++i) prefetch(x + (M + i) * x_stride + at);
    step(x + at, x_stride, m + at);
  }
  if (at < d) {
    Element tail[M][W] = {};
    for (int i = 0; i < M; ++i) __builtin_memcpy(tail[i], x + i * x_stride + at, (d - at) * sizeof(Element));
    step(tail[0], W, m + at);
  }
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) h[i * h_stride + k] += sum(sums[i][k]);
}

// For the ranks that begin at h, of rows [first, first + rows) and some columns of x.
template <class T, int K>
void shrink_ranks(const PerturbedArgs& args, int64_t first, int64_t rows, int64_t column, int64_t columns,
                  const float* m, int64_t m_stride, float* h) {
  const typename T::Element* x = (const typename T::Element*)args.x + first * args.x_stride + column;
  h += first * args.rank;
  for (; rows >= 4; rows -= 4, x += 4 * args.x_stride, h += 4 * args.rank)
    shrink_tile<T, 4, K>(x, args.x_stride, m, m_stride, columns, h, args.rank);
  if (rows == 3) shrink_tile<T, 3, K>(x, args.x_stride, m, m_stride, columns, h, args.rank);
  if (rows == 2) shrink_tile<T, 2, K>(x, args.x_stride, m, m_stride, columns, h, args.rank);
  if (rows == 1) shrink_tile<T, 1, K>(x, args.x_stride, m, m_stride, columns, h, args.rank);
}

template <class T>
void shrink_rows(const PerturbedArgs& args, int64_t first, int64_t rows, int64_t column, int64_t columns,
                 const float* m, int64_t m_stride, int64_t ranks, float* h) {
  int64_t k = 0;
  for (; k + 4 <= ranks; k += 4)
    shrink_ranks<T, 4>(args, first, rows, column, columns, m + k * m_stride, m_stride, h + k);
  for (; k < ranks; ++k) shrink_ranks<T, 1>(args, first, rows, column, columns, m + k * m_stride, m_stride, h + k);
}

// h = to(h, whether it is the odd member's) for a pair's rows and some ranks.
template <class To>
ESSA_INLINE void set_h(const PerturbedArgs& args, const PairRows& pair, float* h, int64_t ranks, To to) {
  for (int sign = 0; sign < 2; ++sign)
    for (int64_t i = pair.first[sign]; i < pair.first[sign] + pair.rows[sign]; ++i)
      for (int64_t k = 0; k < ranks; ++k) h[i * args.rank + k] = to(h[i * args.rank + k], sign);
}

// --- expand: y[i, j] += sum_k h[i, k] m[k, j] ----------------------------------------------------------------------

constexpr int kExpandVectors = W == 16 ? 4 : 2;
constexpr int kExpandColumns = kExpandVectors * W;

// kExpandColumns columns of M rows, which stay in registers.
template <class T, int M>
ESSA_INLINE void expand_tile(const float* h, const float* m, int64_t m_stride, int64_t rank,
                             typename T::Element* y, int64_t y_stride) {
  vf sums[M][kExpandVectors];
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = T::get(y + i * y_stride + n * W);
  for (int64_t k = 0; k < rank; ++k) {
    vf factors[kExpandVectors];
    for (int n = 0; n < kExpandVectors; ++n) factors[n] = load(m + k * m_stride + n * W);
    for (int i = 0; i < M; ++i) {
      const vf value = set1(h[i * rank + k]);
      for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = muladd(value, factors[n], sums[i][n]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kExpandVectors; ++n) T::put(y + i * y_stride + n * W, sums[i][n]);
}

// M rows of y along a piece of m.
template <class T, int M>
void expand_line(const float* h, const float* m, int64_t m_stride, int64_t rank, typename T::Element* y,
                 int64_t y_stride, int64_t columns) {
  typedef typename T::Element Element;
  for (; columns >= kExpandColumns; columns -= kExpandColumns, m += kExpandColumns, y += kExpandColumns) {
    for (int i = 0; i < M; ++i)
      for (int byte = 0; byte < kExpandColumns * (int)sizeof(Element); byte += 64)
        prefetch((const char*)(y + (M + i) * y_stride) + byte);
    expand_tile<T, M>(h, m, m_stride, rank, y, y_stride);
  }
  if (columns == 0) return;
  Element edge[M][kExpandColumns] = {};
  for (int i = 0; i < M; ++i) __builtin_memcpy(edge[i], y + i * y_stride, columns * sizeof(Element));
  expand_tile<T, M>(h, m, m_stride, rank, edge[0], kExpandColumns);
  for (int i = 0; i < M; ++i) __builtin_memcpy(y + i * y_stride, edge[i], columns * sizeof(Element));
}

// m has whole groups of kExpandColumns columns.
template <class T>
void expand_rows(const PerturbedArgs& args, int64_t first, int64_t rows, int64_t column, int64_t columns,
                 const float* m, int64_t m_stride) {
  const float* h = args.h + first * args.rank;
  typename T::Element* y = (typename T::Element*)args.y + first * args.y_stride + column;
  const auto tiles = [&](auto count) {
    expand_line<T, decltype(count)::value>(h, m, m_stride, args.rank, y, args.y_stride, columns);
    h += count * args.rank;
    y += count * args.y_stride;
    rows -= count;
  };
  while (rows >= 4) tiles(std::integral_constant<int, 4>());
  if (rows == 3) tiles(std::integral_constant<int, 3>());
  if (rows == 2) tiles(std::integral_constant<int, 2>());
  if (rows == 1) tiles(std::integral_constant<int, 1>());
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
