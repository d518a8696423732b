// ESSA's population forward: y += U_B (s_B[m] * (core (s_A[m] * (V_A x)))), rows grouped by member.
//
// A block of rows goes through shrink, core and expand while it is in cache. Shrink is a block of dot products along
// d_in, straight from x and v_a in their own dtype. Expand packs a panel of u_b, as many columns as stay in L2 (rank-
// major, fp32), walks a few rows of y at a time along it, so that y streams, and keeps a rows x columns tile of y in
// registers. A row's arithmetic does not depend on which block or thread it falls into, so results are the same for
// every thread count.
#include <type_traits>

#include "kernels.h"
#include "simd.h"
#include "storage.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

constexpr int kRowBlock = 512;
constexpr int kMaxCoreBlock = 4;  // vectors of r_b the core keeps in registers

// How a dtype is read, and what one step of a dot product is. A pack holds `kStep` elements in an order that is the
// same for both factors.
struct Float32 : Storage<kFloat32> {
  typedef vf Pack;
  static constexpr int kStep = W;
  ESSA_INLINE Pack pack(const Element* p) { return load(p); }
  ESSA_INLINE vf dot(Pack a, Pack b, vf sum) { return muladd(a, b, sum); }
  ESSA_INLINE float get1(Element e) { return e; }
};

struct Float16 : Storage<kFloat16> {
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

// The rows that come next, while these are computed: they are strided, and the base layer's weights have pushed them out
// of the cache. An address past the end does no harm.
ESSA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- shrink: t[i, k] = sum_d x[i, d] v[k, d] ---------------------------------------------------------------------

constexpr int kShrinkRows = 3;
constexpr int kShrinkRanks = W == 16 ? 8 : 4;

template <class T, int M, int K>
ESSA_INLINE void shrink_tile(const typename T::Element* x, int64_t x_stride, const typename T::Element* v, int64_t d,
                             float* t, int64_t t_stride) {
  typedef typename T::Element Element;
  vf sums[M][K];
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) sums[i][k] = zero();

  const auto step = [&](const Element* xs, int64_t xs_stride, const Element* vs, int64_t vs_stride) {
    typename T::Pack a[M];
    for (int i = 0; i < M; ++i) a[i] = T::pack(xs + i * xs_stride);
    for (int k = 0; k < K; ++k) {
      const typename T::Pack b = T::pack(vs + k * vs_stride);
      for (int i = 0; i < M; ++i) sums[i][k] = T::dot(a[i], b, sums[i][k]);
    }
  };
  int64_t at = 0;
  for (; at + T::kStep <= d; at += T::kStep) {
    for (int i = 0; i < M; ++i) prefetch(x + (M + i) * x_stride + at);
    step(x + at, x_stride, v + at, d);
  }
  if (at < d) {
    Element x_tail[M][T::kStep] = {}, v_tail[K][T::kStep] = {};
    for (int i = 0; i < M; ++i) __builtin_memcpy(x_tail[i], x + i * x_stride + at, (d - at) * sizeof(Element));
    for (int k = 0; k < K; ++k) __builtin_memcpy(v_tail[k], v + k * d + at, (d - at) * sizeof(Element));
    step(x_tail[0], T::kStep, v_tail[0], T::kStep);
  }
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k) t[i * t_stride + k] = sum(sums[i][k]);
}

template <class T, int M>
void shrink_rows(const SvdLoraArgs& args, const typename T::Element* x, float* t, int64_t t_stride) {
  const typename T::Element* v = (const typename T::Element*)args.v_a;
  const int64_t d = args.d_in;
  int64_t k = 0;
  for (; k + kShrinkRanks <= args.r_a; k += kShrinkRanks)
    shrink_tile<T, M, kShrinkRanks>(x, args.x_stride, v + k * d, d, t + k, t_stride);
  if (kShrinkRanks > 4 && k + 4 <= args.r_a) {
    shrink_tile<T, M, 4>(x, args.x_stride, v + k * d, d, t + k, t_stride);
    k += 4;
  }
  for (; k < args.r_a; ++k) shrink_tile<T, M, 1>(x, args.x_stride, v + k * d, d, t + k, t_stride);
}

