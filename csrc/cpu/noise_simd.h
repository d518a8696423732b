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

  // The even and the odd counters of W lanes, interleaved so that one chain's latency hides behind the other's work.
  struct State {
    vi c0[2], c1[2], c2[2], c3[2];
  };
  static constexpr int kRounds = 8;  // those that `begin` leaves

  explicit Philox(const noise::Key& key, uint32_t tag) {
    uint32_t k0 = key.k0, k1 = key.k1;
    for (int i = 0; i < 10; ++i, k0 += noise::kPhiloxW0, k1 += noise::kPhiloxW1) {
      key0[i] = seti64(k0);
      key1[i] = seti64(k1);
    }
    start(key, tag);
  }

  // Goes on with another matrix of the same seed.
  void start(const noise::Key& key, uint32_t tag) {
    const uint64_t first = (uint64_t)noise::kPhiloxM1 * key.pair;
    const uint32_t c0 = (uint32_t)(first >> 32) ^ key.c1(tag) ^ key.k0;
    const uint64_t second = (uint64_t)noise::kPhiloxM0 * c0;
    start_c2 = seti64(key.generation ^ key.k1);
    second_c0 = seti64((uint32_t)first ^ (key.k0 + noise::kPhiloxW0));
    second_c2 = seti64((uint32_t)(second >> 32) ^ (key.k1 + noise::kPhiloxW1));
    third_c3 = seti64((uint32_t)second);
  }

  ESSA_INLINE State begin(const Philox& p, uint32_t first_block) {
    const vi even = addi64(even_lanes64(), seti64(first_block));
    const vi counter[2] = {even, addi64(even, seti64(1))};
    State s;
    for (int i = 0; i < 2; ++i) {
      const vi p0 = mul_low32(counter[i], seti64(noise::kPhiloxM0));
      const vi p1 = mul_low32(xori(high32(p0), p.start_c2), seti64(noise::kPhiloxM1));
      s.c0[i] = xori(high32(p1), p.second_c0);
      s.c1[i] = p1;
      s.c2[i] = xori(p0, p.second_c2);
      s.c3[i] = p.third_c3;
    }
    return s;
  }

  ESSA_INLINE void round(const Philox& p, int k, State& s) {
    for (int i = 0; i < 2; ++i) {
      const vi p0 = mul_low32(s.c0[i], seti64(noise::kPhiloxM0)), p1 = mul_low32(s.c2[i], seti64(noise::kPhiloxM1));
      s.c0[i] = xor3(high32(p1), s.c1[i], p.key0[k + 2]);
      s.c2[i] = xor3(high32(p0), s.c3[i], p.key1[k + 2]);
      s.c1[i] = p1;
      s.c3[i] = p0;
    }
  }

  ESSA_INLINE WordVectors end(const State& s) {
    return WordVectors{{interleave32(s.c0[0], s.c0[1]), interleave32(s.c1[0], s.c1[1]),
                        interleave32(s.c2[0], s.c2[1]), interleave32(s.c3[0], s.c3[1])}};
  }

  ESSA_INLINE WordVectors words(const Philox& p, uint32_t first_block) {
    State s = begin(p, first_block);
#pragma GCC unroll 8
    for (int k = 0; k < kRounds; ++k) round(p, k, s);
    return end(s);
  }
};

// The four words of W lanes to four vectors of normals, both Box-Muller pairs interleaved, in as many steps as `Philox`
// has rounds: a caller takes them in turns with the rounds of the words it needs next, because one chain of dependent
// operations alone leaves half of the processor idle.
struct BoxMuller {
  WordVectors x;
  vi shifted[2];
  vf e[2], f[2], p[2], t[2], tt[2], s[2], c[2];

