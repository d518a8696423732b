// The instruction set is chosen once, when the module is imported.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace essa {
namespace cpu {

// The kernels for this machine. `limit` is the value of ESSA_CPU_ISA ("baseline", "avx2", "avx512", "avx512bf16", or
// empty): it can lower the choice, never raise it. Throws std::invalid_argument for any other value, or for one this
// machine lacks.
const Kernels& choose_kernels(const std::string& limit);

std::vector<std::string> compiled_isas();
}  // namespace cpu
}  // namespace essa