template <class T>
void shrink(const SvdLoraArgs& args, int64_t first, int64_t rows, float* t, int64_t t_stride) {
  const typename T::Element* x = (const typename T::Element*)args.x + first * args.x_stride;
  int64_t i = 0;
  for (; i + kShrinkRows <= rows; i += kShrinkRows)
    shrink_rows<T, kShrinkRows>(args, x + i * args.x_stride, t + i * t_stride, t_stride);
  for (; i < rows; ++i) shrink_rows<T, 1>(args, x + i * args.x_stride, t + i * t_stride, t_stride);
}

// --- core: h = s_B[m] * (core (s_A[m] * t)) ------------------------------------------------------------------------

// core_t [r_a, r_b_padded] is the transposed core, so that a vector runs along r_b.
void pack_core(const SvdLoraArgs& args, float* core_t, int64_t r_b_padded) {
  for (int64_t a = 0; a < args.r_a; ++a)
    for (int64_t b = 0; b < r_b_padded; ++b)
      core_t[a * r_b_padded + b] = b < args.r_b ? args.core[b * args.r_a + a] : 0.0f;
}

template <int N>
ESSA_INLINE void core_row(const float* t, const float* s_a, const float* s_b, const float* core_t, int64_t r_a,
                          int64_t r_b_padded, int64_t r_b_left, float* h) {
  vf sums[N];
  for (int n = 0; n < N; ++n) sums[n] = zero();
  for (int64_t a = 0; a < r_a; ++a) {
    const vf scaled = set1(t[a] * s_a[a]);
    for (int n = 0; n < N; ++n) sums[n] = muladd(scaled, load(core_t + a * r_b_padded + n * W), sums[n]);
  }
  for (int n = 0; n < N; ++n) {
    if ((n + 1) * W <= r_b_left) {
      store(h + n * W, mul(sums[n], load(s_b + n * W)));
      continue;
    }
    alignas(64) float lanes[W];
    store(lanes, sums[n]);
    for (int64_t b = n * W; b < r_b_left; ++b) h[b] = lanes[b - n * W] * s_b[b];
  }
}

void apply_core(const SvdLoraArgs& args, int64_t first, int64_t rows, const float* t, int64_t t_stride,
                const float* core_t, float* h, int64_t h_stride) {
  const int64_t r_b_padded = round_up(args.r_b, W);
  int64_t low = 0, high = args.members;  // the member of row `first`: the last m with offsets[m] <= first, not empty
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (args.offsets[middle] <= first) low = middle;
    else high = middle;
  }
  int64_t member = low;
  for (int64_t i = 0; i < rows; ++i) {
    while (args.offsets[member + 1] <= first + i) ++member;
    const float* s_a = args.s_a + member * args.r_a;
    const float* s_b = args.s_b + member * args.r_b;
    int64_t b = 0;
    for (; b + kMaxCoreBlock * W <= r_b_padded; b += kMaxCoreBlock * W)
      core_row<kMaxCoreBlock>(t + i * t_stride, s_a, s_b + b, core_t + b, args.r_a, r_b_padded, args.r_b - b,
                              h + i * h_stride + b);
    for (; b < r_b_padded; b += W)
      core_row<1>(t + i * t_stride, s_a, s_b + b, core_t + b, args.r_a, r_b_padded, args.r_b - b,
                  h + i * h_stride + b);
  }
}

// --- expand: y[i, j] += sum_k h[i, k] u[j, k] ----------------------------------------------------------------------