  ESSA_INLINE void step(int k, BoxMuller& b) {
    const vi root = seti(noise::kSqrtHalfBits);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const vi x0 = b.x.w[2 * i], x1 = b.x.w[2 * i + 1];
      switch (k) {
        case 0:
          b.f[i] = fma(to_float(shr<1>(x0)), set1(0x1p-31f), set1(0x1p-32f));  // u
          b.t[i] = mul(to_float(ori(sar<2>(x1), seti(1))), set1(0x1p-30f));
          break;
        case 1:
          b.shifted[i] = subi(as_int(b.f[i]), root);
          b.f[i] = sub(as_float(addi(andi(b.shifted[i], seti(0x007fffffu)), root)), set1(1.0f));
          b.tt[i] = mul(b.t[i], b.t[i]);
          break;
        case 2:
          b.e[i] = to_float(sar<23>(b.shifted[i]));
          b.p[i] = fma(set1(noise::kLn[6]), b.f[i], set1(noise::kLn[5]));
          b.s[i] = fma(set1(noise::kSin[3]), b.tt[i], set1(noise::kSin[2]));
          b.c[i] = fma(set1(noise::kCos[3]), b.tt[i], set1(noise::kCos[2]));
          break;
        case 3:
          b.p[i] = fma(b.p[i], b.f[i], set1(noise::kLn[4]));
          b.s[i] = fma(b.s[i], b.tt[i], set1(noise::kSin[1]));
          b.c[i] = fma(b.c[i], b.tt[i], set1(noise::kCos[1]));
          break;
        case 4:
          b.p[i] = fma(b.p[i], b.f[i], set1(noise::kLn[3]));
          b.s[i] = fma(b.s[i], b.tt[i], set1(noise::kSin[0]));
          b.c[i] = fma(b.c[i], b.tt[i], set1(noise::kCos[0]));
          break;
        case 5:
          b.p[i] = fma(b.p[i], b.f[i], set1(noise::kLn[2]));
          b.s[i] = mul(b.s[i], b.t[i]);
          b.c[i] = fma(b.c[i], b.tt[i], set1(1.0f));
          break;
        case 6:
          b.p[i] = fma(b.p[i], b.f[i], set1(noise::kLn[1]));
          break;
        default:
          b.p[i] = fma(b.p[i], b.f[i], set1(noise::kLn[0]));
      }
    }
  }

  // flip: 0 or 0x80000000 in every lane, the sign of the member
  ESSA_INLINE void end(const BoxMuller& b, vi flip, vf z[4]) {
    for (int i = 0; i < 2; ++i) {
      const vi x1 = b.x.w[2 * i + 1];
      const vf minus_2f = mul(b.f[i], set1(-2.0f));
      const vf minus2_ln_m = fma(mul(b.f[i], b.f[i]), fma(b.f[i], b.p[i], set1(1.0f)), minus_2f);
      const vf radius = sqrt(fma(b.e[i], set1(noise::kMinus2Ln2), minus2_ln_m));
      const vf signed_radius = as_float(xor3(as_int(radius), shl<31>(x1), flip));
      z[2 * i] = mul(signed_radius, select_bit1(x1, b.c[i], b.s[i]));
      z[2 * i + 1] = mul(signed_radius, select_bit1(x1, b.s[i], b.c[i]));
    }
  }
};

ESSA_INLINE void normals(const WordVectors& x, vi flip, vf z[4]) {
  BoxMuller b;
  b.x = x;
#pragma GCC unroll 8
  for (int k = 0; k < Philox::kRounds; ++k) BoxMuller::step(k, b);
  BoxMuller::end(b, flip, z);
}

// `normals` of x and the words of the blocks that come next, computed side by side where there are registers for both.
ESSA_INLINE WordVectors normals_and_next(const WordVectors& x, vi flip, vf z[4], const Philox& philox,
                                         uint32_t next_block) {
  if (W < 16) {
    normals(x, flip, z);
    return Philox::words(philox, next_block);
  }
  BoxMuller b;
  b.x = x;
  Philox::State next = Philox::begin(philox, next_block);
#pragma GCC unroll 8
  for (int k = 0; k < Philox::kRounds; ++k) {
    Philox::round(philox, k, next);
    BoxMuller::step(k, b);
  }
  BoxMuller::end(b, flip, z);
  return Philox::end(next);
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
