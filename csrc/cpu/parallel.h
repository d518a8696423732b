// Work sharing on the OpenMP pool that is already in the process - torch's. A pool of our own would spin against it.
#pragma once
#include <stdint.h>

#include <string>

namespace essa {
namespace cpu {

// Splits [0, items) into at most `threads` ranges that begin at multiples of `grain`, and calls
// body(context, first, last) for each. Runs in the caller where one thread is enough or no pool is found.
void parallel_ranges(int threads, int64_t items, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

template <class Body>
void parallel_for(int threads, int64_t items, int64_t grain, Body body) {
  parallel_ranges(
      threads, items, grain, [](void* b, int64_t first, int64_t last) { (*static_cast<Body*>(b))(first, last); }, &body);
}

// Which library's pool is shared, or why there is none.
std::string thread_pool();

}  // namespace cpu
}  // namespace essa
