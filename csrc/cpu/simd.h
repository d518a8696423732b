// One vocabulary of vector operations for three widths, so that each kernel is written once and compiled per
// instruction set: 4 lanes (baseline: compiler vectors, any architecture), 8 (AVX2+FMA+F16C), 16 (AVX-512 F/BW/VL/DQ).
// Everything lives in a namespace named after the instruction set: no inline function is shared between objects.
#pragma once
#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(ESSA_LANES) && ESSA_LANES != (defined(__AVX512F__) ? 16 : defined(__AVX2__) ? 8 : 4)
#error "the compiler's flags ask for another instruction set than ESSA_ISA names; is one in CXXFLAGS?"
#endif
#ifndef ESSA_ISA
#error "compile with -DESSA_ISA=baseline|avx2|avx512|avx512bf16"
#endif

namespace essa {
namespace cpu {
namespace ESSA_ISA {

#define ESSA_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

constexpr int W = 16;
typedef __m512 vf;
typedef __m512i vi;  // 32-bit lanes, or 64-bit lanes where a function says so

ESSA_INLINE vf set1(float a) { return _mm512_set1_ps(a); }
ESSA_INLINE vf zero() { return _mm512_setzero_ps(); }
ESSA_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
ESSA_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
ESSA_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
ESSA_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
ESSA_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
ESSA_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
ESSA_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }  // of max and min: b where either is NaN
ESSA_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
// where a < b: x, else y
ESSA_INLINE vf select_less(vf a, vf b, vf x, vf y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
ESSA_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
ESSA_INLINE vf sqrt(vf a) { return _mm512_sqrt_ps(a); }
ESSA_INLINE float sum(vf a) { return _mm512_reduce_add_ps(a); }
ESSA_INLINE float greatest(vf a) { return _mm512_reduce_max_ps(a); }
ESSA_INLINE vi seti(uint32_t a) { return _mm512_set1_epi32((int)a); }
ESSA_INLINE vi andi(vi a, vi b) { return _mm512_and_si512(a, b); }
ESSA_INLINE vi ori(vi a, vi b) { return _mm512_or_si512(a, b); }
ESSA_INLINE vi xori(vi a, vi b) { return _mm512_xor_si512(a, b); }
ESSA_INLINE vi xor3(vi a, vi b, vi c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
ESSA_INLINE vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
ESSA_INLINE vi subi(vi a, vi b) { return _mm512_sub_epi32(a, b); }
template <int N>
ESSA_INLINE vi shl(vi a) { return _mm512_slli_epi32(a, N); }
template <int N>
ESSA_INLINE vi shr(vi a) { return _mm512_srli_epi32(a, N); }
template <int N>
ESSA_INLINE vi sar(vi a) { return _mm512_srai_epi32(a, N); }
ESSA_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
ESSA_INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a); }
ESSA_INLINE vi as_int(vf a) { return _mm512_castps_si512(a); }
// where bit 1 of `word` is set: b, else a
ESSA_INLINE vf select_bit1(vi word, vf a, vf b) {
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(word, _mm512_set1_epi32(2)), a, b);
}
// 64-bit lanes
ESSA_INLINE vi seti64(uint32_t a) { return _mm512_set1_epi64((long long)a); }
ESSA_INLINE vi even_lanes64() { return _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14); }
ESSA_INLINE vi addi64(vi a, vi b) { return _mm512_add_epi64(a, b); }
ESSA_INLINE vi mul_low32(vi a, vi b) { return _mm512_mul_epu32(a, b); }
ESSA_INLINE vi high32(vi a) { return _mm512_srli_epi64(a, 32); }
ESSA_INLINE vi interleave32(vi even, vi odd) {
  return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

// Four floats from each of four places, one place per 128-bit lane.
ESSA_INLINE vf load_lanes(const float* p, int64_t stride) {
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
  const __m256 high =
      _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 2 * stride)), _mm_loadu_ps(p + 3 * stride), 1);
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
// Within each 128-bit lane, the 4x4 matrix whose rows are four vectors.
ESSA_INLINE void transpose_lanes(vf m[4]) {
  const vf a = _mm512_unpacklo_ps(m[0], m[1]), b = _mm512_unpackhi_ps(m[0], m[1]);
  const vf c = _mm512_unpacklo_ps(m[2], m[3]), d = _mm512_unpackhi_ps(m[2], m[3]);
  m[0] = _mm512_shuffle_ps(a, c, 0x44), m[1] = _mm512_shuffle_ps(a, c, 0xee);
  m[2] = _mm512_shuffle_ps(b, d, 0x44), m[3] = _mm512_shuffle_ps(b, d, 0xee);
}

