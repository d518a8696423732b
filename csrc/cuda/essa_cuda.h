// What csrc/cuda offers to the bindings. Pointers and streams are device addresses as integers, strides count elements,
// dtype is 0 float32, 1 bfloat16, 2 float16. Every function launches on `stream` of the device that holds the result,
// allocates nothing, never waits, and may be captured in a CUDA graph. A CUDA failure is thrown as std::runtime_error.
#pragma once
#include <cstddef>
#include <cstdint>

namespace essa {
namespace cuda {

void gaussian(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
              uint64_t member, uintptr_t stream);
void rademacher(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
                uint64_t member, uintptr_t stream);

// Matrices [rows, cols], contiguous, on one device; matrix i draws from site + 2 i.
struct TensorList {
  const uintptr_t* data;
  const int64_t *rows, *cols;
  const int* dtypes;
  int64_t count;
};
void perturb(const TensorList& list, uint64_t seed, uint32_t generation, uint32_t site, uint64_t member, float sigma,
             bool rademacher, uintptr_t stream);
void es_update(const TensorList& list, uint64_t seed, uint32_t generation, uint32_t site, uintptr_t pair_weights,
               int64_t pairs, bool rademacher, uintptr_t stream);

void svd_lora(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
              uintptr_t u_b, int64_t u_b_row_stride, int64_t u_b_column_stride, uintptr_t s_a, uintptr_t s_b,
              uintptr_t offsets, int64_t rows, int64_t members, int64_t d_in, int64_t d_out, int64_t r_a, int64_t r_b,
              int dtype, uintptr_t stream);
void svd_lora_shrink(uintptr_t h, int64_t h_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
                     uintptr_t s_a, uintptr_t s_b, uintptr_t offsets, int64_t rows, int64_t members, int64_t d_in,
                     int64_t r_a, int64_t r_b, int dtype, uintptr_t stream);
void svd_lora_expand(uintptr_t y, int64_t y_stride, uintptr_t h, int64_t h_stride, uintptr_t u_b,
                     int64_t u_b_row_stride, int64_t u_b_column_stride, int64_t rows, int64_t d_out, int64_t r_b,
                     int dtype, uintptr_t stream);

void lora_perturbed(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t a, uintptr_t b,
                    int64_t b_row_stride, int64_t b_column_stride, uint64_t seed, uint32_t generation, uint32_t site,
                    double sigma, uintptr_t members, uintptr_t offsets, double scaling, bool rademacher, int64_t rows,
                    int64_t groups, int64_t d_in, int64_t d_out, int64_t rank, int dtype, int parameter_dtype,
                    uintptr_t stream);

// Writes to `text` the driver, the devices and their compute capability in words, or the plain reason why there is none.
// Cut to `size` bytes; never throws.
void device_report(char* text, size_t size);

// The .cu files throw through these, so that their objects use nothing of the C++ library: nvcc compiles them against
// libstdc++, and a portable wheel links another one. printf's formats.
[[noreturn]] void fail(const char* format, ...);    // std::runtime_error
[[noreturn]] void refuse(const char* format, ...);  // std::invalid_argument

}  // namespace cuda
}  // namespace essa
