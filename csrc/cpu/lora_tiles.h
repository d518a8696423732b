// The two products of a low-rank adapter, for rows that may lie anywhere.
//
// Shrink is a block of dot products along a row, straight from rows and factor in their own dtypes. Expand packs a panel
// of the factor, as many columns as stay in L2 (rank-major), walks a few rows of y at a time along it, so that y streams,
// and keeps a rows x columns tile of y in registers. A row's arithmetic does not depend on the rows beside it.
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
  struct Pack {
    vf even, odd;
  };
  ESSA_INLINE Pack pack(const Element* p) {
    Pack pack;
    load_bf16_even_odd(p, &pack.even, &pack.odd);
    return pack;
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
constexpr int64_t kShrinkBytes = 28 << 10;  // of the factor at a time: they stay in L1 from one tile of rows to the next

// Elements [at, at + d) of rows and factor, which has factor_d of them; t is added to where at > 0.
template <class T, int M, int K, class Rows>
ESSA_INLINE void shrink_tile(Rows x, const typename T::FactorElement* f, int64_t factor_d, int64_t at, int64_t d,
                             float* t, int64_t t_stride) {
  typedef typename T::Element Element;
  typedef typename T::FactorElement FactorElement;
  vf sums[M][K];
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) sums[i][k] = zero();

  const auto step = [&](const Element* const* xs, int64_t j, const FactorElement* fs, int64_t fs_stride) {
    typename T::Pack a[M];
    for (int i = 0; i < M; ++i) a[i] = T::pack(xs[i] + j);
    for (int k = 0; k < K; ++k) {
      const typename T::Pack b = T::pack(fs + k * fs_stride);
      for (int i = 0; i < M; ++i) sums[i][k] = T::dot(a[i], b, sums[i][k]);
    }
  };
  const Element *rows[M], *ahead[M];
  for (int i = 0; i < M; ++i) rows[i] = x(i) + at, ahead[i] = x(M + i) + at;
  f += at;
  int64_t j = 0;
  for (; j + T::kStep <= d; j += T::kStep) {
    for (int i = 0; i < M; ++i) prefetch(ahead[i] + j);
    step(rows, j, f + j, factor_d);
  }
  if (j < d) {
    Element x_tail[M][T::kStep] = {};
    FactorElement f_tail[K][T::kStep] = {};
    for (int i = 0; i < M; ++i) {
      __builtin_memcpy(x_tail[i], rows[i] + j, (d - j) * sizeof(Element));
      rows[i] = x_tail[i];
    }
    for (int k = 0; k < K; ++k)
      __builtin_memcpy(f_tail[k], f + k * factor_d + j, (d - j) * sizeof(FactorElement));
    step(rows, 0, f_tail[0], T::kStep);
  }
  for (int i = 0; i < M; ++i) {
    float parts[K];
    store_sums<K>(sums[i], parts);
    for (int k = 0; k < K; ++k) t[i * t_stride + k] = at == 0 ? parts[k] : t[i * t_stride + k] + parts[k];
  }
}

template <class T, int M, class Rows>
void shrink_rows(Rows x, const typename T::FactorElement* f, int64_t ranks, int64_t factor_d, int64_t at, int64_t d,
                 float* t, int64_t t_stride) {
  int64_t k = 0;
  for (; k + kShrinkRanks <= ranks; k += kShrinkRanks)
    shrink_tile<T, M, kShrinkRanks>(x, f + k * factor_d, factor_d, at, d, t + k, t_stride);
  if (kShrinkRanks > 4 && k + 4 <= ranks) {
    shrink_tile<T, M, 4>(x, f + k * factor_d, factor_d, at, d, t + k, t_stride);
    k += 4;
  }
  for (; k < ranks; ++k) shrink_tile<T, M, 1>(x, f + k * factor_d, factor_d, at, d, t + k, t_stride);
}

