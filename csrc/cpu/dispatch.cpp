#include "dispatch.h"

#include <stdexcept>

namespace essa {
namespace cpu {
namespace {

#define ESSA_TABLE(ISA) \
  { #ISA, ISA::gaussian, ISA::rademacher, ISA::svd_lora }

struct Candidate {
  Kernels kernels;
  const char* family;  // what ESSA_CPU_ISA calls it
  bool (*supported)();
};

// Ascending; the last supported one wins.
const Candidate candidates[] = {
    {ESSA_TABLE(baseline), "baseline", [] { return true; }},
#if defined(__x86_64__)
    {ESSA_TABLE(avx2), "avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
    {ESSA_TABLE(avx512), "avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
#ifdef ESSA_WITH_AVX512BF16
    {ESSA_TABLE(avx512bf16), "avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bf16");
     }},
#endif
#endif
};

}  // namespace

const Kernels& choose_kernels(const std::string& limit) {
  const Candidate* chosen = nullptr;
  std::string allowed;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported()) continue;
    if (chosen == nullptr || std::string(chosen->family) != candidate.family) {
      if (chosen != nullptr && limit == chosen->family) break;
      allowed += (allowed.empty() ? "" : ", ") + std::string(candidate.family);
    }
    chosen = &candidate;
  }
  if (!limit.empty() && limit != chosen->family) {
    throw std::invalid_argument("ESSA_CPU_ISA is '" + limit + "'; this build on this machine allows: " + allowed);
  }
  return chosen->kernels;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates) names.push_back(candidate.kernels.isa);
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__)
#define ESSA_FEATURE(NAME) \
  if (__builtin_cpu_supports(NAME)) names.push_back(NAME)
  ESSA_FEATURE("avx2");
  ESSA_FEATURE("fma");
  ESSA_FEATURE("f16c");
  ESSA_FEATURE("avx512f");
  ESSA_FEATURE("avx512bw");
  ESSA_FEATURE("avx512vl");
  ESSA_FEATURE("avx512dq");
  ESSA_FEATURE("avx512bf16");
#undef ESSA_FEATURE
#endif
  return names;
}

}  // namespace cpu
}  // namespace essa
