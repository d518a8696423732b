// perturb_ and es_update_ on lists of tensors. The work of a thread is in es_update_thread.h; here the lists are cut into
// launches, whose arguments hold the tensors' addresses: nothing is copied to the device, so a graph can capture them.
#include "es_update_thread.h"
#include "essa_cuda.h"
#include "launch.h"

namespace essa {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kTilesPerLaunch = 1u << 31;

__device__ uint64_t thread_index() { return (uint64_t)blockIdx.x * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) perturb_gaussian_kernel(const __grid_constant__ EsUpdate p) {
  perturb_gaussian_thread(p, thread_index());
}
__global__ void __launch_bounds__(kThreads) perturb_rademacher_kernel(const __grid_constant__ EsUpdate p) {
  perturb_rademacher_thread(p, thread_index());
}
__global__ void __launch_bounds__(kThreads) update_gaussian_kernel(const __grid_constant__ EsUpdate p) {
  update_gaussian_thread(p, thread_index());
}
__global__ void __launch_bounds__(kThreads) update_rademacher_kernel(const __grid_constant__ EsUpdate p) {
  update_rademacher_thread(p, thread_index());
}

void launch(const EsUpdate& p, bool rademacher, bool perturbs, cudaStream_t stream, const char* what) {
  const uint64_t threads = (uint64_t)p.tensors[p.count - 1].tiles_end *
                           (rademacher ? kRademacherUpdateThreads : kGaussianUpdateThreads);
  const unsigned blocks = (unsigned)((threads + kThreads - 1) / kThreads);
  if (rademacher) {
    perturbs ? perturb_rademacher_kernel<<<blocks, kThreads, 0, stream>>>(p)
             : update_rademacher_kernel<<<blocks, kThreads, 0, stream>>>(p);
  } else {
    perturbs ? perturb_gaussian_kernel<<<blocks, kThreads, 0, stream>>>(p)
             : update_gaussian_kernel<<<blocks, kThreads, 0, stream>>>(p);
  }
  check_launch(what);
}

// Fills p.tensors as often as the list needs.
void run(EsUpdate& p, const TensorList& list, bool rademacher, bool perturbs, uintptr_t stream, const char* what) {
  const int tile = rademacher ? noise::kRademacherTile : noise::kGaussianTile;
  for (int64_t i = 0; i < list.count;) {
    p.count = 0;
    uint32_t end = 0;
    uintptr_t any = 0;
    for (; i < list.count && p.count < kTensorsPerLaunch; ++i) {
      const int64_t tiles_per_row = noise::tiles_per_row(list.cols[i], tile), tiles = list.rows[i] * tiles_per_row;
      if (tiles == 0) continue;
      if (end + tiles > kTilesPerLaunch) break;
      end += (uint32_t)tiles;
      any = list.data[i];
      p.tensors[p.count++] = NoisyTensor{reinterpret_cast<void*>(any), list.cols[i], (uint32_t)tiles_per_row, end,
                                         p.key.site + 2 * (uint32_t)i, list.dtypes[i]};
    }
    if (p.count == 0) return;
    const OnDeviceOf device(any, what);
    launch(p, rademacher, perturbs, reinterpret_cast<cudaStream_t>(stream), what);
  }
}

noise::Key make_key(uint64_t seed, uint32_t generation, uint32_t site, uint64_t member) {
  return noise::Key{(uint32_t)seed, (uint32_t)(seed >> 32), site, (uint32_t)(member >> 1), generation};
}

}  // namespace

void perturb(const TensorList& list, uint64_t seed, uint32_t generation, uint32_t site, uint64_t member, float sigma,
             bool rademacher, uintptr_t stream) {
  EsUpdate p = {};
  p.key = make_key(seed, generation, site, member);
  p.sigma = (member & 1) != 0 ? -sigma : sigma;
  run(p, list, rademacher, true, stream, "perturb_");
}

void es_update(const TensorList& list, uint64_t seed, uint32_t generation, uint32_t site, uintptr_t pair_weights,
               int64_t pairs, bool rademacher, uintptr_t stream) {
  EsUpdate p = {};
  p.key = make_key(seed, generation, site, 0);
  p.pair_weights = reinterpret_cast<const float*>(pair_weights), p.pairs = (uint32_t)pairs;
  run(p, list, rademacher, false, stream, "es_update_");
}

}  // namespace cuda
}  // namespace essa
