// Asks the processor itself: __builtin_cpu_supports answers from a table that not every compiler's runtime fills.
#include "features.h"

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace essa {
namespace cpu {

#if defined(__x86_64__)
namespace {

constexpr unsigned kYmm = 0x06, kZmm = 0xe6;  // registers that the operating system must save, as bits of XCR0

unsigned saved_registers() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

}  // namespace

std::vector<std::string> cpu_features() {
  struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  } basic, extended, further;
  std::vector<std::string> names;
  __get_cpuid(1, &basic.eax, &basic.ebx, &basic.ecx, &basic.edx);
  const unsigned saved = (basic.ecx >> 27 & 1) != 0 ? saved_registers() : 0;
  if ((saved & kYmm) != kYmm) return names;
  __get_cpuid_count(7, 0, &extended.eax, &extended.ebx, &extended.ecx, &extended.edx);
  if (extended.eax >= 1) __get_cpuid_count(7, 1, &further.eax, &further.ebx, &further.ecx, &further.edx);

  const auto add = [&](const char* name, unsigned word, int bit) {
    if ((word >> bit & 1) != 0) names.push_back(name);
  };
  add("avx2", extended.ebx, 5);
  add("fma", basic.ecx, 12);
  add("f16c", basic.ecx, 29);
  if ((saved & kZmm) != kZmm) return names;
  add("avx512f", extended.ebx, 16);
  add("avx512bw", extended.ebx, 30);
  add("avx512vl", extended.ebx, 31);
  add("avx512dq", extended.ebx, 17);
  add("avx512bf16", further.eax, 5);
  return names;
}
#else
std::vector<std::string> cpu_features() { return {}; }
#endif

bool cpu_supports(const std::string& name) {
  static const std::vector<std::string> features = cpu_features();
  return std::find(features.begin(), features.end(), name) != features.end();
}

}  // namespace cpu
}  // namespace essa