// f is [ranks, d], contiguous.
template <class T, class Rows>
void shrink(Rows x, int64_t rows, const typename T::FactorElement* f, int64_t ranks, int64_t d, float* t, int64_t t_stride) {
  const int64_t parts = blocks(d, kShrinkBytes / (kShrinkRanks * (int64_t)sizeof(*f)));
  const int64_t part = round_up(blocks(d, parts), T::kStep);
  for (int64_t at = 0; at < d; at += part) {
    const int64_t length = d - at < part ? d - at : part;
    int64_t i = 0;
    for (; i + kShrinkRows <= rows; i += kShrinkRows)
      shrink_rows<T, kShrinkRows>(x.from(i), f, ranks, d, at, length, t + i * t_stride, t_stride);
    for (; i < rows; ++i) shrink_rows<T, 1>(x.from(i), f, ranks, d, at, length, t + i * t_stride, t_stride);
  }
}

// --- expand: y[i, j] += sum_k h[i, k] f[j, k] ----------------------------------------------------------------------

constexpr int kExpandRows = W == 16 ? 6 : 4;
constexpr int kExpandVectors = W == 16 ? 4 : (W == 8 ? 3 : 2);
constexpr int kExpandColumns = kExpandVectors * W;
constexpr int kRowsAhead = kExpandRows > kShrinkRows ? kExpandRows : kShrinkRows;  // that are prefetched

constexpr int64_t kPanelFloats = 1 << 15;
constexpr int64_t kPanelFloatsOfFewRows = 1 << 12;  // which use a panel once: it stays in L1

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

inline int64_t panel_columns(int64_t columns, int64_t words, int64_t floats = kPanelFloats) {
  const int64_t blocks = floats / (words * kExpandColumns);
  const int64_t fit = (blocks > 1 ? blocks : 1) * kExpandColumns, all = round_up(columns, kExpandColumns);
  return fit < all ? fit : all;
}

// Rows of h as a tile takes them.
struct Lines {
  const float* first;
  int64_t stride;
};

// Tiles of y += h f^T, rows of T and a factor of P, in fp32. A column of the packed factor has so many `words`.
template <class T, class P>
struct WideTiles {
  ESSA_INLINE int64_t words(int64_t ranks) { return ranks; }
  ESSA_INLINE Lines lines(const float* h, int64_t h_stride, int, int64_t, float*) { return {h, h_stride}; }
  ESSA_INLINE void pack_columns(const Factor<typename P::Element>& f, int64_t j, int64_t columns, float* packed) {
    pack<P>(f, j, columns, packed);
  }

  template <int M, class Rows>
  ESSA_INLINE void tile(Lines h, const float* packed, int64_t ranks, Rows y, int64_t at) {
    vf sums[M][kExpandVectors];
    for (int i = 0; i < M; ++i)
      for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = zero();
    for (int64_t k = 0; k < ranks; ++k) {
      vf f[kExpandVectors];
      for (int n = 0; n < kExpandVectors; ++n) f[n] = load(packed + k * kExpandColumns + n * W);
      for (int i = 0; i < M; ++i) {
        const vf a = set1(h.first[i * h.stride + k]);
        for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = muladd(a, f[n], sums[i][n]);
      }
    }
    for (int i = 0; i < M; ++i) {
      typename T::Element* row = y(i) + at;
      for (int n = 0; n < kExpandVectors; ++n) T::put(row + n * W, add(T::get(row + n * W), sums[i][n]));
    }
  }
};

template <class T, class P>
struct Tiles : WideTiles<T, P> {};

#if defined(__AVX512BF16__)
// The machine multiplies pairs of bfloat16. So h is split in two of them, which leaves 2^-17 of it, and the factor stays
// as it is: half the cache, no widening. Lanes hold every other column, so that y is widened by a shift and by a mask.
template <>
struct Tiles<BFloat16, BFloat16> {
  ESSA_INLINE int64_t words(int64_t ranks) { return (ranks + 1) / 2; }

