// ESSA's population forward: y += U_B (s_B[m] * (core (s_A[m] * (V_A x)))), rows grouped by member.
//
// A block of rows goes through shrink, core and expand while it is in cache. A row's arithmetic does not depend on which
// block or thread it falls into, so results are the same for every thread count.
#include "lora_tiles.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {
namespace {

constexpr int kRowBlock = 512;
constexpr int kMaxCoreBlock = 4;  // vectors of r_b the core keeps in registers

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

template <class T>
void run(const SvdLoraArgs& args, int64_t first, int64_t last) {
  typedef typename T::Element Element;
  const Factor<Element> u_b{(const Element*)args.u_b, args.d_out, args.r_b, args.u_b_row_stride, args.u_b_col_stride};
  const bool shrinks = args.x != nullptr, expands = args.y != nullptr;
  const int64_t r_b_padded = round_up(args.r_b, W), block = last - first < kRowBlock ? last - first : kRowBlock;
  const int64_t core_size = shrinks ? args.r_a * r_b_padded : 0, t_size = shrinks ? block * args.r_a : 0;
  const int64_t room_size = expands ? expand_room(args.r_b) : 0;
  float* core_t = scratch(round_up(core_size, 16) + round_up(t_size, 16) + round_up(room_size, 16) +
                          block * r_b_padded);
  float* t = core_t + round_up(core_size, 16);
  float* room = t + round_up(t_size, 16);
  float* h_block = room + round_up(room_size, 16);
  if (shrinks) pack_core(args, core_t, r_b_padded);

  for (int64_t row = first; row < last; row += kRowBlock) {
    const int64_t rows = last - row < kRowBlock ? last - row : kRowBlock;
    float* h = args.h != nullptr ? args.h + row * args.h_stride : h_block;
    const int64_t h_stride = args.h != nullptr ? args.h_stride : r_b_padded;
    if (shrinks) {
      shrink<T>(Strided<const Element>{(const Element*)args.x + row * args.x_stride, args.x_stride}, rows,
                (const Element*)args.v_a, args.r_a, args.d_in, t, args.r_a);
      apply_core(args, row, rows, t, args.r_a, core_t, h, h_stride);
    }
    if (expands)
      expand<T, T>(Strided<Element>{(Element*)args.y + row * args.y_stride, args.y_stride}, rows, h, h_stride, u_b,
                   room);
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
