// Host side of a launch: errors as exceptions, and the device that owns the data made current for the call.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "essa_cuda.h"

namespace essa {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fail("%s: %s (%s)", what, cudaGetErrorString(status), cudaGetErrorName(status));
}

// cudaGetLastError also clears the error, so that a refused launch is not reported again by the next one.
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }

class OnDeviceOf {
 public:
  OnDeviceOf(uintptr_t pointer, const char* what) {
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(pointer)), what);
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
      fail("%s: the result is not in device memory", what);
    check(cudaGetDevice(&previous_), what);
    device_ = attributes.device;
    if (device_ != previous_) check(cudaSetDevice(device_), what);
  }
  ~OnDeviceOf() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  int attribute(cudaDeviceAttr name, const char* what) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device_), what);
    return value;
  }

 private:
  int device_ = 0, previous_ = 0;
};

}  // namespace cuda
}  // namespace essa