constexpr int kExpandRows = W == 16 ? 6 : 4;
constexpr int kExpandVectors = W == 16 ? 4 : (W == 8 ? 3 : 2);
constexpr int kExpandColumns = kExpandVectors * W;

constexpr int64_t kPanelFloats = 1 << 15;

// W rows of u_b, rank-contiguous and without gaps, as `ranks` vectors.
template <class T>
ESSA_INLINE void pack_rows(const typename T::Element* u, int64_t ranks, float* packed) {
  constexpr int64_t kRanks = 64;
  alignas(64) float rows[W * kRanks];
  for (int64_t n = 0; n < ranks * W; n += W) store(rows + n, T::get(u + n));
  for (int64_t k = 0; k + 4 <= ranks; k += 4) {
    vf m[4];
    for (int q = 0; q < 4; ++q) m[q] = load_lanes(rows + q * ranks + k, 4 * ranks);
    transpose_lanes(m);
    for (int q = 0; q < 4; ++q) store(packed + (k + q) * kExpandColumns, m[q]);
  }
}

// packed [r_b, kExpandColumns]: column j of the block is row j of u_b; beyond `columns` zero
template <class T>
void pack_u(const SvdLoraArgs& args, int64_t j, int columns, float* packed) {
  typedef typename T::Element Element;
  const Element* u = (const Element*)args.u_b + j * args.u_b_row_stride;
  if (columns == kExpandColumns && args.u_b_row_stride == 1) {
    for (int64_t k = 0; k < args.r_b; ++k)
      for (int n = 0; n < kExpandColumns; n += W)
        store(packed + k * kExpandColumns + n, T::get(u + k * args.u_b_col_stride + n));
    return;
  }
  const bool dense = args.u_b_col_stride == 1 && args.u_b_row_stride == args.r_b;
  if (columns == kExpandColumns && dense && args.r_b % 4 == 0 && args.r_b <= 64) {
    for (int n = 0; n < kExpandColumns; n += W) pack_rows<T>(u + n * args.r_b, args.r_b, packed + n);
    return;
  }
  for (int n = 0; n < columns; ++n)
    for (int64_t k = 0; k < args.r_b; ++k)
      packed[k * kExpandColumns + n] = T::get1(u[n * args.u_b_row_stride + k * args.u_b_col_stride]);
  for (int n = columns; n < kExpandColumns; ++n)
    for (int64_t k = 0; k < args.r_b; ++k) packed[k * kExpandColumns + n] = 0.0f;
}

template <class T, int M>
ESSA_INLINE void expand_tile(const float* h, int64_t h_stride, const float* packed, int64_t r_b,
                             typename T::Element* y, int64_t y_stride, int columns) {
  typedef typename T::Element Element;
  vf sums[M][kExpandVectors];
  for (int i = 0; i < M; ++i)
    for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = zero();
  for (int64_t k = 0; k < r_b; ++k) {
    vf u[kExpandVectors];
    for (int n = 0; n < kExpandVectors; ++n) u[n] = load(packed + k * kExpandColumns + n * W);
    for (int i = 0; i < M; ++i) {
      const vf a = set1(h[i * h_stride + k]);
      for (int n = 0; n < kExpandVectors; ++n) sums[i][n] = muladd(a, u[n], sums[i][n]);
    }
  }
  for (int i = 0; i < M; ++i) {
    Element* row = y + i * y_stride;
    if (columns == kExpandColumns) {
      for (int n = 0; n < kExpandVectors; ++n) T::put(row + n * W, add(T::get(row + n * W), sums[i][n]));
      for (int byte = 0; byte < kExpandColumns * (int)sizeof(Element); byte += 64)
        prefetch((const char*)(row + M * y_stride) + byte);
      continue;
    }
    Element edge[kExpandColumns] = {};
    __builtin_memcpy(edge, row, columns * sizeof(Element));
    for (int n = 0; n < kExpandVectors; ++n) T::put(edge + n * W, add(T::get(edge + n * W), sums[i][n]));
    __builtin_memcpy(row, edge, columns * sizeof(Element));
  }
}

