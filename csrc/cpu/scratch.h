// Rows as float32 and back, and the pieces of a thread's buffer that hold them.
#pragma once
#include <string.h>

#include "kernels.h"
#include "simd.h"
#include "storage.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements as float32.
template <class S>
inline void widen(const typename S::Element* in, int64_t n, float* out) {
  int64_t at = 0;
  for (; at + W <= n; at += W) store(out + at, S::get(in + at));
  if (at == n) return;
  typename S::Element rest[W] = {};
  alignas(64) float values[W];
  memcpy(rest, in + at, (n - at) * sizeof(*in));
  store(values, S::get(rest));
  memcpy(out + at, values, (n - at) * sizeof(float));
}

template <class S>
inline void narrow(const float* in, int64_t n, typename S::Element* out) {
  int64_t at = 0;
  for (; at + W <= n; at += W) S::put(out + at, load(in + at));
  if (at == n) return;
  alignas(64) float rest[W] = {};
  typename S::Element values[W];
  memcpy(rest, in + at, (n - at) * sizeof(float));
  S::put(values, load(rest));
  memcpy(out + at, values, (n - at) * sizeof(*out));
}

// Gives out pieces of one buffer, aligned to cache lines. Without a buffer it only counts.
struct Pieces {
  float* base;
  int64_t used = 0;
  template <class Word>
  Word* take(int64_t words) {
    Word* piece = base == nullptr ? nullptr : (Word*)(base + used);
    used += round_up(words, 16);
    return piece;
  }
};

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
