// The dtypes tensors are stored in: vectors of them, read as fp32 and rounded to nearest when written. `put_exact` has the
// same bits on every instruction set, `put` may flush bfloat16's subnormals to zero.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace essa {
namespace cpu {
namespace ESSA_ISA {

template <int>
struct Storage;

template <>
struct Storage<kFloat32> {
  typedef float Element;
  ESSA_INLINE vf get(const Element* p) { return load(p); }
  ESSA_INLINE void put(Element* p, vf a) { store(p, a); }
  ESSA_INLINE void put_exact(Element* p, vf a) { store(p, a); }
};

template <>
struct Storage<kBFloat16> {
  typedef uint16_t Element;
  ESSA_INLINE vf get(const Element* p) { return load_bf16(p); }
  ESSA_INLINE void put(Element* p, vf a) { store_bf16_fast(p, a); }
  ESSA_INLINE void put_exact(Element* p, vf a) { store_bf16(p, a); }
};

template <>
struct Storage<kFloat16> {
  typedef uint16_t Element;
  ESSA_INLINE vf get(const Element* p) { return load_fp16(p); }
  ESSA_INLINE void put(Element* p, vf a) { store_fp16(p, a); }
  ESSA_INLINE void put_exact(Element* p, vf a) { store_fp16(p, a); }
};

// Calls body(Storage<dtype>()).
template <class Body>
ESSA_INLINE void with_storage(int dtype, Body body) {
  if (dtype == kFloat32) body(Storage<kFloat32>());
  if (dtype == kBFloat16) body(Storage<kBFloat16>());
  if (dtype == kFloat16) body(Storage<kFloat16>());
}

}  // namespace ESSA_ISA
}  // namespace cpu
}  // namespace essa
