// Noise a vector at a time: W consecutive block lanes of a tile, in registers. Mirrors csrc/noise/noise.h bit for bit.
#pragma once
#include "../noise/noise.h"
#include "simd.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {

struct WordVectors {
  vi w[4];
};

// Philox of W consecutive counters. c1, c2, c3 are the same for a whole noise matrix, so the first two rounds are half
// scalar. The state is held as one 32-bit value per 64-bit lane (even and odd counters apart): the 32x32->64 multiply
// then needs no blends, and the garbage in the upper halves is never read.
struct Philox {
  vi key0[10], key1[10];
  vi start_c2, second_c0, second_c2;
  vi third_c3;

  explicit Philox(const noise::Key& key, uint32_t tag) {
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int i = 0; i < 10; ++i, k0 += noise::kPhiloxW0, k1 += noise::kPhiloxW1) {
      key0[i] = seti64(k0);
      key1[i] = seti64(k1);
    }
    const uint64_t first = (uint64_t)noise::kPhiloxM1 * key.pair;
    const uint32_t c0 = (uint32_t)(first >> 32) ^ key.c1(tag) ^ key.k0;
    const uint64_t second = (uint64_t)noise::kPhiloxM0 * c0;
    start_c2 = seti64(key.generation ^ key.k1);
    second_c0 = seti64((uint32_t)first ^ (key.k0 + noise::kPhiloxW0));
    second_c2 = seti64((uint32_t)(second >> 32) ^ (key.k1 + noise::kPhiloxW1));
    third_c3 = seti64((uint32_t)second);
  }

  ESSA_INLINE void rounds(vi counter, const Philox& p, vi out[4]) {
    const vi m0 = seti64(noise::kPhiloxM0), m1 = seti64(noise::kPhiloxM1);
    vi p0 = mul_low32(counter, m0);
    vi c2 = xori(high32(p0), p.start_c2);
    vi p1 = mul_low32(c2, m1);
    vi c0 = xori(high32(p1), p.second_c0);
    vi c1 = p1, c3 = p.third_c3;
    c2 = xori(p0, p.second_c2);
#pragma GCC unroll 8
    for (int i = 2; i < 10; ++i) {
      p0 = mul_low32(c0, m0);
      p1 = mul_low32(c2, m1);
      c0 = xor3(high32(p1), c1, p.key0[i]);
      c2 = xor3(high32(p0), c3, p.key1[i]);
      c1 = p1;
      c3 = p0;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
  }

  ESSA_INLINE WordVectors words(const Philox& p, uint32_t first_block) {
    const vi even = addi64(even_lanes64(), seti64(first_block));
    vi a[4], b[4];
    rounds(even, p, a);
    rounds(addi64(even, seti64(1)), p, b);
    WordVectors out;
    for (int i = 0; i < 4; ++i) out.w[i] = interleave32(a[i], b[i]);
    return out;
  }
};

// flip: 0 or 0x80000000 in every lane, the sign of the member
ESSA_INLINE void box_muller(vi x0, vi x1, vi flip, vf& z0, vf& z1) {
  const vf u = fma(to_float(shr<1>(x0)), set1(0x1p-31f), set1(0x1p-32f));
  const vi root = seti(noise::kSqrtHalfBits);
  const vi shifted = subi(as_int(u), root);
  const vf e = to_float(sar<23>(shifted));
  const vf f = sub(as_float(addi(andi(shifted, seti(0x007fffffu)), root)), set1(1.0f));
  vf p = set1(noise::kLn[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) p = fma(p, f, set1(noise::kLn[i]));
  const vf minus2_ln_m = fma(mul(f, f), fma(f, p, set1(1.0f)), mul(f, set1(-2.0f)));
  const vf radius = sqrt(fma(e, set1(noise::kMinus2Ln2), minus2_ln_m));

  const vi odd = ori(sar<2>(x1), seti(1));
  const vf t = mul(to_float(odd), set1(0x1p-30f));
  const vf tt = mul(t, t);
  vf s = set1(noise::kSin[3]), c = set1(noise::kCos[3]);
#pragma GCC unroll 3
  for (int i = 2; i >= 0; --i) {
    s = fma(s, tt, set1(noise::kSin[i]));
    c = fma(c, tt, set1(noise::kCos[i]));
  }
  s = mul(s, t);
  c = fma(c, tt, set1(1.0f));
  const vf signed_radius = as_float(xor3(as_int(radius), shl<31>(x1), flip));
  z0 = mul(signed_radius, select_bit1(x1, c, s));
  z1 = mul(signed_radius, select_bit1(x1, s, c));
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
