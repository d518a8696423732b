// What this machine offers, in words.
#include "essa_cuda.h"
#include "launch.h"

namespace essa {
namespace cuda {
namespace {

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string device_report() {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "unavailable: no NVIDIA driver is installed";
  const std::string head = "driver for CUDA " + version(driver) + ", built with CUDA " + version(CUDART_VERSION);
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return "unavailable: " + std::string(cudaGetErrorString(status)) + " (" + head + ")";
  }
  if (count == 0) return "unavailable: no CUDA device (" + head + ")";
  std::string report = head;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    report += "; device " + std::to_string(device) + ": ";
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
      cudaGetLastError();
      report += "not readable";
      continue;
    }
    report += std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." +
              std::to_string(properties.minor) + ", " + std::to_string(properties.multiProcessorCount) +
              " multiprocessors, " + std::to_string(properties.totalGlobalMem >> 20) + " MiB";
    if (properties.major < 8) report += " (too old: 8.0 or newer is needed)";
  }
  return report;
}

}  // namespace cuda
}  // namespace essa
