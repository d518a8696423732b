// svd_lora on the device: the kernels and the choice of grid. The arithmetic is in svd_lora_block.h.
#include "device_block.h"
#include "essa_cuda.h"
#include "svd_lora_block.h"

namespace essa {
namespace cuda {
namespace {

constexpr int kBlocksPerProcessor = 2;    // decode grids fill the device once: registers matter more than occupancy
constexpr int kMaxRows = 4;               // rows of x per block; 1 where the grid would leave the device idle
constexpr int kColumnsPerPass = kThreads * kColumnsPerThread;

template <int R, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    svd_lora_kernel(const __grid_constant__ SvdLora<T> p, int parts) {
  svd_lora_block<R>(DeviceBlock(parts), p);
}
template <int R, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    svd_lora_shrink_kernel(const __grid_constant__ SvdLora<T> p, int parts) {
  svd_lora_shrink_block<R>(DeviceBlock(parts), p);
}
template <int R, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    svd_lora_expand_kernel(const __grid_constant__ SvdLora<T> p, int parts) {
  svd_lora_expand_block<R>(DeviceBlock(parts), p);
}

template <class T>
using Kernel = void (*)(SvdLora<T>, int);

size_t shared_bytes(int rows_per_block, int r_a, int r_b) {
  return sizeof(float) * (size_t)shared_layout(rows_per_block, r_a, r_b, kThreads / kWarp).total;
}

// With clusters, as many parts as leave each some work. Without, d_in is not split and only d_out can fill the device.
Grid choose_grid(const OnDeviceOf& device, int64_t rows, int d_in, int d_out, int r_a, int r_b, const char* op) {
  const int processors = device.attribute(cudaDevAttrMultiProcessorCount, op);
  Grid grid = {};
  grid.cluster = device.attribute(cudaDevAttrComputeCapabilityMajor, op) >= 9;
  grid.parts = 1;
  if (grid.cluster) {
    const int longest = d_in > d_out ? d_in : d_out;
    while (grid.parts < kMaxCluster && longest >= 256 * grid.parts) grid.parts *= 2;
  } else if (d_out > 0) {
    const int64_t wanted = ceil_div(2 * processors, ceil_div(rows, kMaxRows));
    grid.parts = (int)(wanted < ceil_div(d_out, kColumnsPerPass) ? wanted : ceil_div(d_out, kColumnsPerPass));
  }
  const bool fills = ceil_div(rows, kMaxRows) * grid.parts * 2 > processors;
  grid.rows_per_block = fills && shared_bytes(kMaxRows, r_a, r_b) <= kSharedLimit ? kMaxRows : 1;
  grid.shared_bytes = shared_bytes(grid.rows_per_block, r_a, r_b);
  if (grid.shared_bytes > kSharedLimit)
    refuse("%s: ranks r_a %d and r_b %d need %lld bytes of shared memory, allowed are %lld", op, r_a, r_b,
           (long long)grid.shared_bytes, (long long)kSharedLimit);
  return grid;
}

}  // namespace

void svd_lora(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
              uintptr_t u_b, int64_t u_b_row_stride, int64_t u_b_column_stride, uintptr_t s_a, uintptr_t s_b,
              uintptr_t offsets, int64_t rows, int64_t members, int64_t d_in, int64_t d_out, int64_t r_a, int64_t r_b,
              int dtype, uintptr_t stream) {
  if (rows == 0 || d_out == 0) return;
  check_sizes("svd_lora", {{"members", members}, {"d_in", d_in}, {"d_out", d_out}, {"r_a", r_a}, {"r_b", r_b}});
  const OnDeviceOf device(y, "svd_lora");
  with_type(dtype, "svd_lora", [&](auto tag) {
    using T = decltype(tag);
    SvdLora<T> p = {};
    p.rows = rows;
    set_inputs(p, x, x_stride, v_a, core, s_a, s_b, offsets, members, d_in, r_a, r_b);
    set_outputs(p, y, y_stride, u_b, u_b_row_stride, u_b_column_stride, d_out, r_b);
    const Grid grid = choose_grid(device, rows, p.d_in, p.d_out, p.r_a, p.r_b, "svd_lora");
    const Kernel<T> kernel = grid.rows_per_block == 1 ? svd_lora_kernel<1, T> : svd_lora_kernel<kMaxRows, T>;
    launch(grid, ceil_div(rows, grid.rows_per_block), kernel, p, stream, "svd_lora");
  });
}

void svd_lora_shrink(uintptr_t h, int64_t h_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
                     uintptr_t s_a, uintptr_t s_b, uintptr_t offsets, int64_t rows, int64_t members, int64_t d_in,
                     int64_t r_a, int64_t r_b, int dtype, uintptr_t stream) {
  if (rows == 0 || r_b == 0) return;
  check_sizes("svd_lora_shrink", {{"members", members}, {"d_in", d_in}, {"r_a", r_a}, {"r_b", r_b}});
  const OnDeviceOf device(h, "svd_lora_shrink");
  with_type(dtype, "svd_lora_shrink", [&](auto tag) {
    using T = decltype(tag);
    SvdLora<T> p = {};
    p.rows = rows;
    set_inputs(p, x, x_stride, v_a, core, s_a, s_b, offsets, members, d_in, r_a, r_b);
    p.h = reinterpret_cast<float*>(h);
    p.h_stride = h_stride;
    const Grid grid = choose_grid(device, rows, p.d_in, 0, p.r_a, p.r_b, "svd_lora_shrink");
    const Kernel<T> kernel =
        grid.rows_per_block == 1 ? svd_lora_shrink_kernel<1, T> : svd_lora_shrink_kernel<kMaxRows, T>;
    launch(grid, ceil_div(rows, grid.rows_per_block), kernel, p, stream, "svd_lora_shrink");
  });
}

void svd_lora_expand(uintptr_t y, int64_t y_stride, uintptr_t h, int64_t h_stride, uintptr_t u_b,
                     int64_t u_b_row_stride, int64_t u_b_column_stride, int64_t rows, int64_t d_out, int64_t r_b,
                     int dtype, uintptr_t stream) {
  if (rows == 0 || d_out == 0) return;
  check_sizes("svd_lora_expand", {{"d_out", d_out}, {"r_b", r_b}});
  const OnDeviceOf device(y, "svd_lora_expand");
  with_type(dtype, "svd_lora_expand", [&](auto tag) {
    using T = decltype(tag);
    SvdLora<T> p = {};
    p.rows = rows;
    p.h = reinterpret_cast<float*>(h);
    p.h_stride = h_stride;
    set_outputs(p, y, y_stride, u_b, u_b_row_stride, u_b_column_stride, d_out, r_b);
    // Blocks share nothing here: the split is that of a cluster, but none is launched.
    Grid grid = choose_grid(device, rows, 0, p.d_out, 1, p.r_b, "svd_lora_expand");
    grid.cluster = false;
    const Kernel<T> kernel =
        grid.rows_per_block == 1 ? svd_lora_expand_kernel<1, T> : svd_lora_expand_kernel<kMaxRows, T>;
    launch(grid, ceil_div(rows, grid.rows_per_block), kernel, p, stream, "svd_lora_expand");
  });
}

}  // namespace cuda
}  // namespace essa
