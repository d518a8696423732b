// Exponentials for the kernels that are held to a tolerance; the noise contract has its own functions.
// Polynomials: Moshier, Cephes (expf, tanhf), about one unit in the last place.
#pragma once
#include "simd.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {

// e^x, held within the normal numbers: below 2^-126 it gives 2^-126, above 2^127 about that.
ESSA_INLINE vf exp(vf x) {
  x = min(set1(88.02f), max(set1(-87.33654f), x));
  const vf shift = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const vf shifted = muladd(x, set1(1.44269504f), shift);
  const vf n = sub(shifted, shift);
  const vf r = muladd(n, set1(2.12194440e-4f), muladd(n, set1(-0.693359375f), x));
  vf p = muladd(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = muladd(p, r, set1(8.3334519073e-3f));
  p = muladd(p, r, set1(4.1665795894e-2f));
  p = muladd(p, r, set1(1.6666665459e-1f));
  p = muladd(p, r, set1(5.0000001201e-1f));
  p = muladd(p, mul(r, r), add(r, set1(1.0f)));
  return mul(p, as_float(shl<23>(addi(as_int(shifted), seti(127)))));
}

ESSA_INLINE vf tanh(vf x) {
  const vf size = as_float(andi(as_int(x), seti(0x7fffffffu)));
  const vf square = mul(x, x);
  vf p = muladd(set1(-5.70498872745e-3f), square, set1(2.06390887954e-2f));
  p = muladd(p, square, set1(-5.37397155531e-2f));
  p = muladd(p, square, set1(1.33314422036e-1f));
  p = muladd(p, square, set1(-3.33332819422e-1f));
  const vf small = muladd(mul(p, square), x, x);
  const vf large = sub(set1(1.0f), div(set1(2.0f), add(exp(add(size, size)), set1(1.0f))));
  const vf sign = as_float(andi(as_int(x), seti(0x80000000u)));
  return select_less(size, set1(0.625f), small, as_float(ori(as_int(large), as_int(sign))));
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
