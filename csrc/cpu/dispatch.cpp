#include "dispatch.h"

#include <stdexcept>

#include "features.h"

namespace essa {
namespace cpu {
namespace {

#define ESSA_TABLE(ISA) \
  { #ISA, ISA::gaussian, ISA::rademacher, ISA::svd_lora, ISA::lora_perturbed_shrink, ISA::lora_perturbed_expand, \
    ISA::lowrank_shrink, ISA::lowrank_expand, ISA::lowrank_update, ISA::perturb, ISA::es_update, \
    ISA::linear_logprob, ISA::linear_logprob_pack, ISA::linear_logprob_head, ISA::linear_logprob_hidden, \
    ISA::multi_lora, ISA::multi_lora_backward_rows, ISA::multi_lora_backward_factors, ISA::decode_attention }

struct Candidate {
  Kernels kernels;
  bool (*supported)();
};

// Ascending; the last supported one wins.
const Candidate candidates[] = {
    {ESSA_TABLE(baseline), [] { return true; }},
#if defined(__x86_64__)
    {ESSA_TABLE(avx2),
     [] {
       return cpu_supports("avx2") && cpu_supports("fma") && cpu_supports("f16c");
     }},
    {ESSA_TABLE(avx512),
     [] {
       return cpu_supports("avx512f") && cpu_supports("avx512bw") &&
              cpu_supports("avx512vl") && cpu_supports("avx512dq");
     }},
#ifdef ESSA_WITH_AVX512BF16
    {ESSA_TABLE(avx512bf16),
     [] {
       return cpu_supports("avx512f") && cpu_supports("avx512bw") &&
              cpu_supports("avx512vl") && cpu_supports("avx512dq") &&
              cpu_supports("avx512bf16");
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
    chosen = &candidate;
    if (limit == candidate.kernels.isa) break;
    allowed += (allowed.empty() ? "" : ", ") + std::string(candidate.kernels.isa);
  }
  if (!limit.empty() && limit != chosen->kernels.isa) {
    throw std::invalid_argument("ESSA_CPU_ISA is '" + limit + "'; this build on this machine allows: " + allowed);
  }
  return chosen->kernels;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates) names.push_back(candidate.kernels.isa);
  return names;
}

}  // namespace cpu
}  // namespace essa
