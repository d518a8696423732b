// Tensors as their framework hands them over through DLPack's C exchange API, without any of its headers. What an op's
// checks need of a tensor comes in one call of some 30 ns; from Python each property costs more than that.
#pragma once
#include <stdint.h>

#include <initializer_list>

#include "cpu/kernels.h"

namespace essa {

// DLPack's own structs, in their layout: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* older;
  void *allocate, *from_object, *to_object;  // not used here
  int (*view_object)(void* object, DLTensor* view);  // 0, or -1 with a Python exception set; needs the GIL
  void* current_stream;
};

constexpr int32_t kCpuDevice = 1;
constexpr int kInt64 = -1;  // beside cpu::DType
constexpr int kOtherDType = -2;

struct Tensor : DLTensor {
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data) + byte_offset; }

  int dtype() const {
    const int code = dtype_lanes == 1 ? dtype_code << 8 | dtype_bits : 0;
    return code == (2 << 8 | 32)   ? cpu::kFloat32
           : code == (4 << 8 | 16) ? cpu::kBFloat16
           : code == (2 << 8 | 16) ? cpu::kFloat16
           : code == (0 << 8 | 64) ? kInt64
                                   : kOtherDType;
  }

  bool has_shape(std::initializer_list<int64_t> sizes) const {
    if (ndim != static_cast<int32_t>(sizes.size())) return false;
    const int64_t* mine = shape;
    for (int64_t size : sizes)
      if (*mine++ != size) return false;
    return true;
  }

  int64_t count() const {
    int64_t elements = 1;
    for (int32_t dim = 0; dim < ndim; ++dim) elements *= shape[dim];
    return elements;
  }

  bool is_contiguous() const {
    int64_t stride = 1;
    bool adjacent = true;
    for (int32_t dim = ndim - 1; dim >= 0; --dim) {
      if (shape[dim] == 0) return true;
      adjacent = adjacent && (shape[dim] == 1 || strides[dim] == stride);
      stride *= shape[dim];
    }
    return adjacent;
  }

  // A contiguous tensor of that dtype and shape.
  bool is(int dtype, std::initializer_list<int64_t> sizes) const {
    return this->dtype() == dtype && has_shape(sizes) && is_contiguous();
  }

  bool is_beside(const Tensor& other) const {
    return device_type == other.device_type && device_id == other.device_id;
  }
};

// A tensor [..., d] as rows of adjacent elements, all at one stride.
struct Rows {
  int64_t count = 1, stride = 0;

  // False where the tensor is not that.
  bool take(const Tensor& tensor) {
    const int32_t last = tensor.ndim - 1;
    if (last < 0 || (tensor.strides[last] != 1 && tensor.shape[last] != 1)) return false;
    bool even = true;
    for (int32_t dim = last - 1; dim >= 0; --dim) {
      if (tensor.shape[dim] == 1) continue;
      if (count == 1) stride = tensor.strides[dim];
      even = even && tensor.strides[dim] == count * stride;
      count *= tensor.shape[dim];
    }
    return even || count == 0;
  }
};

}  // namespace essa
