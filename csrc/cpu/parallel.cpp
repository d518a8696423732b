#include "parallel.h"

#include <stdlib.h>

#include <algorithm>
#include <string>

#include "kernels.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace essa {
namespace cpu {
namespace {

// libgomp's entry points; LLVM's and Intel's OpenMP libraries export the same two names. They are looked up in the
// running process because linking an OpenMP library would bring in a second one beside torch's bundled copy.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_number)() = nullptr;
  int (*team_size)() = nullptr;

  bool find() {
    if (parallel != nullptr) return true;
#if defined(__unix__) || defined(__APPLE__)
    thread_number = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    team_size = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    auto entry = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (thread_number != nullptr && team_size != nullptr && entry != nullptr)
      parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(entry);
#endif
    return parallel != nullptr;
  }
};
OpenMP openmp;  // found again on each call until torch has been imported; every caller holds the GIL at that point

struct Region {
  int64_t items, grain;
  void (*body)(void*, int64_t, int64_t);
  void* context;

  static void run(void* pointer) {
    const Region& region = *static_cast<Region*>(pointer);
    const int64_t team = openmp.team_size(), me = openmp.thread_number();
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
  if (team <= 1 || !openmp.find()) {
    body(context, 0, items);
    return;
  }
  Region region{items, grain, body, context};
  openmp.parallel(&Region::run, &region, static_cast<unsigned>(team), 0);
}

const char* thread_pool() {
  static std::string description;
  if (!openmp.find()) return "none: no OpenMP library in the process (import torch first); kernels run on one thread";
#if defined(__unix__) || defined(__APPLE__)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(openmp.parallel), &info) != 0 && info.dli_fname != nullptr) {
    description = std::string("shared with ") + info.dli_fname;
    return description.c_str();
  }
#endif
  return "shared with the process's OpenMP library";
}

float* scratch(int64_t floats) {
  if (floats > buffer.size) {
    free(buffer.data);
    const int64_t bytes = (floats * static_cast<int64_t>(sizeof(float)) + 4095) / 4096 * 4096;
    buffer.data = static_cast<float*>(aligned_alloc(64, bytes));
    buffer.size = buffer.data == nullptr ? 0 : bytes / static_cast<int64_t>(sizeof(float));
    if (buffer.data == nullptr) abort();  // out of memory for a few kilobytes
  }
  return buffer.data;
}

}  // namespace cpu
}  // namespace essa