// The 4x4 matrix of 128-bit lanes whose rows are four vectors.
ESSA_INLINE void exchange_lanes(vi m[4]) {
  const vi a = _mm512_shuffle_i32x4(m[0], m[1], 0x44), b = _mm512_shuffle_i32x4(m[0], m[1], 0xee);
  const vi c = _mm512_shuffle_i32x4(m[2], m[3], 0x44), d = _mm512_shuffle_i32x4(m[2], m[3], 0xee);
  m[0] = _mm512_shuffle_i32x4(a, c, 0x88), m[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  m[2] = _mm512_shuffle_i32x4(b, d, 0x88), m[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}
// The first `left` lanes, or all.
ESSA_INLINE __mmask16 lanes_left(int64_t left) { return left >= 16 ? 0xffff : (1 << left) - 1; }

ESSA_INLINE vf load_bf16(const uint16_t* p) {
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
ESSA_INLINE void store_bf16(uint16_t* p, vf a) {
  const __m512i bits = as_int(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
ESSA_INLINE vf load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
ESSA_INLINE void store_fp16(uint16_t* p, vf a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

constexpr int W = 8;
typedef __m256 vf;
typedef __m256i vi;

ESSA_INLINE vf set1(float a) { return _mm256_set1_ps(a); }
ESSA_INLINE vf zero() { return _mm256_setzero_ps(); }
ESSA_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
ESSA_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
ESSA_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
ESSA_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
ESSA_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
ESSA_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
ESSA_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
ESSA_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
ESSA_INLINE vf select_less(vf a, vf b, vf x, vf y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
ESSA_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
ESSA_INLINE vf sqrt(vf a) { return _mm256_sqrt_ps(a); }
ESSA_INLINE float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
ESSA_INLINE float greatest(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
ESSA_INLINE vi seti(uint32_t a) { return _mm256_set1_epi32((int)a); }
ESSA_INLINE vi andi(vi a, vi b) { return _mm256_and_si256(a, b); }
ESSA_INLINE vi ori(vi a, vi b) { return _mm256_or_si256(a, b); }
ESSA_INLINE vi xori(vi a, vi b) { return _mm256_xor_si256(a, b); }
ESSA_INLINE vi xor3(vi a, vi b, vi c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
ESSA_INLINE vi addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
ESSA_INLINE vi subi(vi a, vi b) { return _mm256_sub_epi32(a, b); }
template <int N>
ESSA_INLINE vi shl(vi a) { return _mm256_slli_epi32(a, N); }
template <int N>
ESSA_INLINE vi shr(vi a) { return _mm256_srli_epi32(a, N); }
template <int N>
ESSA_INLINE vi sar(vi a) { return _mm256_srai_epi32(a, N); }
ESSA_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
ESSA_INLINE vf as_float(vi a) { return _mm256_castsi256_ps(a); }
ESSA_INLINE vi as_int(vf a) { return _mm256_castps_si256(a); }
ESSA_INLINE vf select_bit1(vi word, vf a, vf b) {
  return _mm256_blendv_ps(a, b, as_float(_mm256_slli_epi32(word, 30)));
}
ESSA_INLINE vi seti64(uint32_t a) { return _mm256_set1_epi64x((long long)a); }
ESSA_INLINE vi even_lanes64() { return _mm256_setr_epi64x(0, 2, 4, 6); }
ESSA_INLINE vi addi64(vi a, vi b) { return _mm256_add_epi64(a, b); }
ESSA_INLINE vi mul_low32(vi a, vi b) { return _mm256_mul_epu32(a, b); }
ESSA_INLINE vi high32(vi a) { return _mm256_srli_epi64(a, 32); }
ESSA_INLINE vi interleave32(vi even, vi odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }

ESSA_INLINE vf load_lanes(const float* p, int64_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
ESSA_INLINE void transpose_lanes(vf m[4]) {
  const vf a = _mm256_unpacklo_ps(m[0], m[1]), b = _mm256_unpackhi_ps(m[0], m[1]);
  const vf c = _mm256_unpacklo_ps(m[2], m[3]), d = _mm256_unpackhi_ps(m[2], m[3]);
  m[0] = _mm256_shuffle_ps(a, c, 0x44), m[1] = _mm256_shuffle_ps(a, c, 0xee);
  m[2] = _mm256_shuffle_ps(b, d, 0x44), m[3] = _mm256_shuffle_ps(b, d, 0xee);
}

ESSA_INLINE vf load_bf16(const uint16_t* p) {
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
ESSA_INLINE void store_bf16(uint16_t* p, vf a) {
  const __m256i bits = as_int(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  rounded = as_int(_mm256_blendv_ps(as_float(rounded), as_float(quiet), _mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
}
ESSA_INLINE vf load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
ESSA_INLINE void store_fp16(uint16_t* p, vf a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else  // compiler vectors of four lanes

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vi __attribute__((vector_size(16)));
typedef int32_t vs __attribute__((vector_size(16)));
typedef uint64_t vl __attribute__((vector_size(16)));

ESSA_INLINE vf set1(float a) { return vf{a, a, a, a}; }
ESSA_INLINE vf zero() { return vf{}; }
ESSA_INLINE vf load(const float* p) {
  vf a;
  __builtin_memcpy(&a, p, 16);
  return a;
}
ESSA_INLINE void store(float* p, vf a) { __builtin_memcpy(p, &a, 16); }
ESSA_INLINE vf add(vf a, vf b) { return a + b; }
ESSA_INLINE vf sub(vf a, vf b) { return a - b; }
ESSA_INLINE vf mul(vf a, vf b) { return a * b; }
ESSA_INLINE vf div(vf a, vf b) { return a / b; }
ESSA_INLINE vf select_less(vf a, vf b, vf x, vf y) {
  const vi mask = (vi)(a < b);
  return (vf)(((vi)x & mask) | ((vi)y & ~mask));
}
ESSA_INLINE vf max(vf a, vf b) { return select_less(b, a, a, b); }
ESSA_INLINE vf min(vf a, vf b) { return select_less(a, b, a, b); }
// One rounding, by the machine's instruction or by libm: the noise contract needs it.
ESSA_INLINE vf fma(vf a, vf b, vf c) {
  return vf{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
            __builtin_fmaf(a[3], b[3], c[3])};
}
ESSA_INLINE vf sqrt(vf a) {
  return vf{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
ESSA_INLINE float sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
ESSA_INLINE float greatest(vf a) {
  const float even = a[0] > a[2] ? a[0] : a[2], odd = a[1] > a[3] ? a[1] : a[3];
  return even > odd ? even : odd;
}
ESSA_INLINE vi seti(uint32_t a) { return vi{a, a, a, a}; }
ESSA_INLINE vi andi(vi a, vi b) { return a & b; }
ESSA_INLINE vi ori(vi a, vi b) { return a | b; }
ESSA_INLINE vi xori(vi a, vi b) { return a ^ b; }
ESSA_INLINE vi xor3(vi a, vi b, vi c) { return a ^ b ^ c; }
ESSA_INLINE vi addi(vi a, vi b) { return a + b; }
ESSA_INLINE vi subi(vi a, vi b) { return a - b; }
template <int N>
ESSA_INLINE vi shl(vi a) { return a << N; }
template <int N>
ESSA_INLINE vi shr(vi a) { return a >> N; }
template <int N>
ESSA_INLINE vi sar(vi a) { return (vi)((vs)a >> N); }
ESSA_INLINE vf to_float(vi a) { return __builtin_convertvector((vs)a, vf); }
ESSA_INLINE vf as_float(vi a) { return (vf)a; }
ESSA_INLINE vi as_int(vf a) { return (vi)a; }
ESSA_INLINE vf select_bit1(vi word, vf a, vf b) {
  const vi mask = (vi)((vs)(word << 30) >> 31);
  return (vf)(((vi)a & ~mask) | ((vi)b & mask));
}
ESSA_INLINE vi seti64(uint32_t a) { return (vi)vl{a, a}; }
ESSA_INLINE vi even_lanes64() { return (vi)vl{0, 2}; }
ESSA_INLINE vi addi64(vi a, vi b) { return (vi)((vl)a + (vl)b); }
ESSA_INLINE vi mul_low32(vi a, vi b) { return (vi)(((vl)a & 0xffffffffu) * ((vl)b & 0xffffffffu)); }
ESSA_INLINE vi high32(vi a) { return (vi)((vl)a >> 32); }
ESSA_INLINE vi interleave32(vi even, vi odd) { return (vi)(((vl)even & 0xffffffffu) | ((vl)odd << 32)); }

ESSA_INLINE vf load_lanes(const float* p, int64_t) { return load(p); }
ESSA_INLINE void transpose_lanes(vf m[4]) {
  const vf a = m[0], b = m[1], c = m[2], d = m[3];
  for (int i = 0; i < 4; ++i) m[i] = vf{a[i], b[i], c[i], d[i]};
}

ESSA_INLINE vf load_bf16(const uint16_t* p) {
  return (vf)vi{(uint32_t)p[0] << 16, (uint32_t)p[1] << 16, (uint32_t)p[2] << 16, (uint32_t)p[3] << 16};
}
ESSA_INLINE void store_bf16(uint16_t* p, vf a) {
  for (int i = 0; i < W; ++i) {
    const uint32_t bits = ((vi)a)[i];
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i] = (uint16_t)((nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
ESSA_INLINE float fp16_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // subnormal: exact in fp32
    value = (float)magnitude * 0x1p-24f;
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
  }
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
ESSA_INLINE uint16_t float_to_fp16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal result: adding 1/2 rounds to a multiple of 2^-24
    float shifted;
    __builtin_memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    uint32_t out;
    __builtin_memcpy(&out, &shifted, 4);
    return (uint16_t)(sign | (out - 0x3f000000u));
  }
  return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}
ESSA_INLINE vf load_fp16(const uint16_t* p) {
  return vf{fp16_to_float(p[0]), fp16_to_float(p[1]), fp16_to_float(p[2]), fp16_to_float(p[3])};
}
ESSA_INLINE void store_fp16(uint16_t* p, vf a) {
  for (int i = 0; i < W; ++i) p[i] = float_to_fp16(a[i]);
}

#endif

// out[k] = sum(a[k])
template <int K>
ESSA_INLINE void store_sums(const vf* a, float* out) {
#if defined(__AVX512F__)
  if constexpr (K == 8) {  // a third of the instructions of eight sums
    vf fours[2];
    for (int q = 0; q < 2; ++q) {
      vf m[4] = {a[4 * q], a[4 * q + 1], a[4 * q + 2], a[4 * q + 3]};
      transpose_lanes(m);
      fours[q] = add(add(m[0], m[1]), add(m[2], m[3]));
    }
    const vf halves = add(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44), _mm512_shuffle_f32x4(fours[0], fours[1], 0xee));
    const vf whole = add(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(whole));
    _mm_storeu_ps(out + 4, _mm512_extractf32x4_ps(whole, 2));
    return;
  }
#endif
  for (int k = 0; k < K; ++k) out[k] = sum(a[k]);
}

// 2 * W adjacent bfloat16: one shift and one mask widen two vectors.
ESSA_INLINE void load_bf16_even_odd(const uint16_t* p, vf* even, vf* odd) {
  vi both;
  __builtin_memcpy(&both, p, sizeof(both));
  *even = as_float(shl<16>(both)), *odd = as_float(andi(both, seti(0xffff0000u)));
}

// `store_bf16` for what is held to a tolerance: the machine's instruction flushes subnormals to zero.
#if defined(__AVX512BF16__)
ESSA_INLINE void store_bf16_fast(uint16_t* p, vf a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a)); }
#else
ESSA_INLINE void store_bf16_fast(uint16_t* p, vf a) { store_bf16(p, a); }
#endif

// A matrix product needs no single rounding: without an FMA instruction multiply and add.
#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
ESSA_INLINE vf muladd(vf a, vf b, vf c) { return fma(a, b, c); }
#else
ESSA_INLINE vf muladd(vf a, vf b, vf c) { return add(mul(a, b), c); }
#endif

// The rows that come next, while these are computed: they are strided, and the base layer's weights have pushed them out
// of the cache. An address past the end does no harm.
ESSA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