  // [words, rows]: a pair of leading halves and the pair of what they leave
  ESSA_INLINE Lines lines(const float* h, int64_t h_stride, int rows, int64_t ranks, float* room) {
    const vi in_turn = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    for (int i = 0; i < rows; ++i)
      for (int64_t k = 0; k < ranks; k += W) {
        const vf all = _mm512_maskz_loadu_ps(lanes_left(ranks - k), h + i * h_stride + k);
        const __m256i lead = (__m256i)_mm512_cvtneps_pbh(all);
        const vf widened = as_float(shl<16>(_mm512_cvtepu16_epi32(lead)));
        const __mmask16 unbounded = _mm512_fpclass_ps_mask(widened, 0x99);  // NaN or infinite: nothing is left
        const __m256i rest = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_sub_ps(~unbounded, all, widened));
        alignas(64) float pairs[W];
        const vi both = _mm512_inserti64x4(_mm512_castsi256_si512(lead), rest, 1);
        store(pairs, as_float(_mm512_permutexvar_epi32(in_turn, both)));
        for (int64_t n = 0; n < W && k + n < ranks; n += 2)
          __builtin_memcpy(room + (k + n) * rows + 2 * i, pairs + n, 2 * sizeof(float));
      }
    return {room, 0};
  }

  // packed [words, kExpandColumns]: of 32 columns the even ones, then the odd ones; beyond `columns` zero
  ESSA_INLINE void pack_columns(const Factor<uint16_t>& f, int64_t j, int64_t columns, float* packed) {
    const uint16_t* from = f.first + j * f.column_stride;
    for (int64_t n = 0; n < kExpandColumns; n += 2 * W)
      if (f.column_stride == 1) pack_rank_major(f, from + n, columns - n, packed + n);
      else if (columns < kExpandColumns || f.ranks % 8 != 0)
        pack_column_major<false>(f, from + n * f.column_stride, columns - n, packed + n);
      else pack_column_major<true>(f, from + n * f.column_stride, columns - n, packed + n);
  }

  ESSA_INLINE void pack_rank_major(const Factor<uint16_t>& f, const uint16_t* from, int64_t columns, float* packed) {
    const __mmask32 valid = columns >= 32 ? ~0u : columns > 0 ? (1u << columns) - 1 : 0;
    for (int64_t k = 0; k < f.ranks; k += 2, packed += kExpandColumns) {
      const vi first = _mm512_maskz_loadu_epi16(valid, from + k * f.rank_stride);
      const vi second = _mm512_maskz_loadu_epi16(k + 1 < f.ranks ? valid : 0, from + (k + 1) * f.rank_stride);
      store(packed, as_float(ori(andi(first, seti(0xffff)), shl<16>(second))));
      store(packed + W, as_float(ori(shr<16>(first), andi(second, seti(0xffff0000u)))));
    }
  }

  template <bool kWhole>
  static void pack_column_major(const Factor<uint16_t>& f, const uint16_t* from, int64_t columns, float* packed) {
    const vi even = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const vi odd = addi(even, seti(4));
    for (int64_t k = 0; k < f.ranks; k += 8, packed += 4 * kExpandColumns) {
      const int64_t left = f.ranks - k;
      const __mmask8 valid = left >= 8 ? 0xff : (1 << left) - 1;
      const auto column = [&](int64_t n) {
        const uint16_t* ranks = from + n * f.column_stride + k;
        if (kWhole) return _mm_loadu_si128((const __m128i*)ranks);
        return _mm_maskz_loadu_epi16(n < columns ? valid : 0, ranks);
      };
      const auto four = [&](int64_t n) {
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(column(n)), column(n + 1), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(column(n + 2)), column(n + 3), 1);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      };
      vi evens[4], odds[4];
      for (int q = 0; q < 4; ++q) {
        const vi low = four(8 * q), high = four(8 * q + 4);
        evens[q] = _mm512_permutex2var_epi32(low, even, high);
        odds[q] = _mm512_permutex2var_epi32(low, odd, high);
      }
      exchange_lanes(evens), exchange_lanes(odds);
      for (int64_t p = 0; p < 4 && 2 * p < left; ++p) {
        store(packed + p * kExpandColumns, as_float(evens[p]));
        store(packed + p * kExpandColumns + W, as_float(odds[p]));
      }
    }
  }

  template <int M, class Rows>
  ESSA_INLINE void tile(Lines h, const float* packed, int64_t ranks, Rows y, int64_t at) {
    vf sums[M][kExpandVectors];
    for (int i = 0; i < M; ++i)
      for (int n = 0; n < kExpandVectors; n += 2) load_bf16_even_odd(y(i) + at + n * W, &sums[i][n], &sums[i][n + 1]);
    for (int64_t p = 0; p < words(ranks); ++p) {
      __m512bh f[kExpandVectors];
      for (int n = 0; n < kExpandVectors; ++n) f[n] = (__m512bh)load(packed + p * kExpandColumns + n * W);
      for (int i = 0; i < M; ++i) {
        const float* pairs = h.first + 2 * (p * M + i);
        const __m512bh lead = (__m512bh)set1(pairs[0]), rest = (__m512bh)set1(pairs[1]);
        for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = _mm512_dpbf16_ps(sums[i][n], f[n], lead);
        for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = _mm512_dpbf16_ps(sums[i][n], f[n], rest);
      }
    }
    const vi in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                        5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < M; ++i)
      for (int n = 0; n < kExpandVectors; n += 2) {
        const vi rounded = (vi)_mm512_cvtne2ps_pbh(sums[i][n + 1], sums[i][n]);
        _mm512_storeu_si512(y(i) + at + n * W, _mm512_permutexvar_epi16(in_turn, rounded));
      }
  }
};
#endif

