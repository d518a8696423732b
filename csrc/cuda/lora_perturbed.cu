// lora_perturbed on the device: the kernels and the choice of grid. The arithmetic is in lora_perturbed_block.h.
#include "device_block.h"
#include "essa_cuda.h"
#include "lora_perturbed_block.h"

namespace essa {
namespace cuda {
namespace {

constexpr int kBlocksPerProcessor = 2;
constexpr int kMostRows = 4;     // of a pair at once; 2 where members have one row each, or the rank is large
constexpr int kLeastColumns = 512;  // of the longer dimension, for each block of a cluster

template <int R, class T, class P>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    lora_perturbed_kernel(const __grid_constant__ LoraPerturbed<T, P> p, int parts) {
  lora_perturbed_block<R>(DeviceBlock(parts), p);
}

size_t perturbed_shared_bytes(int rows_at_once, int rank) {
  return sizeof(float) * (size_t)perturbed_layout(rows_at_once, rank, kThreads / kWarp).total;
}

// As many parts as leave each some work and, all together, fill the device. Without clusters every part draws all of A's
// noise again, so that there are but few.
Grid choose_grid(const OnDeviceOf& device, int64_t rows, int64_t groups, int d_in, int d_out, int rank) {
  constexpr const char* kOp = "lora_perturbed";
  const int processors = device.attribute(cudaDevAttrMultiProcessorCount, kOp);
  Grid grid = {};
  grid.cluster = device.attribute(cudaDevAttrComputeCapabilityMajor, kOp) >= 9;
  grid.parts = 1;
  const int most = grid.cluster ? kMaxCluster : 2, longest = d_in > d_out ? d_in : d_out;
  while (grid.parts < most && longest >= 2 * kLeastColumns * grid.parts && groups * grid.parts < 4 * processors)
    grid.parts *= 2;
  grid.rows_per_block = rows > groups && perturbed_shared_bytes(kMostRows, rank) <= kSharedLimit ? kMostRows : 2;
  grid.shared_bytes = perturbed_shared_bytes(grid.rows_per_block, rank);
  if (grid.shared_bytes > kSharedLimit)
    refuse("%s: rank %d needs %lld bytes of shared memory, allowed are %lld", kOp, rank,
           (long long)grid.shared_bytes, (long long)kSharedLimit);
  return grid;
}

}  // namespace

void lora_perturbed(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t a, uintptr_t b,
                    int64_t b_row_stride, int64_t b_column_stride, uint64_t seed, uint32_t generation, uint32_t site,
                    double sigma, uintptr_t members, uintptr_t offsets, double scaling, bool rademacher, int64_t rows,
                    int64_t groups, int64_t d_in, int64_t d_out, int64_t rank, int dtype, int parameter_dtype,
                    uintptr_t stream) {
  if (rows == 0) return;
  check_sizes("lora_perturbed", {{"groups", groups}, {"d_in", d_in}, {"d_out", d_out}, {"rank", rank}});
  const OnDeviceOf device(y, "lora_perturbed");
  const auto run = [&](auto x_tag, auto parameter_tag) {
    using T = decltype(x_tag);
    using P = decltype(parameter_tag);
    LoraPerturbed<T, P> p = {};
    p.y = reinterpret_cast<T*>(y), p.y_stride = y_stride;
    p.x = reinterpret_cast<const T*>(x), p.x_stride = x_stride;
    p.a = reinterpret_cast<const P*>(a), p.b = reinterpret_cast<const P*>(b);
    p.b_row_stride = b_row_stride, p.b_column_stride = b_column_stride;
    p.members = reinterpret_cast<const int64_t*>(members), p.offsets = reinterpret_cast<const int64_t*>(offsets);
    p.groups = (int)groups, p.d_in = (int)d_in, p.d_out = (int)d_out, p.rank = (int)rank;
    p.sigma = (float)sigma, p.scaling = (float)scaling, p.rademacher = rademacher;
    p.key = noise::Key{(uint32_t)seed, (uint32_t)(seed >> 32), site, 0, generation};
    const Grid grid = choose_grid(device, rows, groups, p.d_in, p.d_out, p.rank);
    const auto kernel = grid.rows_per_block == 2 ? lora_perturbed_kernel<2, T, P> : lora_perturbed_kernel<kMostRows, T, P>;
    launch(grid, groups, kernel, p, stream, "lora_perturbed");
  };
  with_type(dtype, "lora_perturbed", [&](auto tag) { parameter_dtype == 0 ? run(tag, float()) : run(tag, tag); });
}

}  // namespace cuda
}  // namespace essa
