// Noise fills. The work of a thread is in noise_fill.h; here are the grids.
#include "essa_cuda.h"
#include "launch.h"
#include "noise_fill.h"

namespace essa {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ uint64_t thread_index() { return (uint64_t)blockIdx.x * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) gaussian_kernel(Fill fill) { gaussian_thread(fill, thread_index()); }
__global__ void __launch_bounds__(kThreads) rademacher_kernel(Fill fill) { rademacher_thread(fill, thread_index()); }

unsigned blocks(const Fill& fill, int threads_per_tile) {
  return (unsigned)(((uint64_t)fill.tiles * threads_per_tile + kThreads - 1) / kThreads);
}

}  // namespace

void gaussian(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
              uint64_t member, uintptr_t stream) {
  if (rows == 0 || cols == 0) return;
  const OnDeviceOf device(out, "gaussian");
  const Fill fill =
      make_fill(reinterpret_cast<float*>(out), rows, cols, seed, generation, site, member, noise::kGaussianTile);
  gaussian_kernel<<<blocks(fill, kGaussianThreadsPerTile), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      fill);
  check_launch("gaussian");
}

void rademacher(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
                uint64_t member, uintptr_t stream) {
  if (rows == 0 || cols == 0) return;
  const OnDeviceOf device(out, "rademacher");
  const Fill fill =
      make_fill(reinterpret_cast<float*>(out), rows, cols, seed, generation, site, member, noise::kRademacherTile);
  rademacher_kernel<<<blocks(fill, kRademacherThreadsPerTile), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      fill);
  check_launch("rademacher");
}

}  // namespace cuda
}  // namespace essa
