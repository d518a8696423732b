// The noise contract as code (NOISE_VERSION 1): Philox4x32-10, key packing, element layout, normal map.
//
// Every backend must produce the bits this file produces. It is plain scalar code for host and device: the SIMD
// kernels in csrc/cpu and the Triton kernels mirror it operation by operation. Only integer operations and correctly
// rounded fp32 add, mul, fma, sqrt and int->float conversion appear, and no product feeds a bare add, so neither
// contraction nor a different libm can change a bit. The prose version is essa_kernels/noise.py.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define ESSA_HD __host__ __device__ __forceinline__
#else
#define ESSA_HD inline
#endif

namespace essa {
namespace noise {

constexpr int kVersion = 1;
constexpr uint32_t kGaussian = 0, kRademacher = 1;  // the tag in the top two bits of c1
constexpr int kGaussianTile = 64;                   // 16 blocks of 4 words
constexpr int kRademacherTile = 2048;               // 16 blocks of 4 words of 32 bits
constexpr int kTileBlocks = 16;

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// A table that device code can copy into a local constant; it cannot refer to an array at namespace scope.
template <int N>
struct Coefficients {
  float value[N];
  ESSA_HD constexpr float operator[](int i) const { return value[i]; }
};

// ln(1+f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2)-1, sqrt(2)-1], stored as -2 P: relative error 0.5 * 2^-24.
// sin(pi/2 t) = t S(t^2), cos(pi/2 t) = 1 + t^2 C(t^2) on |t| <= 1/2: 0.05 and 0.001 * 2^-24.
constexpr Coefficients<7> kLn = {{-0x1.5556d8p-1f, 0x1.000382p-1f, -0x1.98d7f2p-2f, 0x1.53824ap-2f,
                                  -0x1.317456p-2f, 0x1.2432b8p-2f, -0x1.645eaep-3f}};
constexpr float kMinus2Ln2 = -0x1.62e430p+0f;
constexpr Coefficients<4> kSin = {{0x1.921fb6p+0f, -0x1.4abbbap-1f, 0x1.465e92p-4f, -0x1.2d9302p-8f}};
constexpr Coefficients<4> kCos = {{-0x1.3bd3ccp+0f, 0x1.03c1dep-2f, -0x1.55c5e0p-6f, 0x1.d9d57ep-11f}};
constexpr uint32_t kSqrtHalfBits = 0x3f3504f3u;

struct Key {
  uint32_t k0, k1;  // seed, low word first
  uint32_t site, pair, generation;
  ESSA_HD uint32_t c1(uint32_t tag) const { return site | (tag << 30); }
};

struct Words {
  uint32_t w[4];
};

ESSA_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = (uint64_t)kPhiloxM0 * c0;
    const uint64_t product1 = (uint64_t)kPhiloxM1 * c2;
    c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)product1;
    c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)product0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return Words{{c0, c1, c2, c3}};
}

ESSA_HD float fma_rn(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
ESSA_HD float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
ESSA_HD float sqrt_rn(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}
ESSA_HD float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
ESSA_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// Two words to two normals. z0 belongs to the element of word x0, z1 to that of x1.
ESSA_HD void box_muller(uint32_t x0, uint32_t x1, float& z0, float& z1) {
  constexpr auto ln = kLn;
  constexpr auto sine = kSin, cosine = kCos;
  // u in [2^-32, 1]
  const float u = fma_rn((float)(int32_t)(x0 >> 1), 0x1p-31f, 0x1p-32f);
  const uint32_t shifted = float_to_bits(u) - kSqrtHalfBits;
  const float e = (float)((int32_t)shifted >> 23);
  const float f = bits_to_float((shifted & 0x007fffffu) + kSqrtHalfBits) - 1.0f;  // exact
  float p = ln[6];
  for (int i = 5; i >= 0; --i) p = fma_rn(p, f, ln[i]);
  const float minus2_ln_m = fma_rn(mul_rn(f, f), fma_rn(f, p, 1.0f), mul_rn(f, -2.0f));
  const float radius = sqrt_rn(fma_rn(e, kMinus2Ln2, minus2_ln_m));

  // The angle: an odd 30-bit integer in units of 2^-30 quarter turns, so |t| < 1/2; two low bits pick the octants.
  const float t = mul_rn((float)(int32_t)(((int32_t)x1 >> 2) | 1), 0x1p-30f);
  const float tt = mul_rn(t, t);
  float s = sine[3], c = cosine[3];
  for (int i = 2; i >= 0; --i) s = fma_rn(s, tt, sine[i]);
  for (int i = 2; i >= 0; --i) c = fma_rn(c, tt, cosine[i]);
  s = mul_rn(s, t);
  c = fma_rn(c, tt, 1.0f);
  const uint32_t sign = x1 << 31;
  const bool swap = (x1 & 2u) != 0;
  const float signed_radius = bits_to_float(float_to_bits(radius) ^ sign);
  z0 = mul_rn(signed_radius, swap ? s : c);
  z1 = mul_rn(signed_radius, swap ? c : s);
}

// The word index and the lane of element e of a Gaussian tile are e / 16 and e % 16.
// Element e = bit * 64 + word * 16 + lane of a Rademacher tile is bit `bit`, counted from the most significant.
ESSA_HD int64_t tiles_per_row(int64_t cols, int tile) { return (cols + tile - 1) / tile; }

}  // namespace noise
}  // namespace essa