// M rows of y along a panel.
template <class T, int M>
void expand_rows(const SvdLoraArgs& args, const float* h, int64_t h_stride, const float* panel, int64_t columns,
                 typename T::Element* y) {
  for (int64_t j = 0; j < columns; j += kExpandColumns, panel += args.r_b * kExpandColumns) {
    const int64_t left = columns - j;
    expand_tile<T, M>(h, h_stride, panel, args.r_b, y + j, args.y_stride,
                      (int)(left < kExpandColumns ? left : kExpandColumns));
  }
}

int64_t panel_columns(const SvdLoraArgs& args) {
  const int64_t blocks = kPanelFloats / (args.r_b * kExpandColumns);
  const int64_t columns = (blocks > 1 ? blocks : 1) * kExpandColumns, all = round_up(args.d_out, kExpandColumns);
  return columns < all ? columns : all;
}

template <class T>
void expand(const SvdLoraArgs& args, int64_t first, int64_t rows, const float* h, int64_t h_stride, float* panel) {
  typedef typename T::Element Element;
  const int64_t width = panel_columns(args);
  for (int64_t at = 0; at < args.d_out; at += width) {
    const int64_t columns = args.d_out - at < width ? args.d_out - at : width;
    for (int64_t j = 0; j < columns; j += kExpandColumns)
      pack_u<T>(args, at + j, (int)(columns - j < kExpandColumns ? columns - j : kExpandColumns),
                panel + j * args.r_b);
    Element* y = (Element*)args.y + first * args.y_stride + at;
    int64_t i = 0;
    const auto take = [&](auto count) {
      expand_rows<T, count()>(args, h + i * h_stride, h_stride, panel, columns, y + i * args.y_stride);
      i += count();
    };
    while (i + kExpandRows <= rows) take(std::integral_constant<int, kExpandRows>());
    while (i + 2 <= rows) take(std::integral_constant<int, 2>());
    if (i < rows) take(std::integral_constant<int, 1>());
  }
}

template <class T>
void run(const SvdLoraArgs& args, int64_t first, int64_t last) {
  const bool shrinks = args.x != nullptr, expands = args.y != nullptr;
  const int64_t r_b_padded = round_up(args.r_b, W), block = last - first < kRowBlock ? last - first : kRowBlock;
  const int64_t core_size = shrinks ? args.r_a * r_b_padded : 0, t_size = shrinks ? block * args.r_a : 0;
  const int64_t panel_size = expands ? args.r_b * panel_columns(args) : 0;
  float* core_t = scratch(round_up(core_size, 16) + round_up(t_size, 16) + round_up(panel_size, 16) +
                          block * r_b_padded);
  float* t = core_t + round_up(core_size, 16);
  float* panel = t + round_up(t_size, 16);
  float* h_block = panel + round_up(panel_size, 16);
  if (shrinks) pack_core(args, core_t, r_b_padded);

  for (int64_t row = first; row < last; row += kRowBlock) {
    const int64_t rows = last - row < kRowBlock ? last - row : kRowBlock;
    float* h = args.h != nullptr ? args.h + row * args.h_stride : h_block;
    const int64_t h_stride = args.h != nullptr ? args.h_stride : r_b_padded;
    if (shrinks) {
      shrink<T>(args, row, rows, t, args.r_a);
      apply_core(args, row, rows, t, args.r_a, core_t, h, h_stride);
    }
    if (expands) expand<T>(args, row, rows, h, h_stride, panel);
  }
}

}  // namespace

void svd_lora(const SvdLoraArgs& args, int64_t first, int64_t last) {
  if (args.dtype == kFloat32) run<Float32>(args, first, last);
  else if (args.dtype == kBFloat16) run<BFloat16>(args, first, last);
  else run<Float16>(args, first, last);
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
