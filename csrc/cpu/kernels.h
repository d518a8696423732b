// The CPU kernels' arguments and the table of their entry points, one table per instruction set.
#pragma once
#include <stdint.h>

#include "../noise/noise.h"

namespace essa {
namespace cpu {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct NoiseArgs {
  float* out;  // [rows, cols], contiguous
  int64_t rows, cols;
  noise::Key key;
  bool negate;  // the odd member of an antithetic pair
};

// svd_lora, or one of its halves: `y == nullptr` stops after h, `x == nullptr` starts from h.
struct SvdLoraArgs {
  int dtype;  // of x, v_a, u_b and y
  int64_t rows, members, d_in, d_out, r_a, r_b;
  const void* x;  // [rows, d_in], row stride x_stride
  int64_t x_stride;
  const void* v_a;           // [r_a, d_in]
  const float* core;         // [r_b, r_a]
  const float *s_a, *s_b;    // [members, r_a], [members, r_b]
  const int64_t* offsets;    // [members + 1]
  float* h;                  // [rows, r_b], row stride h_stride; nullptr in the fused form
  int64_t h_stride;
  const void* u_b;           // [d_out, r_b], either dimension contiguous
  int64_t u_b_row_stride, u_b_col_stride;
  void* y;  // [rows, d_out], row stride y_stride
  int64_t y_stride;
};

struct Kernels {
  const char* isa;
  // tiles [first, last) of the rows * tiles_per_row tiles
  void (*gaussian)(const NoiseArgs&, int64_t first, int64_t last);
  void (*rademacher)(const NoiseArgs&, int64_t first, int64_t last);
  // rows [first, last)
  void (*svd_lora)(const SvdLoraArgs&, int64_t first, int64_t last);
};

#define ESSA_DECLARE_KERNELS(ISA)                                            \
  namespace ISA {                                                            \
  void gaussian(const NoiseArgs& args, int64_t first, int64_t last);         \
  void rademacher(const NoiseArgs& args, int64_t first, int64_t last);       \
  void svd_lora(const SvdLoraArgs& args, int64_t first, int64_t last);       \
  }
ESSA_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
ESSA_DECLARE_KERNELS(avx2)
ESSA_DECLARE_KERNELS(avx512)
ESSA_DECLARE_KERNELS(avx512bf16)
#endif

// A 64-byte aligned buffer of this thread, valid until its next call; grows, never shrinks. A few hundred kilobytes at
// the ranks of LoRA; svd_lora keeps its core there.
float* scratch(int64_t floats);

}  // namespace cpu
}  // namespace essa
