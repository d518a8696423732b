#pragma once
#include <string>
#include <vector>

namespace essa {
namespace cpu {

// Whether this processor and this operating system have the instruction set: "avx2", "fma", "f16c", "avx512f",
// "avx512bw", "avx512vl", "avx512dq" or "avx512bf16".
bool cpu_supports(const std::string& name);

std::vector<std::string> cpu_features();  // all of these that it has

}  // namespace cpu
}  // namespace essa
