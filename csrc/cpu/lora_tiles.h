// The two products of a low-rank adapter, for rows that may lie anywhere.
//
// Shrink is a block of dot products along a row, straight from rows and factor in their own dtypes. Expand packs a panel
// of the factor, as many columns as stay in L2 (rank-major, fp32), walks a few rows of y at a time along it, so that y
// streams, and keeps a rows x columns tile of y in registers. A row's arithmetic does not depend on the rows beside it.
#pragma once
#include <type_traits>

#include "kernels.h"
#include "simd.h"
#include "storage.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {

// How a dtype is read, and what one step of a dot product is. A pack holds `kStep` elements in an order that is the
// same for rows and factor.
struct Float32 : Storage<kFloat32> {
  typedef Element FactorElement;
  typedef vf Pack;
  static constexpr int kStep = W;
  ESSA_INLINE Pack pack(const Element* p) { return load(p); }
  ESSA_INLINE vf dot(Pack a, Pack b, vf sum) { return muladd(a, b, sum); }
  ESSA_INLINE float get1(Element e) { return e; }
};

struct Float16 : Storage<kFloat16> {
  typedef Element FactorElement;
  typedef vf Pack;
  static constexpr int kStep = W;
  ESSA_INLINE Pack pack(const Element* p) { return load_fp16(p); }
  ESSA_INLINE vf dot(Pack a, Pack b, vf sum) { return muladd(a, b, sum); }
  ESSA_INLINE float get1(Element e) {
    alignas(64) Element lanes[W] = {e};
    alignas(64) float values[W];
    store(values, load_fp16(lanes));
    return values[0];
  }
};

struct BFloat16 : Storage<kBFloat16> {
  typedef Element FactorElement;
  static constexpr int kStep = 2 * W;
#if defined(__AVX512BF16__)
  typedef __m512bh Pack;
  ESSA_INLINE Pack pack(const Element* p) { return (__m512bh)_mm512_loadu_si512(p); }
  ESSA_INLINE vf dot(Pack a, Pack b, vf sum) { return _mm512_dpbf16_ps(sum, a, b); }
#else
  // Even and odd elements apart: one shift and one mask widen two vectors.
  struct Pack {
    vf even, odd;
  };
  ESSA_INLINE Pack pack(const Element* p) {
    vi both;
    __builtin_memcpy(&both, p, sizeof(both));
    return Pack{as_float(shl<16>(both)), as_float(andi(both, seti(0xffff0000u)))};
  }
  ESSA_INLINE vf dot(Pack a, Pack b, vf sum) { return muladd(a.odd, b.odd, muladd(a.even, b.even, sum)); }
#endif
  ESSA_INLINE float get1(Element e) {
    const uint32_t bits = (uint32_t)e << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
};

// Rows of T, an fp32 factor.
template <class T>
struct Widened : T {
  typedef float FactorElement;
  typedef vf Pack;
  static constexpr int kStep = W;
  ESSA_INLINE Pack pack(const typename T::Element* p) { return T::get(p); }
  ESSA_INLINE Pack pack(const float* p) { return load(p); }
  ESSA_INLINE vf dot(Pack a, Pack b, vf sum) { return muladd(a, b, sum); }
};

// Where rows lie: at one stride, or wherever a list says.
template <class Element>
struct Strided {
  Element* first;
  int64_t stride;
  Element* operator()(int64_t i) const { return first + i * stride; }
  Strided from(int64_t i) const { return {first + i * stride, stride}; }
};

template <class Element>
struct Listed {
  Element* all;
  int64_t stride;
  const int64_t* rows;  // and kRowsAhead more behind the last
  Element* operator()(int64_t i) const { return all + rows[i] * stride; }
  Listed from(int64_t i) const { return {all, stride, rows + i}; }
};

// --- shrink: t[i, k] = sum_d x[i, d] f[k, d] ---------------------------------------------------------------------

constexpr int kShrinkRows = 3;
constexpr int kShrinkRanks = W == 16 ? 8 : 4;

template <class T, int M, int K, class Rows>
ESSA_INLINE void shrink_tile(Rows x, const typename T::FactorElement* f, int64_t d, float* t, int64_t t_stride) {
  typedef typename T::Element Element;
  typedef typename T::FactorElement FactorElement;
  vf sums[M][K];
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) sums[i][k] = zero();

