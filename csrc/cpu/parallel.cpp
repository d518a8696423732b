#include "parallel.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>

#include "kernels.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace essa {
namespace cpu {
namespace {

// libgomp's entry points; LLVM's and Intel's OpenMP libraries export the same names. They are looked up in the running
// process because linking an OpenMP library would bring in a second one beside torch's bundled copy.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_number)();
  int (*team_size)();
  std::string library;
};

#if defined(__unix__) || defined(__APPLE__)
bool look_up(OpenMP& pool) {
  void* const entries[] = {dlsym(RTLD_DEFAULT, "GOMP_parallel"), dlsym(RTLD_DEFAULT, "omp_get_thread_num"),
                           dlsym(RTLD_DEFAULT, "omp_get_num_threads")};
  for (void* entry : entries) {
    Dl_info info;
    if (entry == nullptr || dladdr(entry, &info) == 0 || info.dli_fname == nullptr) return false;
    // Three names from two libraries would be a pool that miscounts itself.
    if (pool.library.empty()) pool.library = info.dli_fname;
    if (pool.library != info.dli_fname) return false;
  }
  pool.parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(entries[0]);
  pool.thread_number = reinterpret_cast<int (*)()>(entries[1]);
  pool.team_size = reinterpret_cast<int (*)()>(entries[2]);
  return true;
}
#else
bool look_up(OpenMP&) { return false; }
#endif

// nullptr until torch has been imported, so a miss is looked up again.
const OpenMP* openmp() {
  static std::atomic<const OpenMP*> found{nullptr};
  if (const OpenMP* pool = found.load(std::memory_order_acquire)) return pool;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  static OpenMP pool;
  if (found.load(std::memory_order_relaxed) == nullptr) {
    pool.library.clear();
    if (look_up(pool)) found.store(&pool, std::memory_order_release);
  }
  return found.load(std::memory_order_relaxed);
}

struct Region {
  const OpenMP* pool;
  int64_t items, grain;
  void (*body)(void*, int64_t, int64_t);
  void* context;

  static void run(void* pointer) {
    const Region& region = *static_cast<Region*>(pointer);
    const int64_t team = region.pool->team_size(), me = region.pool->thread_number();
    const int64_t grains = (region.items + region.grain - 1) / region.grain;
    const int64_t first = grains * me / team * region.grain;
    const int64_t last = std::min(region.items, grains * (me + 1) / team * region.grain);
    if (first < last) region.body(region.context, first, last);
  }
};

struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  ~Buffer() { free(data); }
};
thread_local Buffer buffer;

}  // namespace

void parallel_ranges(int threads, int64_t items, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (items <= 0) return;
  const int64_t team = std::min<int64_t>(threads, (items + grain - 1) / grain);
  const OpenMP* pool = team > 1 ? openmp() : nullptr;
  if (pool == nullptr) {
    body(context, 0, items);
    return;
  }
  Region region{pool, items, grain, body, context};
  pool->parallel(&Region::run, &region, static_cast<unsigned>(team), 0);
}

std::string thread_pool() {
  const OpenMP* pool = openmp();
  if (pool == nullptr) return "none: no OpenMP library in the process (import torch first); kernels run on one thread";
  return "shared with " + pool->library;
}

float* scratch(int64_t floats) {
  if (floats > buffer.size) {
    free(buffer.data);
    const int64_t bytes = (floats * static_cast<int64_t>(sizeof(float)) + 4095) / 4096 * 4096;
    buffer.data = static_cast<float*>(aligned_alloc(64, bytes));
    buffer.size = buffer.data == nullptr ? 0 : bytes / static_cast<int64_t>(sizeof(float));
    if (buffer.data == nullptr) abort();  // no exception may leave a parallel region
  }
  return buffer.data;
}

}  // namespace cpu
}  // namespace essa
