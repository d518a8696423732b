// The hardware's Block, which the arithmetic in *_block.h is written against, and its launch.
#pragma once
#include <cooperative_groups.h>

#include <initializer_list>
#include <limits>
#include <utility>

#include "essa_cuda.h"
#include "launch.h"
#include "scalar_types.h"
#include "svd_lora_block.h"

namespace essa {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxCluster = 8;             // the largest size every device with clusters can place
constexpr size_t kSharedLimit = 48 << 10;  // available without asking the driver

extern __shared__ float dynamic_shared[];

// Blocks parts * i .. parts * i + parts - 1 share row block i. Where clusters exist they are one cluster ("inner").
class DeviceBlock {
 public:
  __device__ explicit DeviceBlock(int parts) : parts_(parts) {}
  __device__ int thread() const { return threadIdx.x; }
  __device__ constexpr int threads() const { return kThreads; }
  __device__ int64_t row_block() const { return blockIdx.x / parts_; }
  __device__ int outer_part() const { return blockIdx.x % parts_; }
  __device__ int outer_parts() const { return parts_; }
  __device__ float* shared() const { return dynamic_shared; }
  __device__ void sync() const { __syncthreads(); }
  __device__ float warp_sum(float value) const {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
  }
#if __CUDA_ARCH__ >= 900
  __device__ int inner_part() const { return cooperative_groups::this_cluster().block_rank(); }
  __device__ int inner_parts() const { return cooperative_groups::this_cluster().num_blocks(); }
  __device__ const float* shared_of(int part) const {
    return cooperative_groups::this_cluster().map_shared_rank(dynamic_shared, part);
  }
  __device__ void cluster_sync() const { cooperative_groups::this_cluster().sync(); }
  __device__ void cluster_arrive() const { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
  __device__ void cluster_wait() const { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
#else
  __device__ int inner_part() const { return 0; }
  __device__ int inner_parts() const { return 1; }
  __device__ const float* shared_of(int) const { return dynamic_shared; }
  __device__ void cluster_sync() const { __syncthreads(); }
  __device__ void cluster_arrive() const {}
  __device__ void cluster_wait() const {}
#endif

 private:
  int parts_;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The kernels count everything but rows in int.
void check_sizes(const char* op, std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [name, value] : sizes)
    if (value < 0 || value > std::numeric_limits<int>::max())
      refuse("%s: %s is %lld, allowed are 0 .. 2147483647", op, name, (long long)value);
}

struct Grid {
  int rows_per_block, parts;
  bool cluster;
  size_t shared_bytes;
};

// `row_blocks` of them, in grid.parts blocks each.
template <class P>
void launch(const Grid& grid, int64_t row_blocks, void (*kernel)(P, int), const P& p, uintptr_t stream,
            const char* op) {
  cudaLaunchConfig_t config = {};
  const int64_t blocks = row_blocks * grid.parts;
  check_sizes(op, {{"blocks", blocks}});
  config.gridDim = dim3((unsigned)blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.parts;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, p, grid.parts);
  if (status != cudaSuccess) cudaGetLastError();
  check(status, op);
}

// Calls function(T()) with the type that dtype names.
template <class Function>
void with_type(int dtype, const char* op, const Function& function) {
  if (dtype == 0) return function(float());
  if (dtype == 1) return function(BFloat16());
  if (dtype == 2) return function(Float16());
  refuse("%s: dtype is %d, allowed are 0 (float32), 1 (bfloat16), 2 (float16)", op, dtype);
}

}  // namespace
}  // namespace cuda
}  // namespace essa