  const auto step = [&](const Element* const* xs, int64_t at, const FactorElement* fs, int64_t fs_stride) {
    typename T::Pack a[M];
    for (int i = 0; i < M; ++i) a[i] = T::pack(xs[i] + at);
    for (int k = 0; k < K; ++k) {
      const typename T::Pack b = T::pack(fs + k * fs_stride);
      for (int i = 0; i < M; ++i) sums[i][k] = T::dot(a[i], b, sums[i][k]);
    }
  };
  const Element *rows[M], *ahead[M];
  for (int i = 0; i < M; ++i) rows[i] = x(i), ahead[i] = x(M + i);
  int64_t at = 0;
  for (; at + T::kStep <= d; at += T::kStep) {
    for (int i = 0; i < M; ++i) prefetch(ahead[i] + at);
    step(rows, at, f + at, d);
  }
  if (at < d) {
    Element x_tail[M][T::kStep] = {};
    FactorElement f_tail[K][T::kStep] = {};
    for (int i = 0; i < M; ++i) {
      __builtin_memcpy(x_tail[i], rows[i] + at, (d - at) * sizeof(Element));
      rows[i] = x_tail[i];
    }
    for (int k = 0; k < K; ++k) __builtin_memcpy(f_tail[k], f + k * d + at, (d - at) * sizeof(FactorElement));
    step(rows, 0, f_tail[0], T::kStep);
  }
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) t[i * t_stride + k] = sum(sums[i][k]);
}

template <class T, int M, class Rows>
void shrink_rows(Rows x, const typename T::FactorElement* f, int64_t ranks, int64_t d, float* t, int64_t t_stride) {
  int64_t k = 0;
  for (; k + kShrinkRanks <= ranks; k += kShrinkRanks)
    shrink_tile<T, M, kShrinkRanks>(x, f + k * d, d, t + k, t_stride);
  if (kShrinkRanks > 4 && k + 4 <= ranks) {
    shrink_tile<T, M, 4>(x, f + k * d, d, t + k, t_stride);
    k += 4;
  }
  for (; k < ranks; ++k) shrink_tile<T, M, 1>(x, f + k * d, d, t + k, t_stride);
}

// f is [ranks, d], contiguous.
template <class T, class Rows>
void shrink(Rows x, int64_t rows, const typename T::FactorElement* f, int64_t ranks, int64_t d, float* t, int64_t t_stride) {
  int64_t i = 0;
  for (; i + kShrinkRows <= rows; i += kShrinkRows)
    shrink_rows<T, kShrinkRows>(x.from(i), f, ranks, d, t + i * t_stride, t_stride);
  for (; i < rows; ++i) shrink_rows<T, 1>(x.from(i), f, ranks, d, t + i * t_stride, t_stride);
}

// --- expand: y[i, j] += sum_k h[i, k] f[j, k] ----------------------------------------------------------------------

constexpr int kExpandRows = W == 16 ? 6 : 4;
constexpr int kExpandVectors = W == 16 ? 4 : (W == 8 ? 3 : 2);
constexpr int kExpandColumns = kExpandVectors * W;
constexpr int kRowsAhead = kExpandRows > kShrinkRows ? kExpandRows : kShrinkRows;  // that are prefetched

constexpr int64_t kPanelFloats = 1 << 15;

// A factor [columns, ranks]; either dimension may be the contiguous one.
template <class Element>
struct Factor {
  const Element* first;
  int64_t columns, ranks, column_stride, rank_stride;
};

// W columns of a factor, rank-contiguous and without gaps, as `ranks` vectors. bfloat16 goes through the transposes as
// pairs of ranks, where these come in eights.
template <class P>
ESSA_INLINE void pack_dense(const typename P::Element* f, int64_t ranks, float* packed) {
  constexpr int64_t kRanks = 64;
  alignas(64) float widened[W * kRanks];
  const auto transposed = [&](const float* columns, int64_t k, int64_t stride, auto put) {
    vf m[4];
    for (int q = 0; q < 4; ++q) m[q] = load_lanes(columns + q * stride + k, 4 * stride);
    transpose_lanes(m);
    for (int q = 0; q < 4; ++q) put(q, m[q]);
  };
  if (std::is_same<P, BFloat16>::value && ranks % 8 == 0) {
    for (int64_t k = 0; k < ranks; k += 8)
      transposed((const float*)f, k / 2, ranks / 2, [&](int q, vf pairs) {
        float* pair = packed + (k + 2 * q) * kExpandColumns;
        store(pair, as_float(shl<16>(as_int(pairs))));
        store(pair + kExpandColumns, as_float(andi(as_int(pairs), seti(0xffff0000u))));
      });
    return;
  }
  const float* columns = (const float*)f;
  if (!std::is_same<P, Float32>::value) {
    for (int64_t n = 0; n < ranks * W; n += W) store(widened + n, P::get(f + n));
    columns = widened;
  }
  for (int64_t k = 0; k < ranks; k += 4)
    transposed(columns, k, ranks, [&](int q, vf values) { store(packed + (k + q) * kExpandColumns, values); });
}