// M rows of y along a panel that begins at column `at`.
template <class Tile, class Element, int M, class Rows>
void expand_rows(Lines h, const float* panel, int64_t ranks, Rows y, int64_t at, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kExpandColumns, panel += Tile::words(ranks) * kExpandColumns) {
    if (columns - j >= kExpandColumns) {
      Tile::template tile<M>(h, panel, ranks, y, at + j);
      for (int i = 0; i < M; ++i)
        for (int byte = 0; byte < kExpandColumns * (int)sizeof(Element); byte += 64)
          prefetch((const char*)(y(M + i) + at + j) + byte);
      continue;
    }
    Element edge[M][kExpandColumns] = {};
    for (int i = 0; i < M; ++i) __builtin_memcpy(edge[i], y(i) + at + j, (columns - j) * sizeof(Element));
    Tile::template tile<M>(h, panel, ranks, Strided<Element>{edge[0], kExpandColumns}, 0);
    for (int i = 0; i < M; ++i) __builtin_memcpy(y(i) + at + j, edge[i], (columns - j) * sizeof(Element));
  }
}

// Floats of scratch that expand needs for a factor of so many ranks, or of fewer.
inline int64_t expand_room(int64_t ranks) {
  return kExpandRows * round_up(ranks, 16) + kPanelFloats + ranks * kExpandColumns;
}

template <class T, class P, class Rows>
void expand(Rows y, int64_t rows, const float* h, int64_t h_stride, const Factor<typename P::Element>& f, float* room) {
  typedef Tiles<T, P> Tile;
  const int64_t words = Tile::words(f.ranks);
  const int64_t width = panel_columns(f.columns, words, rows > kExpandRows ? kPanelFloats : kPanelFloatsOfFewRows);
  float* panel = room + kExpandRows * round_up(f.ranks, 16);
  for (int64_t at = 0; at < f.columns; at += width) {
    const int64_t columns = f.columns - at < width ? f.columns - at : width;
    for (int64_t j = 0; j < columns; j += kExpandColumns)
      Tile::pack_columns(f, at + j, columns - j < kExpandColumns ? columns - j : kExpandColumns, panel + j * words);
    int64_t i = 0;
    const auto take = [&](auto count) {
      const Lines lines = Tile::lines(h + i * h_stride, h_stride, count(), f.ranks, room);
      expand_rows<Tile, typename T::Element, count()>(lines, panel, f.ranks, y.from(i), at, columns);
      i += count();
    };
    while (i + kExpandRows <= rows) take(std::integral_constant<int, kExpandRows>());
    if (i + 4 <= rows) take(std::integral_constant<int, 4>());
    if (i + 2 <= rows) take(std::integral_constant<int, 2>());
    if (i < rows) take(std::integral_constant<int, 1>());
  }
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
