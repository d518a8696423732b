// The pybind11 module essa_kernels._C: raw pointers in, kernels out. Tensors are checked in Python, before any call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/features.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#ifdef ESSA_WITH_CUDA
#include "cuda/essa_cuda.h"
#endif

namespace py = pybind11;

namespace essa {
namespace {

const cpu::Kernels* kernels = nullptr;

noise::Key make_key(uint64_t seed, uint32_t generation, uint32_t site, uint64_t member) {
  return noise::Key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), site,
                    static_cast<uint32_t>(member >> 1), generation};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void fill(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
          uint64_t member, int threads, int tile, int64_t grain,
          void (*kernel)(const cpu::NoiseArgs&, int64_t, int64_t)) {
  const cpu::NoiseArgs args{pointer<float>(out), rows, cols, make_key(seed, generation, site, member),
                            (member & 1) != 0};
  const int64_t tiles = rows * noise::tiles_per_row(cols, tile);
  py::gil_scoped_release release;
  cpu::parallel_for(threads, tiles, grain, [&](int64_t first, int64_t last) { kernel(args, first, last); });
}

// A range below these sizes costs more to hand over than to compute.
constexpr int64_t kGaussianGrain = 256, kRademacherGrain = 32, kRowGrain = 12;

void gaussian_cpu(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
                  uint64_t member, int threads) {
  fill(out, rows, cols, seed, generation, site, member, threads, noise::kGaussianTile, kGaussianGrain,
       kernels->gaussian);
}

void rademacher_cpu(uintptr_t out, int64_t rows, int64_t cols, uint64_t seed, uint32_t generation, uint32_t site,
                    uint64_t member, int threads) {
  fill(out, rows, cols, seed, generation, site, member, threads, noise::kRademacherTile, kRademacherGrain,
       kernels->rademacher);
}

void run_rows(const cpu::SvdLoraArgs& args, int threads) {
  py::gil_scoped_release release;
  cpu::parallel_for(threads, args.rows, kRowGrain,
                    [&](int64_t first, int64_t last) { kernels->svd_lora(args, first, last); });
}

void svd_lora_cpu(uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
                  uintptr_t u_b, int64_t u_b_row_stride, int64_t u_b_col_stride, uintptr_t s_a, uintptr_t s_b,
                  uintptr_t offsets, int64_t rows, int64_t members, int64_t d_in, int64_t d_out, int64_t r_a,
                  int64_t r_b, int dtype, int threads) {
  cpu::SvdLoraArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.members = members;
  args.d_in = d_in, args.d_out = d_out, args.r_a = r_a, args.r_b = r_b;
  args.x = pointer<void>(x), args.x_stride = x_stride;
  args.v_a = pointer<void>(v_a), args.core = pointer<float>(core);
  args.s_a = pointer<float>(s_a), args.s_b = pointer<float>(s_b), args.offsets = pointer<int64_t>(offsets);
  args.u_b = pointer<void>(u_b), args.u_b_row_stride = u_b_row_stride, args.u_b_col_stride = u_b_col_stride;
  args.y = pointer<void>(y), args.y_stride = y_stride;
  run_rows(args, threads);
}

void svd_lora_shrink_cpu(uintptr_t h, int64_t h_stride, uintptr_t x, int64_t x_stride, uintptr_t v_a, uintptr_t core,
                         uintptr_t s_a, uintptr_t s_b, uintptr_t offsets, int64_t rows, int64_t members, int64_t d_in,
                         int64_t r_a, int64_t r_b, int dtype, int threads) {
  cpu::SvdLoraArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.members = members;
  args.d_in = d_in, args.r_a = r_a, args.r_b = r_b;
  args.x = pointer<void>(x), args.x_stride = x_stride;
  args.v_a = pointer<void>(v_a), args.core = pointer<float>(core);
  args.s_a = pointer<float>(s_a), args.s_b = pointer<float>(s_b), args.offsets = pointer<int64_t>(offsets);
  args.h = pointer<float>(h), args.h_stride = h_stride;
  run_rows(args, threads);
}

void svd_lora_expand_cpu(uintptr_t y, int64_t y_stride, uintptr_t h, int64_t h_stride, uintptr_t u_b,
                         int64_t u_b_row_stride, int64_t u_b_col_stride, int64_t rows, int64_t d_out, int64_t r_b,
                         int dtype, int threads) {
  cpu::SvdLoraArgs args{};
  args.dtype = dtype;
  args.rows = rows, args.d_out = d_out, args.r_b = r_b;
  args.h = pointer<float>(h), args.h_stride = h_stride;
  args.u_b = pointer<void>(u_b), args.u_b_row_stride = u_b_row_stride, args.u_b_col_stride = u_b_col_stride;
  args.y = pointer<void>(y), args.y_stride = y_stride;
  run_rows(args, threads);
}

py::dict build_info() {
  py::dict info;
  info["noise_version"] = noise::kVersion;
  info["compiled_isas"] = cpu::compiled_isas();
  info["cpu_isa"] = kernels->isa;
  info["cpu_features"] = cpu::cpu_features();
  info["thread_pool"] = cpu::thread_pool();
#ifdef ESSA_WITH_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = ESSA_CUDA_ARCHS;
  info["cuda_version"] = ESSA_CUDA_VERSION;
  char devices[2048];
  cuda::device_report(devices, sizeof devices);
  info["cuda_device"] = devices;
#else
  info["cuda"] = false;
#endif
  info["compiler"] = ESSA_COMPILER;
  return info;
}

}  // namespace
}  // namespace essa

PYBIND11_MODULE(_C, m) {
  using namespace essa;
  const char* limit = std::getenv("ESSA_CPU_ISA");
  kernels = &cpu::choose_kernels(limit == nullptr ? "" : limit);
  m.def("build_info", &build_info);
  m.def("gaussian_cpu", &gaussian_cpu);
  m.def("rademacher_cpu", &rademacher_cpu);
  m.def("svd_lora_cpu", &svd_lora_cpu);
  m.def("svd_lora_shrink_cpu", &svd_lora_shrink_cpu);
  m.def("svd_lora_expand_cpu", &svd_lora_expand_cpu);
#ifdef ESSA_WITH_CUDA
  m.def("gaussian_cuda", &cuda::gaussian);
  m.def("rademacher_cuda", &cuda::rademacher);
  m.def("svd_lora_cuda", &cuda::svd_lora);
  m.def("svd_lora_shrink_cuda", &cuda::svd_lora_shrink);
  m.def("svd_lora_expand_cuda", &cuda::svd_lora_expand);
#endif
}