// packed [ranks, kExpandColumns]: column j and the next of the factor; beyond `columns` zero
template <class P>
void pack(const Factor<typename P::Element>& f, int64_t j, int64_t columns, float* packed) {
  const typename P::Element* from = f.first + j * f.column_stride;
  if (columns == kExpandColumns && f.column_stride == 1) {
    for (int64_t k = 0; k < f.ranks; ++k)
      for (int n = 0; n < kExpandColumns; n += W)
        store(packed + k * kExpandColumns + n, P::get(from + k * f.rank_stride + n));
    return;
  }
  const bool dense = f.rank_stride == 1 && f.column_stride == f.ranks;
  if (columns == kExpandColumns && dense && f.ranks % 4 == 0 && f.ranks <= 64) {
    for (int n = 0; n < kExpandColumns; n += W) pack_dense<P>(from + n * f.ranks, f.ranks, packed + n);
    return;
  }
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t k = 0; k < f.ranks; ++k)
      packed[k * kExpandColumns + n] = P::get1(from[n * f.column_stride + k * f.rank_stride]);
  for (int64_t n = columns; n < kExpandColumns; ++n)
    for (int64_t k = 0; k < f.ranks; ++k) packed[k * kExpandColumns + n] = 0.0f;
}

// panel: `columns` columns from column `at` on, packed block by block
template <class P>
void pack_panel(const Factor<typename P::Element>& f, int64_t at, int64_t columns, float* panel) {
  for (int64_t j = 0; j < columns; j += kExpandColumns)
    pack<P>(f, at + j, columns - j < kExpandColumns ? columns - j : kExpandColumns, panel + j * f.ranks);
}

template <class T, int M, class Rows>
ESSA_INLINE void expand_tile(const float* h, int64_t h_stride, const float* packed, int64_t ranks, Rows y, int64_t at,
                             int64_t columns) {
  typedef typename T::Element Element;
  vf sums[M][kExpandVectors];
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = zero();
  for (int64_t k = 0; k < ranks; ++k) {
    vf f[kExpandVectors];
    for (int n = 0; n < kExpandVectors; ++n) f[n] = load(packed + k * kExpandColumns + n * W);
    for (int i = 0; i < M; ++i) {
      const vf a = set1(h[i * h_stride + k]);
      for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = muladd(a, f[n], sums[i][n]);
    }
  }
  for (int i = 0; i < M; ++i) {
    Element* row = y(i) + at;
    if (columns >= kExpandColumns) {
      for (int n = 0; n < kExpandVectors; ++n) T::put(row + n * W, add(T::get(row + n * W), sums[i][n]));
      for (int byte = 0; byte < kExpandColumns * (int)sizeof(Element); byte += 64)
        prefetch((const char*)(y(M + i) + at) + byte);
      continue;
    }
    Element edge[kExpandColumns] = {};
    __builtin_memcpy(edge, row, columns * sizeof(Element));
    for (int n = 0; n < kExpandVectors; ++n) T::put(edge + n * W, add(T::get(edge + n * W), sums[i][n]));
    __builtin_memcpy(row, edge, columns * sizeof(Element));
  }
}

// M rows of y along a panel that begins at column `at`.
template <class T, int M, class Rows>
void expand_rows(const float* h, int64_t h_stride, const float* panel, int64_t ranks, Rows y, int64_t at,
                 int64_t columns) {
  for (int64_t j = 0; j < columns; j += kExpandColumns, panel += ranks * kExpandColumns)
    expand_tile<T, M>(h, h_stride, panel, ranks, y, at + j, columns - j);
}

inline int64_t panel_columns(int64_t columns, int64_t ranks) {
  const int64_t blocks = kPanelFloats / (ranks * kExpandColumns);
  const int64_t fit = (blocks > 1 ? blocks : 1) * kExpandColumns, all = round_up(columns, kExpandColumns);
  return fit < all ? fit : all;
}

// panel is room for panel_columns(columns, ranks) columns.
template <class T, class P, class Rows>
void expand(Rows y, int64_t rows, const float* h, int64_t h_stride, const Factor<typename P::Element>& f,
            float* panel) {
  const int64_t width = panel_columns(f.columns, f.ranks);
  for (int64_t at = 0; at < f.columns; at += width) {
    const int64_t columns = f.columns - at < width ? f.columns - at : width;
    pack_panel<P>(f, at, columns, panel);
    int64_t i = 0;
    const auto take = [&](auto count) {
      expand_rows<T, count()>(h + i * h_stride, h_stride, panel, f.ranks, y.from(i), at, columns);
      i += count();
    };
    while (i + kExpandRows <= rows) take(std::integral_constant<int, kExpandRows>());
    while (i + 2 <= rows) take(std::integral_constant<int, 2>());
    if (i < rows) take(std::integral_constant<int, 1>());
  }
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
