// What this machine offers, in words.
#include <cstdarg>
#include <cstdio>

#include "essa_cuda.h"
#include "launch.h"

namespace essa {
namespace cuda {
namespace {

struct Text {
  char* end;
  size_t left;

  void add(const char* format, ...) {
    va_list values;
    va_start(values, format);
    const int wanted = vsnprintf(end, left, format, values);
    va_end(values);
    if (wanted < 0 || left == 0) return;
    const size_t written = (size_t)wanted < left ? wanted : left - 1;
    end += written;
    left -= written;
  }
};

}  // namespace

void device_report(char* text, size_t size) {
  Text report{text, size};
  int driver = 0, count = 0, usable = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    report.add("unavailable: no NVIDIA driver is installed");
    return;
  }
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    report.add("unavailable: %s; ", cudaGetErrorString(status));
  } else if (count == 0) {
    report.add("unavailable: no CUDA device; ");
  }
  for (int device = 0; status == cudaSuccess && device < count; ++device) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess) usable += major >= 8;
  }
  if (count > 0 && usable == 0) report.add("unavailable: no device of compute capability 8.0 or newer; ");
  report.add("driver for CUDA %d.%d, built with CUDA %d.%d", driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
             CUDART_VERSION % 1000 / 10);
  for (int device = 0; status == cudaSuccess && device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
      cudaGetLastError();
      report.add("; device %d: not readable", device);
      continue;
    }
    report.add("; device %d: %s, compute capability %d.%d, %d multiprocessors, %zu MiB", device, properties.name,
               properties.major, properties.minor, properties.multiProcessorCount, properties.totalGlobalMem >> 20);
    if (properties.major < 8) report.add(" (too old: 8.0 or newer is needed)");
  }
}

}  // namespace cuda
}  // namespace essa
