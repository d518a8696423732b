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

  // The even and the odd counters of W lanes, interleaved so that one chain's latency hides behind the other's work.
  ESSA_INLINE WordVectors words(const Philox& p, uint32_t first_block) {
    const vi m0 = seti64(noise::kPhiloxM0), m1 = seti64(noise::kPhiloxM1);
    const vi even = addi64(even_lanes64(), seti64(first_block));
    const vi counter[2] = {even, addi64(even, seti64(1))};
    vi c0[2], c1[2], c2[2], c3[2], p0[2], p1[2];
    for (int i = 0; i < 2; ++i) p0[i] = mul_low32(counter[i], m0);
    for (int i = 0; i < 2; ++i) c2[i] = xori(high32(p0[i]), p.start_c2);
    for (int i = 0; i < 2; ++i) p1[i] = mul_low32(c2[i], m1);
    for (int i = 0; i < 2; ++i) {
      c0[i] = xori(high32(p1[i]), p.second_c0);
      c1[i] = p1[i];
      c2[i] = xori(p0[i], p.second_c2);
      c3[i] = p.third_c3;
    }
#pragma GCC unroll 8
    for (int round = 2; round < 10; ++round) {
      for (int i = 0; i < 2; ++i) p0[i] = mul_low32(c0[i], m0);
      for (int i = 0; i < 2; ++i) p1[i] = mul_low32(c2[i], m1);
      for (int i = 0; i < 2; ++i) c0[i] = xor3(high32(p1[i]), c1[i], p.key0[round]);
      for (int i = 0; i < 2; ++i) c2[i] = xor3(high32(p0[i]), c3[i], p.key1[round]);
      for (int i = 0; i < 2; ++i) c1[i] = p1[i], c3[i] = p0[i];
    }
    return WordVectors{{interleave32(c0[0], c0[1]), interleave32(c1[0], c1[1]), interleave32(c2[0], c2[1]),
                        interleave32(c3[0], c3[1])}};
  }
};

// The four words of W lanes to four vectors of normals, both Box-Muller pairs interleaved.
// flip: 0 or 0x80000000 in every lane, the sign of the member.
ESSA_INLINE void normals(const WordVectors& x, vi flip, vf z[4]) {
  const vi root = seti(noise::kSqrtHalfBits);
  vf e[2], f[2], p[2], radius[2], t[2], tt[2], s[2], c[2];
  for (int i = 0; i < 2; ++i) {
    const vf u = fma(to_float(shr<1>(x.w[2 * i])), set1(0x1p-31f), set1(0x1p-32f));
    const vi shifted = subi(as_int(u), root);
    e[i] = to_float(sar<23>(shifted));
    f[i] = sub(as_float(addi(andi(shifted, seti(0x007fffffu)), root)), set1(1.0f));
    p[i] = set1(noise::kLn[6]);
    t[i] = mul(to_float(ori(sar<2>(x.w[2 * i + 1]), seti(1))), set1(0x1p-30f));
    tt[i] = mul(t[i], t[i]);
    s[i] = set1(noise::kSin[3]);
    c[i] = set1(noise::kCos[3]);
  }
#pragma GCC unroll 6
  for (int k = 5; k >= 0; --k) {
    for (int i = 0; i < 2; ++i) p[i] = fma(p[i], f[i], set1(noise::kLn[k]));
    if (k < 3) {
      for (int i = 0; i < 2; ++i) s[i] = fma(s[i], tt[i], set1(noise::kSin[k]));
      for (int i = 0; i < 2; ++i) c[i] = fma(c[i], tt[i], set1(noise::kCos[k]));
    }
  }
  for (int i = 0; i < 2; ++i) {
    const vf minus2_ln_m = fma(mul(f[i], f[i]), fma(f[i], p[i], set1(1.0f)), mul(f[i], set1(-2.0f)));
    radius[i] = sqrt(fma(e[i], set1(noise::kMinus2Ln2), minus2_ln_m));
    s[i] = mul(s[i], t[i]);
    c[i] = fma(c[i], tt[i], set1(1.0f));
  }
  for (int i = 0; i < 2; ++i) {
    const vi x1 = x.w[2 * i + 1];
    const vf signed_radius = as_float(xor3(as_int(radius[i]), shl<31>(x1), flip));
    z[2 * i] = mul(signed_radius, select_bit1(x1, c[i], s[i]));
    z[2 * i + 1] = mul(signed_radius, select_bit1(x1, s[i], c[i]));
  }
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
