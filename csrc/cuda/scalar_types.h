// The storage types of x, v_a, u_b and y on device and host, and their conversion to and from fp32.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../noise/noise.h"

namespace essa {
namespace cuda {

#ifdef __CUDACC__
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

ESSA_HD float to_float(BFloat16 value) { return __bfloat162float(value); }
ESSA_HD float to_float(Float16 value) { return __half2float(value); }
ESSA_HD void from_float(float value, BFloat16& result) { result = __float2bfloat16_rn(value); }
ESSA_HD void from_float(float value, Float16& result) { result = __float2half_rn(value); }
#else
struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline float to_float(BFloat16 value) { return noise::bits_to_float((uint32_t)value.bits << 16); }
inline float to_float(Float16 value) { return (float)value; }
inline void from_float(float value, BFloat16& result) {
  const uint32_t bits = noise::float_to_bits(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  result.bits = (uint16_t)((value == value ? rounded : bits | 0x400000u) >> 16);
}
inline void from_float(float value, Float16& result) { result = (Float16)value; }
#endif

ESSA_HD float to_float(float value) { return value; }
ESSA_HD void from_float(float value, float& result) { result = value; }

// N neighbours that move as one access; the address must be a multiple of the size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

}  // namespace cuda
}  // namespace essa
